"""`align train`: one recipe, on this machine's devices or as one rank of a launcher."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from align.recipe import schema

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
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="options to replace")


def run(options: argparse.Namespace) -> int:
    recipe = schema.load(options.recipe, options.overrides)
    if not launched(os.environ):
        devices = visible_devices()
        if devices > 1:
            command = launch_command(devices, options.recipe, options.overrides)
            os.execv(command[0], command)
    from align.recipe.run import prepare

    trainer = prepare(recipe)
    trainer.train()
    stopped = trainer.stopped_by_signal
    if os.environ.get("RANK", "0") == "0":
        print("stopped by a signal; the same command resumes" if stopped else f"done: {recipe.train.output_dir}")
    return _STOPPED if stopped else 0


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
