"""What is known of a public data set, and the small helpers with which its rows become plain columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from align.data.rows import Row, RowError
from align.data.splits import Purpose

Checked = Literal["card", "code", "memory"]


@dataclass(frozen=True)
class Choices:
    """What the user chose where a data set leaves a choice.

    Attributes:
        axis: one of `Known.axes`, or "".
        transcripts: HH transcripts stay plain text, or become messages.
        purpose: whether the rows are trained on or evaluated on.
        chat: plain prompts become a user turn.
    """

    axis: str = ""
    transcripts: Literal["text", "messages"] = "text"
    purpose: Purpose = "train"
    chat: bool = False


Shape = Callable[[Row, Choices], Row]
"""A row of the data set -> a row of plain columns (`prompt`, `chosen`, `rejected`, `margin`, `tie`, `completions`,
`scores`, `ranks`, `completion`, `label`, `system`, `annotator`, `meta`). Raises `RowError`."""


@dataclass(frozen=True)
class Known:
    """One schema of one or several public data sets.

    Attributes:
        name: the word for `format:` in a recipe.
        hub: ids on the hub.
        columns: columns that must all be there.
        shape: see `Shape`.
        direction: how a row tells the better answer, in words.
        unmistakable: rows of any origin with these columns are read so.
        fits: a look at the values of a row, where columns alone are not unmistakable.
        train, eval: names of the splits, tried in order, before the usual ones.
        axes, axis: what the answers may be compared by; without a default it must be stated.
        axis_columns: axis -> a column that it needs besides `columns`.
        chat: plain prompts are what a user says to an assistant (else they are text to be continued).
        filters: what the authors or the card advise to keep; applied only as `filters: recommended`.
        rows_per_prompt: neighbouring rows that make one.
        refused: purpose -> why such use is refused.
        warnings: hub id -> what to know before using it.
        trap: what goes wrong when it is read naively, and what is done about it.
        checked: by what the columns were checked.
    """

    name: str
    hub: tuple[str, ...]
    columns: frozenset[str]
    shape: Shape
    direction: str
    unmistakable: bool = True
    fits: Callable[[Row], bool] | None = None
    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    axis: str = ""
    axis_columns: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False
    filters: Mapping[str, Any] = field(default_factory=dict)
    rows_per_prompt: int = 1
    refused: Mapping[str, str] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    trap: str = ""
    checked: Checked = "memory"

    def matches(self, row: Row) -> bool:
        """Whether a row has the columns, and values of their kind."""
        return self.columns <= row.keys() and (self.fits is None or self.fits(row))


@dataclass(frozen=True)
class Named:
    """The winner by the name of its column; `scores` of both give the margin.

    Equal scores are a tie. A winner scored below the loser contradicts itself, and is dropped and counted. Where both
    answers are whole conversations, the prompt is what they share, and its column is not read.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None
    scores: tuple[str, str] | None = None

    def __call__(self, row: Row, choices: Choices) -> Row:
        made: Row = {"chosen": row.get(self.chosen), "rejected": row.get(self.rejected)}
        for part, column in (("prompt", self.prompt), ("system", self.system)):
            if column is not None and column in row:
                made[part] = row[column]
        return made | (gap(row, *self.scores) if self.scores else {})


def gap(row: Row, better: str, worse: str) -> Row:
    """`margin` and `tie` from the scores of the winner and the loser; nothing where one is missing."""
    if row.get(better) is None or row.get(worse) is None:
        return {}
    difference = number(row, better) - number(row, worse)
    if difference < 0:
        raise RowError(better, f"lower than `{worse}`: the scores contradict which answer won", dropped=True)
    return {"margin": difference, "tie": difference == 0}


def ordered(answers: Sequence[Any], winner: int | None) -> Row:
    """`chosen`, `rejected` and `tie` of two answers; `winner` is 0, 1, or None for a tie."""
    place = winner or 0
    return {"chosen": answers[place], "rejected": answers[1 - place], "tie": winner is None}


def by_strength(row: Row, first: str, second: str, column: str) -> Row:
    """Negative: the first is better; the absolute value is the margin; 0 is a tie."""
    strength = number(row, column)
    winner = None if strength == 0 else int(strength > 0)
    return {**ordered((need(row, first), need(row, second)), winner), "margin": abs(strength)}


def need(row: Row, column: str) -> Any:
    if row.get(column) is None:
        raise RowError(column, "missing")
    return row[column]


def text(row: Row, column: str) -> str:
    value = need(row, column)
    if not isinstance(value, str):
        raise RowError(column, f"not text but {type(value).__name__}")
    return value


def number(row: Row, column: str) -> float:
    value = need(row, column)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(column, f"not a number but {type(value).__name__}")
    if not math.isfinite(value):
        raise RowError(column, "not a finite number")
    return float(value)


def index(row: Row, column: str) -> int:
    """0 or 1."""
    value = number(row, column)
    if value not in (0, 1):
        raise RowError(column, f"neither 0 nor 1 but {value:g}")
    return int(value)


def items(value: Any, column: str) -> list[Any]:
    """A list, also where it is written as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(column, "not valid JSON") from None
    if not isinstance(value, (list, tuple)):
        raise RowError(column, "missing" if value is None else f"not a list but {type(value).__name__}")
    return list(value)


def records(value: Any, column: str) -> list[Row]:
    """Objects of a list; `datasets` may give a list of objects as an object of lists."""
    if isinstance(value, Mapping):
        lengths = {len(one) for one in value.values() if isinstance(one, (list, tuple))}
        if len(lengths) != 1:
            raise RowError(column, "not a list of objects")
        return [{key: one[place] for key, one in value.items()} for place in range(lengths.pop())]
    found = items(value, column)
    if not all(isinstance(one, Mapping) for one in found):
        raise RowError(column, "not a list of objects")
    return [dict(one) for one in found]
