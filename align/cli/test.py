"""`align test`: the battery that every method must pass, on a method of ours or yours."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from align.cli import console

if TYPE_CHECKING:
    from align.testing.checks import Check

_DESCRIPTION = """Run the battery on a method: an id of `align methods`, or `my_file:MyMethod` for one of your own.

On bare numbers, for the default options and for variants of them: gradients by finite differences, invariance to
order, padding and repeated units, finite loss and gradient at extreme log-probabilities, options out of range.
On a tiny model, with the default options: the packed step against one sequence at a time, any cut into micro-batches
and any back end, and a run that is stopped and resumed, bit for bit. `--quick` leaves the model out.

A wrong formula is not found here: compare with a loop written from the paper for that.
"""
_EXAMPLES = """examples:
  align test dpo
  align test my_pkg.my_file:MyMethod
  align test my_file:MyMethod --quick --json

Exit code: 0 all checks pass, 1 a check fails, 2 there is no such method.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("method", metavar="METHOD", nargs="?", help="id, or module:Class")
    parser.add_argument("--quick", action="store_true", help="without the checks that need a model")
    parser.add_argument("--seed", type=int, default=0, help="of random rows and models (default 0)")
    parser.add_argument("--json", action="store_true", help="print for machines")


def run(options: argparse.Namespace) -> int:
    if options.method is None:
        return explain()
    with contextlib.redirect_stdout(sys.stderr):  # what training prints
        results = run_battery(options.method, options.quick, options.seed)
    failed = [result for result in results if not result.ok]
    if options.json:
        checks = [{"ok": result.ok, **dataclasses.asdict(result)} for result in results]
        console.print_json({"method": options.method, "ok": not failed, "quick": options.quick, "checks": checks})
    else:
        show(options.method, results)
    return 1 if failed else 0


def run_battery(method: str, quick: bool, seed: int) -> list[Check]:
    """All checks. The class is found first: a name that is wrong is an error of the user, not a failed check."""
    from align.core.registry import METHODS
    from align.testing.checks import battery, model_battery

    console.set_up_logging(quiet=True)
    found: Any = METHODS.get(method)
    return battery(found, seed) + ([] if quick else model_battery(found, seed))


def show(method: str, results: list[Check]) -> None:
    """A line a check; the ranges of one option are one line."""
    for result in _grouped(results):
        mark = "ok  " if result.ok else "FAIL"
        taken = "" if result.name == "options" else f"  {result.seconds:.2f} s"
        print(f"{mark} {result.name} ({result.options}){taken}")
        if result.problem:
            print("     " + result.problem.replace("\n", "\n     "))
    failed = sum(not result.ok for result in results)
    seconds = console.duration(sum(result.seconds for result in results))
    said = f"{failed} of {len(results)} checks fail" if failed else f"all {len(results)} checks pass"
    print(f"{method}: {said}, {seconds}")


def explain() -> int:
    """What the command is for, and what it can be run on."""
    from align.core.registry import METHODS

    print(_DESCRIPTION)
    print(_EXAMPLES)
    print("methods here: " + " ".join(METHODS.entries()))
    return 0


def _grouped(results: list[Check]) -> list[Check]:
    """Checks of options one for each option; the others as they are."""
    kept: dict[tuple[str, str], Check] = {}
    for number, result in enumerate(results):
        key = ("options", result.options) if result.name == "options" else (str(number), "")
        before = kept.get(key)
        problem = "; ".join(text for text in ((before.problem if before else ""), result.problem) if text)
        kept[key] = dataclasses.replace(result, problem=problem)
    return list(kept.values())
