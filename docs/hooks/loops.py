"""The table of loops, made from their presets."""

from __future__ import annotations

from typing import Any

from align.core.registry import LOOPS
from docs.hooks.text import code, escape, table

_OUTSIDE = {"reward": "rewards", "preference": "comparisons", "none": "nobody"}


def table_of_presets() -> str:
    """One line a loop: what it is, and what its preset says."""
    rows = []
    for entry in LOOPS.entries().values():
        preset = LOOPS.get(entry.id)
        who = "the policy itself" if preset.feedback else _OUTSIDE[preset.wants]
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else ""
        drawn = f"{preset.sample['n']} at {preset.sample['temperature']:g}"
        loop = preset.loop
        reference = loop.get("reference", "you choose" if "reference" in preset.asks else "none")
        cells = [code(entry.id), paper, drawn, who, code(preset.pairs["rule"]), code(preset.method["name"])]
        rows.append([*cells, reference, _earlier(loop.get("earlier")), escape(entry.summary)])
    columns = ["loop", "paper", "samples", "judged by", "rule", "method", "reference", "earlier pairs", ""]
    return table(columns, rows)


def _earlier(shares: Any) -> str:
    return "" if not shares else ", ".join(f"{share:.0%}" for share in shares)
