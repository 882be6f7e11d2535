"""`align merge`: an adapter into a plain model folder that transformers and vLLM load."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys

from align.cli import console

_DESCRIPTION = """Add an adapter's weights to its base model and save the sum as a plain model folder.

The sum is made in float32. The folder holds weights (safetensors), tokenizer, chat template and generation
configuration, and appears whole or not at all. Before it appears it is read again, and its logits are compared with
those of base and adapter.

A base that is stored quantised is turned into floats first. An adapter that was trained over a base quantised while it
was loaded (QLoRA) is added to the base as it is stored: the sum is then off by the rounding of those 4 bits.
"""
_EXAMPLES = """examples:
  align merge runs/my/policy --output merged
  align merge runs/my/policy --output merged --dtype bfloat16
  align merge adapter --base /models/Qwen3-8B --output merged    the base was moved
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--base", metavar="MODEL", help="base model, where it is not where the adapter says")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the saved weights; by default bfloat16 where the base is stored in it, else float32",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings")
    parser.add_argument("--json", action="store_true", help="print for machines")


def run(options: argparse.Namespace) -> int:
    console.set_up_logging(quiet=True)
    from align.trainers.merge import merge_adapter

    with contextlib.redirect_stdout(sys.stderr):  # libraries that print, DeepSpeed on import among them
        merged = merge_adapter(
            options.adapter,
            options.output,
            base=options.base,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
    if options.json:
        console.print_json(dataclasses.asdict(merged))
        return 0
    print(f"merged {merged.adapter} into {merged.base}: {merged.output}")
    print(f"{merged.parameters:,} parameters in {merged.dtype}, {merged.bytes / 1e6:,.1f} MB")
    if merged.untied:
        print("input and output embeddings were one matrix and are now two: the adapter changes one of them")
    print(
        f"read again and compared at {merged.positions} positions: a logit differs by at most "
        f"{merged.largest_logit_difference:.2g} (the largest is {merged.largest_logit:.2g}), "
        f"the likeliest next token is the same at {merged.same_next_token:.1%}"
    )
    return 0
