"""`align train`: one recipe, on this machine's devices or as one rank of a launcher."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.cli.console import note, print_json, progress, set_up_logging
from align.compat.accelerate import leave
from align.core.errors import AlignError
from align.recipe import schema
from align.recipe.sections import Recipe

_LAUNCHER_MARKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
_EXAMPLES = """examples:
  align train my.yaml
  align train my.yaml train.learning_rate=5e-7 --train.seed 7
  accelerate launch -m align train my.yaml --train.seed 7
The same command resumes a run that was stopped.
"""
_STOPPED = 143
"""The exit code of a process that SIGTERM ended."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Overrides follow the recipe: train.learning_rate=1e-6, or --train.learning_rate 1e-6."
    parser.epilog = _EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("--json", action="store_true", help="before RECIPE: print where things are, for machines")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="options to replace")


def run(options: argparse.Namespace) -> int:
    recipe, given = schema.read(options.recipe, options.overrides)
    if recipe.rounds is not None:
        return _rounds(recipe, given, options.json)
    if not launched(os.environ):
        devices = visible_devices()
        if devices > 1:
            command = launch_command(devices, options.recipe, options.overrides)
            os.execv(command[0], command)
    return _train(recipe, given, options.json)


def _rounds(recipe: Recipe, given: Mapping[str, str], as_json: bool) -> int:
    from align.recipe.rounds import recipes_of

    for one in recipes_of(recipe, note):
        code = _train(one, given, False)
        if code:
            return code
    output = Path(recipe.train.output_dir).expanduser()
    if as_json:
        print_json({"output_dir": str(output), "policy": str(output / "policy"), "page": None})
    else:
        print(f"all rounds are done: the policy is in {output / 'policy'}")
    return 0


def _train(recipe: Recipe, given: Mapping[str, str], as_json: bool) -> int:
    from align.recipe.run import prepare

    set_up_logging()
    trainer = prepare(recipe)
    if os.environ.get("RANK", "0") == "0":
        _advise(recipe, given, trainer)
    shown = _progress(trainer)
    try:
        trainer.train()
    finally:
        shown.close()
    stopped = trainer.stopped_by_signal
    if os.environ.get("RANK", "0") == "0":
        if stopped:
            note("stopped by a signal; the same command resumes")
        else:
            _finish(recipe, as_json)
    return leave(trainer.accelerator, _STOPPED if stopped else 0)


def _advise(recipe: Recipe, given: Mapping[str, str], trainer: Any) -> None:
    """Warnings, each once; they stop nothing."""
    from align.recipe.advice import advise, facts_of

    facts = facts_of(trainer.data.train.prepared.report, trainer.tokenizer, recipe.data.chat_template)
    for advice in advise(recipe, given, facts):
        note(str(advice))


def _progress(trainer: Any) -> Any:
    from align.trainers.progress import RunProgress

    unit = {"pairs": "pairs", "lists": "lists"}.get(trainer.method.view, "completions")
    if trainer.method.rollouts() is not None:
        unit = "prompts"
    shown = RunProgress(lambda steps: progress(steps, "training", "steps"), note, unit)
    shown.attach(trainer)
    return shown


def _finish(recipe: Recipe, as_json: bool) -> None:
    """The run's page, and where things are."""
    from align.report import run_page

    output = Path(recipe.train.output_dir).expanduser()
    try:
        page = str(run_page(output))
    except AlignError as error:  # the run is whole, and its page can be made again
        note(f"warning: there is no page about the run: {error}")
        page = None
    if as_json:
        print_json({"output_dir": str(output), "policy": str(output / "policy"), "page": page})
        return
    print(f"done: the policy is in {output / 'policy'}" + (f", a page about the run is {page}" if page else ""))


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher (accelerate, torchrun, ...) started this process."""
    return any(mark in environment for mark in _LAUNCHER_MARKS)


def visible_devices() -> int:
    """Accelerators this process may use; 0 on a CPU machine."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def launch_command(devices: int, recipe: str, overrides: list[str]) -> list[str]:
    """One process a device, with nothing taken from the user's own accelerate configuration."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launcher += ["--num_processes", str(devices), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, "-m", "align", "train", recipe, *overrides]
