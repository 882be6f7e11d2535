"""`align methods`: what there is to train with, read from the source without importing it."""

from __future__ import annotations

import argparse
import dataclasses
import json

from align.core.registry import METHODS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print for machines")


def run(options: argparse.Namespace) -> int:
    entries = METHODS.entries().values()
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1))
        return 0
    for entry in entries:
        paper = f"arXiv {entry.paper}" if entry.paper else ""
        print(f"{entry.id:<10}{entry.view:<16}{paper}".rstrip())
        print(f"    {entry.summary}")
        if entry.options:
            print("    " + "  ".join(f"{name}={value}" for name, value in entry.options.items()))
    return 0
