"""`align judge`: feedback on sampled answers, as an artefact; the same command resumes and repeats no judgement."""

from __future__ import annotations

import argparse

from align.cli import stage

_DESCRIPTION = """Ask who judges, as a recipe's `feedback` says, about every answer that `align sample` drew.

Reads OUTPUT_DIR/samples and writes OUTPUT_DIR/judged, chunk by chunk. What a judge does not say (it failed, was silent
or said nothing that could be read) is missing: it is counted with the reason, stands as null in the file and is never
taken for a low score. A finished chunk is not judged again, unless --retry-missing asks for it; replies of judges are
kept in OUTPUT_DIR/judgements, so that none is paid for twice.
"""
_EXAMPLES = """examples:
  align judge my.yaml
  align judge my.yaml --retry-missing
  align judge my.yaml output_dir=runs/second --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    stage.add_arguments(parser, _DESCRIPTION, _EXAMPLES, add_options)


def add_options(parser: argparse.ArgumentParser) -> None:
    stage.add_options(parser)
    parser.add_argument("--retry-missing", action="store_true", help="judge chunks again of which something is missing")


def run(options: argparse.Namespace) -> int:
    account = stage.run(options, "judge", "prompts", add_options)
    judged, asked = account.of("judged"), account.of("asked")
    lines = [f"{account.folder}: {account.prompts:,} prompts"]
    lines += [f"  `{name}`: {judged.get(name, 0):,} of {number:,} judged" for name, number in asked.items()]
    stage.print_lines(options, lines + stage.lost(account, {"lost": "missing"}))
    return 0
