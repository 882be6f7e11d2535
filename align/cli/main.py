"""The `align` command: finds the subcommand, runs it, prints errors for people."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence

import align
from align.core.errors import AlignError

COMMANDS = {
    "train": "train what a recipe says",
    "check": "everything but training: recipe, data, step zero, memory",
    "data": "look at preference data: what is kept, dropped, biased",
    "methods": "list the methods, their papers and options",
    "recipes": "list, show, copy or import recipes",
    "generate": "sample completions from a model or adapter",
    "sample": "draw answers to a recipe's prompts, to be judged",
    "judge": "ask rewards, models or judges about sampled answers",
    "pairs": "make preference pairs of judged answers by a rule",
    "loop": "rounds: sample, judge, pair, train, evaluate",
    "chat": "talk to a model, before and after side by side",
    "evaluate": "win rate, gold reward and KL, with intervals",
    "merge": "merge an adapter into a plain model folder",
    "test": "run the battery on a method, of ours or yours",
    "demo": "align a small model on this machine, in minutes",
}
"""Name -> what it does. `align.cli.NAME` has `configure(parser)` and `run(options)`; only the chosen is imported."""
_WAIT = 15.0
"""Seconds that a rank leaves rank 0 to report an error that both have."""
_EXAMPLES = """examples:
  align demo                                        the whole way on made-up data
  align recipes copy mistral-7b/dpo my.yaml         a recipe to start from
  align check my.yaml                               what would be trained on, in seconds
  align train my.yaml train.learning_rate=5e-7      train; the same command resumes
  align evaluate runs/my/policy --against MODEL --data held_out.jsonl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 1 for a threshold that was crossed, 2 for an error of ours, 130 when
    interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Where it is installed, peft imports it, and on some CPUs it then advises a package that fetches kernels.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    options = parser(next((word for word in words if not word.startswith("-")), None)).parse_args(words)
    if os.getcwd() not in sys.path:  # `my_file:MyMethod` in the working folder, for the installed script too
        sys.path.append(os.getcwd())
    try:
        return int(options.command(options))
    except AlignError as error:
        if debug:
            raise
        show(error)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted: what was saved is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `align methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; the chosen one has its options."""
    top = argparse.ArgumentParser(
        prog="align",
        description=align.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"align {align.__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error (anywhere on the line)")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, says in COMMANDS.items():
        below = commands.add_parser(name, help=says, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = importlib.import_module(f"align.cli.{name}")
            module.configure(below)
            below.set_defaults(command=module.run)
    return top


def show(error: AlignError) -> None:
    """Print an error on stderr, once where all ranks have it.

    Rank 0 speaks and ends, and the launcher then ends the others. A rank that is still there after a while has an error
    of its own, and says so.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_WAIT)
    prefix = "" if rank == "0" else f"[rank {rank}] "
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
