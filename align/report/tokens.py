"""Tokens with a number each: how they are coloured, and the table beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.report.words import number

SHADES = 4
"""`--plus-1` to `--plus-4` of the style sheet, and as many for the other sign."""
_LARGE = 0.95
_DIGITS = 3
PART_OF_A_CHARACTER = "\u25af"


def top_of(values: Iterable[float]) -> float:
    """The size at which the strongest colour begins: few tokens are larger, and one outlier leaves the rest coloured.

    0 where there is nothing but zeros.
    """
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    return sizes[math.ceil(_LARGE * len(sizes)) - 1] or sizes[-1] if sizes else 0.0


def shade(value: float, top: float) -> int:
    """-4 to 4: the sign and the size of a value; 0 for what is near zero, or is no number."""
    if not math.isfinite(value) or not top:
        return 0
    size = min(SHADES, round(abs(value) / top * SHADES))
    return size if value > 0 else -size


def shade_class(step: int) -> str:
    """The style sheet's class of a shade."""
    return f"plus-{step}" if step > 0 else f"minus-{-step}" if step < 0 else "near-0"


def signed(value: float) -> str:
    """A number with its sign, also where that is plus."""
    return ("+" if value > 0 else "") + number(value, _DIGITS)


def legend(top: float) -> dict[str, Any]:
    """The colours in a row, and the numbers at their ends."""
    return {
        "low": f"{signed(-top)} or less",
        "high": f"{signed(top)} or more",
        "shades": [shade_class(step) for step in range(-SHADES, SHADES + 1)],
    }


def answer(given: Mapping[str, Any], top: float, most: int, unit: str) -> dict[str, Any]:
    """An answer as the template reads it, of at most `most` tokens."""
    kept: Sequence[Mapping[str, Any]] = given["tokens"][:most]
    return {
        "label": given["label"],
        "total": signed(given["total"]),
        "value": given["total"],
        "unit": unit,
        "tokens": [_token(one, top) for one in kept],
        "left": given["left"] + len(given["tokens"]) - len(kept),
        "numbers": _numbers(kept, unit),
    }


def _token(one: Mapping[str, Any], top: float) -> dict[str, Any]:
    # A line break alone has no extent that could be coloured.
    text = one["text"].replace("\n", "\u21b5\n") or PART_OF_A_CHARACTER
    if "value" not in one:
        return {"text": text, "style": "", "value": ""}
    return {"text": text, "style": shade_class(shade(one["value"], top)), "value": signed(one["value"])}


def _numbers(tokens: Sequence[Mapping[str, Any]], unit: str) -> dict[str, Any]:
    rows, total = [], 0.0
    for place, one in enumerate(tokens, 1):
        if "value" not in one:
            continue
        total += one["value"]
        text = one["text"].replace("\n", "\u21b5").replace(" ", "\u2423") or PART_OF_A_CHARACTER
        rows.append([str(place), text, signed(one["value"]), signed(total)])
    return {"columns": ["place", "token", unit, "sum so far"], "rows": rows, "left": 0}
