"""Quantiles, and shares and means with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_Z = 1.959964
_LEVELS = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """`count`, `mean`, `min`, `p5`, `p25`, `p50`, `p75`, `p95`, `p99`, `max`; empty for no values."""
    if not len(values):
        return {}
    array = np.asarray(values, dtype=np.float64)
    found = {"count": len(array), "mean": round(float(array.mean()), 3), "min": float(array.min())}
    found |= {name: round(float(np.quantile(array, level)), 3) for name, level in _LEVELS.items()}
    return {**found, "max": float(array.max())}


def histogram(values: Sequence[float], bins: int = 20) -> dict[str, list[float]]:
    """`edges` [n + 1] and `counts` [n] of bins of whole width; what lies above the 99th percentile is in the last."""
    if not len(values):
        return {}
    array = np.asarray(values, dtype=np.float64)
    width = max(1, math.ceil((float(np.quantile(array, 0.99)) + 1) / bins))
    counts = np.bincount(np.minimum(array // width, bins - 1).astype(np.int64), minlength=bins)
    return {"edges": [float(width * place) for place in range(bins + 1)], "counts": [int(count) for count in counts]}


def share(count: int, of: int) -> dict[str, Any]:
    """`count`, `of`, `share`, and the Wilson score interval `low`, `high` (share None where `of` is 0)."""
    if of == 0:
        return {"count": count, "of": 0, "share": None, "low": None, "high": None}
    part, squared = count / of, _Z**2
    middle = (part + squared / (2 * of)) / (1 + squared / of)
    half = _Z * math.sqrt(part * (1 - part) / of + squared / (4 * of**2)) / (1 + squared / of)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"count": count, "of": of, "share": part, "low": round(low, 5), "high": round(high, 5)}


def mean(values: Sequence[float]) -> dict[str, float | None]:
    """`mean` and its normal interval `low`, `high`; no interval for fewer than two values."""
    if not len(values):
        return {"mean": None, "low": None, "high": None}
    array = np.asarray(values, dtype=np.float64)
    middle = float(array.mean())
    if len(array) < 2:
        return {"mean": round(middle, 3), "low": None, "high": None}
    half = _Z * float(array.std(ddof=1)) / math.sqrt(len(array))
    return {"mean": round(middle, 3), "low": round(middle - half, 3), "high": round(middle + half, 3)}


def evenly(total: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 0..total-1, evenly spaced, in order; all of them where they fit."""
    if wanted >= total:
        return list(range(total))
    return [place * total // wanted for place in range(wanted)]
