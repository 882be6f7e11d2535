"""What a page is made of: plain dataclasses of text and numbers, so that a section can be kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | int | float | None | Sequence[float]
"""Text, a number, nothing, or a number with its interval: `(value, low, high)`."""
Point = Sequence[float]
"""`(x, y)`, or `(x, y, low, high)` with an interval on y."""
Token = Mapping[str, Any]
"""`{"text": str, "scored": bool}`."""


@dataclass(frozen=True)
class Verdict:
    """The sentence that a reader in a hurry takes away.

    Args:
        good: whether it is good news; None where it is neither, or not known.
    """

    text: str
    good: bool | None = None
    title: str = "Verdict"


@dataclass(frozen=True)
class Text:
    """Prose. Paragraphs are apart by an empty line."""

    title: str
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; the first column names the row. Numbers are shown with four digits."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Lines over a common x. What is not finite is left out, and said."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """Counts between edges: `len(edges) == len(counts) + 1`."""

    title: str
    x_label: str
    y_label: str
    edges: Sequence[float]
    counts: Sequence[float]
    note: str = ""


@dataclass(frozen=True)
class Samples:
    """Prompts with the answers of several models.

    Args:
        samples: `{"prompt": str, "answers": {label: text}, "scores": {label: number}}`, `scores` optional.
    """

    title: str
    samples: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True)
class Tokens:
    """Texts as the model reads them, each token marked as scored or not.

    Args:
        texts: (label, tokens).
    """

    title: str
    texts: Sequence[tuple[str, Sequence[Token]]]
    note: str = ""


@dataclass(frozen=True)
class TokenValues:
    """Answers whose tokens are coloured by a number of each, of either sign; the numbers stand in a table too.

    Args:
        rows: `{"row", "prompt", "answers": [{"label", "total", "scored", "tokens": [{"text", "value"}], "left"}]}`, as
            `align.scoring.token_view.told` gives them; a token without `value` is not coloured.
        unit: what the number is: `nats`.
    """

    title: str
    rows: Sequence[Mapping[str, Any]]
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Text shown as it is, in a fixed width. `language` is its name for the reader: `yaml`."""

    title: str
    text: str
    language: str = "text"


Part = Verdict | Text | Table | Curve | Histogram | Samples | Tokens | TokenValues | Code


@dataclass(frozen=True)
class DataReport:
    """The numbers of a data report (`align data --json`), in whatever depth it has them."""

    report: Mapping[str, Any]
    title: str = "Data"


@dataclass(frozen=True)
class Section:
    """Parts under one heading, which the navigation names.

    Args:
        folded: closed until the reader opens it.
    """

    title: str
    parts: Sequence[Part]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """A whole page; a part that stands alone is a section of its own."""

    title: str
    sections: Sequence[Section | DataReport | Part]
    subtitle: str = ""
