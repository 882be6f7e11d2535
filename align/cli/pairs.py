"""`align pairs`: preference pairs (or demonstrations) of judged answers by a named rule, with their provenance."""

from __future__ import annotations

import argparse

from align.cli import stage

_DESCRIPTION = """Make rows to train on of judged answers, by the rule that a recipe's `pairs` names.

Reads OUTPUT_DIR/judged (OUTPUT_DIR/samples where the rule needs no feedback) and writes OUTPUT_DIR/pairs, Parquet in
TRL's columns: `data.train: [OUTPUT_DIR/pairs]` trains on it as it is. Ties and equal texts are dropped and counted; an
answer without feedback is in no pair. The column `provenance` says of each row which rule made it of what.
"""
_EXAMPLES = """examples:
  align pairs my.yaml
  align pairs my.yaml pairs.rule=margin pairs.margin=0.5 --restart
  align data runs/my/pairs
"""


def configure(parser: argparse.ArgumentParser) -> None:
    stage.add_arguments(parser, _DESCRIPTION, _EXAMPLES)


def add_options(parser: argparse.ArgumentParser) -> None:
    stage.add_options(parser)


def run(options: argparse.Namespace) -> int:
    account = stage.run(options, "pairs", "prompts")
    made = account.of("pairs")
    kind = "demonstrations" if "demonstrations" in made else "pairs"
    swapped = f", {made['swapped']:,} of them with the likelier loser as winner" if made.get("swapped") else ""
    lines = [f"{account.folder}: {made.get(kind, 0):,} {kind} of {account.prompts:,} prompts{swapped}"]
    what = {"lost": "prompts without a pair", "left_out": "answers left out"}
    stage.print_lines(options, lines + stage.lost(account, what))
    return 0
