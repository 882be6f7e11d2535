"""`align methods`: what there is to train with, read from the source without importing it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import textwrap

from align.cli.console import print_json
from align.core.registry import LOOPS, METHODS, WORLDS, Entry, Explained, Registry

_REGISTRIES: tuple[Registry, ...] = (METHODS, WORLDS, LOOPS)
_EXAMPLES = """examples:
  align methods
  align methods dpo kto
  align methods --kind world --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "What a recipe's `method.name` may be, with papers, the data each reads, and options."
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these, with what they are and what each option means"
    )
    parser.add_argument("--kind", choices=[one.kind for one in _REGISTRIES], help="only things of one kind")
    parser.add_argument("--json", action="store_true", help="print for machines")


def run(options: argparse.Namespace) -> int:
    chosen = [one for one in _REGISTRIES if options.kind in (None, one.kind)]
    found = [(one.kind, entry) for one in chosen for entry in one.entries().values()]
    if options.names:
        known = {entry.id for _, entry in found}
        for name in options.names:
            if name not in known:
                raise chosen[0].unknown(name, "command line")
        found = [(kind, entry) for kind, entry in found if entry.id in options.names]
    if options.json:
        print_json([{"kind": kind, **dataclasses.asdict(entry)} for kind, entry in found])
        return 0
    for registry in chosen:
        below = [entry for kind, entry in found if kind == registry.kind]
        if below:
            print(_bold(f"{registry.kind}s"))
            width = max(len(entry.id) for entry in below) + 2
            for entry in below:
                _show(entry, width)
                (_explain if options.names else _options_line)(entry)
    return 0


def _show(entry: Entry, width: int) -> None:
    paper = f"arXiv {entry.paper}" if entry.paper else ""
    print(f"{entry.id:<{width}}{entry.view:<16}{paper}".rstrip())
    print(f"    {entry.summary}")


def _options_line(entry: Entry) -> None:
    if entry.options:
        print("    " + "  ".join(f"{name}={value}" for name, value in entry.options.items()))


def _explain(entry: Entry) -> None:
    """All that the source says: the docstring, and each option with its default, range and meaning."""
    rest = entry.doc.removeprefix(entry.summary).strip("\n")
    if rest:
        print("\n" + textwrap.indent(rest, "    "))
    if not entry.explained:
        return
    print("\n    " + _bold("options"))
    rows = [(name, str(one.default), _values(one), one.doc) for name, one in entry.explained.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        print("      " + "  ".join([*cells, row[3]]))
    print()


def _values(one: Explained) -> str:
    """What an option may be: its range, its choices, or its type."""
    if one.range:
        return one.range
    return one.type.removeprefix("Literal[").removesuffix("]").replace("'", "") if "Literal[" in one.type else one.type


def _bold(text: str) -> str:
    """Without rich, whose import would be most of the time this command takes."""
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
