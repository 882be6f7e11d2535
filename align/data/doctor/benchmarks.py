"""Rows that say of themselves that they come from an evaluation set. Nothing is fetched."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from align.data.groups import RowId
from align.data.rows import Row

ORIGIN_COLUMNS = ("source", "dataset", "origin", "subset")
KNOWN = {
    "TruthfulQA": ("truthfulqa",),
    "MMLU": ("mmlu",),
    "HumanEval": ("humaneval", "heppython", "hepjs", "hepcpp", "hepgo", "hepjava", "heprust"),
    "MBPP": ("mbpp",),
    "AlpacaEval": ("alpacaeval",),
    "MT-Bench": ("mtbench",),
    "Arena-Hard": ("arenahard",),
    "RewardBench": ("rewardbench", "llmbar"),
    "XSTest": ("xstest",),
    "Do-Not-Answer": ("donotanswer",),
    "HellaSwag": ("hellaswag",),
    "WinoGrande": ("winogrande",),
    "ARC": ("arcchallenge", "arceasy", "ai2arc"),
    "IFEval": ("ifeval",),
    "BIG-Bench Hard": ("bigbenchhard",),
    "GPQA": ("gpqa",),
}
"""Benchmark -> what a name of an origin holds, letters and digits alone."""
_FLAGS = {"in_gsm8k_train": "GSM8K (its train split)"}
_TOP, _EXAMPLES, _CACHED = 20, 3, 10_000
_PLAIN = re.compile(r"[^a-z0-9]")


class Benchmarks:
    """Counts rows by what their columns `source`, `dataset`, `origin` or `subset` say."""

    def __init__(self) -> None:
        self.origins: Counter[str] = Counter()
        self.found: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], list[str]] = {}
        self._known: dict[str, str] = {}

    def row(self, value: Row, row_id: RowId) -> None:
        for column in ORIGIN_COLUMNS:
            given = value.get(column)
            for name in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(name, str) and name:
                    self.origins[name[:80]] += 1
                    self._count(self._benchmark(name[:80]), f"column `{column}`", row_id)
        for column, benchmark in _FLAGS.items():
            if value.get(column) is True:
                self._count(benchmark, f"column `{column}`", row_id)

    def _count(self, benchmark: str, how: str, row_id: RowId) -> None:
        if not benchmark:
            return
        self.found[benchmark, how] += 1
        examples = self.examples.setdefault((benchmark, how), [])
        if len(examples) < _EXAMPLES:
            examples.append(str(row_id))

    def _benchmark(self, name: str) -> str:
        if name not in self._known:
            plain = _PLAIN.sub("", name.lower())
            found = next((known for known, marks in KNOWN.items() if any(mark in plain for mark in marks)), "")
            if len(self._known) >= _CACHED:
                return found
            self._known[name] = found
        return self._known[name]

    def report(self, read: int) -> dict[str, Any]:
        """`origins` (the commonest) and `named`: benchmarks that the rows name."""
        return {
            "origins": dict(self.origins.most_common(_TOP)),
            "named": [
                {
                    "name": name,
                    "how": how,
                    "count": count,
                    "share": count / read if read else 0.0,
                    "rows": self.examples[name, how],
                }
                for (name, how), count in self.found.most_common()
            ],
        }
