"""Numbers and texts as a reader should see them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

NOTHING = "–"
_APART = 100
# A completion may hold any character: what cannot be seen is named, and nothing turns the line around.
_CONTROLS = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"]
_DIRECTIONS = [0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_NAMES = {code: f"[U+{code:04X}]" for code in _CONTROLS + _DIRECTIONS}


def visible(text: str) -> str:
    """The text with control characters and changes of writing direction made visible, and fit for UTF-8."""
    return text.translate(_NAMES).encode("utf-8", "backslashreplace").decode("utf-8")


def number(value: Any, digits: int = 4, decimals: int | None = None) -> str:
    """`0.1234`, `12,340`, `1.2e-05`, `NaN`, `–` for nothing; a whole number in full, with a real minus sign.

    Args:
        digits: significant ones.
        decimals: as many after the point instead, for numbers under each other: see `decimals_of`.
    """
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and decimals is None:
        return f"{value:,}".replace("-", "−")
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if decimals is not None:
        return f"{value:,.{decimals}f}".replace("-", "−")
    size = abs(value)
    if value == int(value) and size < 1e6:
        text = f"{value:,.0f}"
    elif size >= 10 ** (digits - 1) and size < 1e9:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    elif 1e-4 <= size < 1e9:
        text = f"{value:.{digits}g}"
    else:
        text = f"{value:.{digits - 1}e}"
    return text.replace("-", "−")


def decimals_of(values: Iterable[float], digits: int = 4) -> int | None:
    """Decimals with which the largest of the numbers has `digits` digits, no more than any of them needs; None where
    they lie so far apart (or are all whole) that each is better written by itself.
    """
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes or max(sizes) >= 1e6 or max(sizes) / min(sizes) > _APART:
        return None
    most = max(0, digits - 1 - math.floor(math.log10(max(sizes)))) if max(sizes) >= 1 else digits
    needed = max(len(f"{size:.{most}f}".rstrip("0").partition(".")[2]) for size in sizes)
    return needed or None


def cut(text: str, most: int) -> tuple[str, int]:
    """At most `most` characters of a text, and how many were left off."""
    return (text, 0) if len(text) <= most else (text[:most], len(text) - most)
