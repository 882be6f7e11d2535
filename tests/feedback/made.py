"""Groups of answers, and judges of a few lines that obey the protocols."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.data.groups import RowId
from align.data.rollouts import Answer, RolloutGroup
from align.feedback.base import Failed


def group(*texts: str, row: int = 0, prompt: Any = "say it", ids: Any = None, **columns: Any) -> RolloutGroup:
    ids = ids or [[5 + len(text)] for text in texts]
    answers = tuple(Answer(np.array(one, dtype=np.int64), text) for text, one in zip(texts, ids, strict=True))
    return RolloutGroup(row_id(row), prompt, np.array([1, 60, 70]), answers, columns=columns)


def row_id(number: int) -> RowId:
    return RowId("rows.jsonl", number)


class Lengths:
    """Scores an answer by its length; one that says `fail` has no score. Counts what it was asked."""

    draws = False
    log = None

    def __init__(self, draws: bool = False) -> None:
        self.asked: list[str] = []
        self.draws = draws

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "lengths"}

    def content(self, item: Any) -> Any:
        return item.content()

    def score(self, items: Any, seed: int, progress: Any = None) -> list[Any]:
        self.asked += [item.answer.text for item in items]
        return [Failed("no") if "fail" in i.answer.text else float(len(i.answer.text)) for i in items]


class Longer:
    """P(first beats second) as sigmoid of the difference of lengths, `bias` added for the first place."""

    draws = False

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias
        self.asked: list[tuple[str, str]] = []

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "longer", "bias": self.bias}

    def content(self, match: Any) -> Any:
        return match.content()

    def compare(self, matches: Any, seed: int, progress: Any = None) -> list[Any]:
        self.asked += [match.texts for match in matches]
        return [Failed("no") if "fail" in "".join(m.texts) else self.p(*m.texts) for m in matches]

    def p(self, first: str, second: str) -> float:
        return min(1.0, 1 / (1 + np.exp(len(second) - len(first))) + self.bias)
