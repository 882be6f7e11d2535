"""`align sample`: prompts -> K answers each, as an artefact; the same command resumes."""

from __future__ import annotations

import argparse

from align.cli import console, stage

_DESCRIPTION = """Draw answers to prompts, as a recipe says: `model`, `data.prompts`, `sampler`, `sample`, `output_dir`.

Writes OUTPUT_DIR/samples: Parquet, one row a prompt, with the tokens, log-probabilities and origin of every answer.
Work is done in numbered chunks (`sample.chunk` prompts each). A command that was stopped goes on when given again, and
does no finished chunk a second time; given again after the end it does nothing.
"""
_EXAMPLES = """examples:
  align sample my.yaml
  align sample my.yaml sample.n=8 --sample.temperature 0.7
  align sample my.yaml sampler.kind=vllm --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    stage.add_arguments(parser, _DESCRIPTION, _EXAMPLES)


def add_options(parser: argparse.ArgumentParser) -> None:
    stage.add_options(parser)


def run(options: argparse.Namespace) -> int:
    account = stage.run(options, "sample", "answers")
    answers = account.of("answers")
    sampled = answers.get("sampled", 0)
    rate = ""
    if account.tokens:
        rate = f", {console.duration(account.seconds)}, {account.tokens / account.seconds:,.0f} tokens/s"
    given = f", and {answers['data']:,} of the data" if answers.get("data") else ""
    lines = [
        f"{account.folder}: {sampled:,} answers to {account.prompts:,} prompts{given}, "
        f"{answers.get('finished', 0) / max(sampled, 1):.0%} finished, "
        f"{answers.get('tokens', 0) / max(sampled, 1):.1f} tokens each{rate}"
    ]
    stage.print_lines(options, lines + stage.lost(account, {"lost": "left out"}))
    return 0
