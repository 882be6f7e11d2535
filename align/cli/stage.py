"""What `align sample`, `align judge` and `align pairs` have in common: their options, progress, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from align.cli import console
from align.cli.data import options_behind
from align.loops.account import Account
from align.recipe.collect import Collect

Add = Callable[[argparse.ArgumentParser], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--restart", action="store_true", help="throw away work of other settings, and begin anew")
    parser.add_argument("--json", action="store_true", help="print for machines")


def add_arguments(parser: argparse.ArgumentParser, description: str, examples: str, add: Add = add_options) -> None:
    parser.description, parser.epilog = description, examples
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("rest", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="options to replace")
    add(parser)


def run(options: argparse.Namespace, command: str, unit: str, add: Add = add_options) -> Account:
    """Read the recipe, do what is left to do, and print what it came to."""
    overrides = options_behind(options, add)
    from align.recipe.collect import read
    from align.recipe.stages import run as run_stage

    recipe = read(options.recipe, command, overrides)
    console.set_up_logging()
    _tell(recipe, command)
    label = {"sample": "sampling", "judge": "judging", "pairs": "pairing"}[command]
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print
        watch = partial(console.progress, label=label, unit=unit)
        retry = getattr(options, "retry_missing", False)
        account = run_stage(recipe, command, watch, options.restart, retry, console.note)
    if options.json:
        console.print_json(dataclasses.asdict(account))
    elif account.before == account.chunks:
        print(f"{account.folder} is complete; nothing was left to do")
    elif account.before:
        print(f"{account.before} of {account.chunks} chunks were done before")
    return account


def _tell(recipe: Collect, command: str) -> None:
    """Sections of a recipe that other commands read."""
    others = [name for name in recipe.elsewhere if name != "provenance"]
    if others:
        console.note(f"not read by `align {command}`: " + ", ".join(f"`{name}`" for name in others))


def lost(account: Account, what: dict[str, str]) -> list[str]:
    """Sentences on what was lost, by kind of count: `what[kind]` says what was counted."""
    return [f"{says}: {account.said(kind)}" for kind, says in what.items() if account.said(kind)]


def print_lines(options: Any, lines: list[str]) -> None:
    if not options.json:
        for line in lines:
            print(line)
