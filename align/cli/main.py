"""The `align` command: finds the subcommand, runs it, prints errors for people."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import align
from align.cli import demo, methods, train
from align.core.errors import AlignError

_COMMANDS = (train, methods, demo)
_WAIT = 15.0
"""Seconds that a rank leaves rank 0 to report an error that both have."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 2 for an error of ours, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    options = parser().parse_args([word for word in words if word != "--debug"])
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
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each adds its own."""
    top = argparse.ArgumentParser(prog="align", description=align.__doc__)
    top.add_argument("--version", action="version", version=f"align {align.__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error (anywhere on the line)")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
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
