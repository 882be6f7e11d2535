"""`align loop`: rounds of sampling, judging, pairing, training and evaluation; the same command resumes."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.cli import console
from align.cli.data import options_behind
from align.loops.rounds import STAGES

_DESCRIPTION = """Run the rounds of an iterative method, as a recipe with a section `loop` says.

Each round samples from the policy, has the answers judged, makes pairs, trains on them, evaluates, and takes the new
policy or goes back to the best so far. `loop.preset` names the method (`align methods --kind loop` lists them); the
recipe says what differs.

Each stage that loads a model is a process of its own, whose memory is free when it ends; training takes all devices.
A command that was stopped, in whatever stage, goes on when given again; what is finished is never done again.
"""
_EXAMPLES = """examples:
  align loop my.yaml
  align loop my.yaml train.learning_rate=5e-7
  align loop my.yaml --in-process              everything in this process, for small models
  align methods --kind loop                    the loops that there are
"""
_STOPPED = 143
"""The exit code of a process that SIGTERM ended."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("--stage", choices=STAGES, help="before RECIPE: one stage of the round that the loop is in")
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("rest", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="options to replace")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--in-process", action="store_true", help="all stages in this process")
    parser.add_argument("--json", action="store_true", help="print for machines")


def run(options: argparse.Namespace) -> int:
    overrides = options_behind(options, add_options)
    from align.recipe import loop, loop_run

    recipe = loop.read(options.recipe, overrides)
    console.set_up_logging()
    signal.signal(signal.SIGTERM, _stop)
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print
        if options.stage:
            loop_run.run_stage(recipe, options.stage, console.progress)
            return 0
        with loop_run.locked(recipe.output, console.note) as lock:
            if options.in_process:
                runner = loop_run.InProcess(recipe, console.progress)
            else:
                runner = loop_run.ByProcess(recipe, console.progress, lock)
            policy = loop_run.run(recipe, runner, console.note)
    _tell(recipe.output, policy, options.json)
    return 0 if policy is not None else 1


def _stop(signum: int, frame: Any) -> None:
    """A stage's process is ended on the way out, and saves what it has."""
    raise SystemExit(_STOPPED)


def _tell(output: Path, policy: Path | None, as_json: bool) -> None:
    found = json.loads((output / "loop.json").read_text(encoding="utf-8"))
    if as_json:
        console.print_json({"output_dir": str(output), **found})
        return
    names = [name for name in _SHOWN if any(one.get(name) is not None for one in found["rounds"])]
    cells = [[_round(one), *(_number(one.get(name)) for name in names)] for one in found["rounds"]]
    console.print_table(("round", *(_SHOWN[name] for name in names)), cells)
    if policy is None:
        print("no round was taken: the best policy is the initial model")
    else:
        print(f"the policy is in {output / 'policy'} ({found['policy']})")


_SHOWN: Mapping[str, str] = {
    "reward": "reward",
    "win_rate": "win rate",
    "accuracy": "accuracy",
    "kl": "KL",
    "tokens": "tokens",
    "unfinished": "unfinished",
    "dropped": "prompts dropped",
    "consistency": "consistency",
}


def _round(one: Mapping[str, Any]) -> str:
    return f"{one['round']}" + ("" if one["accepted"] else " (rolled back)")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
