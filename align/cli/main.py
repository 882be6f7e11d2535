"""The `align` command: finds the subcommand, runs it, prints errors for people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import align
from align.cli import demo, methods, train
from align.core.errors import AlignError, ConfigError

_COMMANDS = (train, methods, demo)


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

    A configuration is the same on every rank, so one process of each machine speaks of it; any other error may be one
    rank's alone, and that rank speaks.
    """
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if isinstance(error, ConfigError) and local != "0":
        return
    prefix = "" if rank == "0" else f"[rank {rank}] "
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
