"""Means and differences with 95 % intervals; samples of one prompt count as one cluster."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from align.core.errors import ConfigError

CONFIDENCE = 0.95
_EXACT_DF = 1000
"""Degrees of freedom up to which the t distribution is summed exactly; an expansion is good to 1e-9 beyond."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval.

    Attributes:
        value: the estimate; NaN where there is nothing to estimate from.
        low, high: the interval; NaN where one observation cannot give one.
        n: observations it is made of.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "none"
        return f"{self.value:.3g}" + ("" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]")


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def mean_interval(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean with a t interval; with clusters, one that lets values of a cluster depend on each other.

    Args:
        values: [N]; NaN is missing and left out.
        clusters: [N], what each value belongs to (its prompt). The mean is still over values, the standard error is
            that of a ratio of cluster sums to cluster sizes, with (clusters - 1) degrees of freedom.
    """
    numbers, names = _present(values, clusters)
    if not len(numbers):
        return NOTHING
    return ratio_interval(numbers, np.ones(len(numbers)), names)


def ratio_interval(
    sums: Sequence[float] | np.ndarray, sizes: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """sum(sums) / sum(sizes), both [N], with a t interval from its linearisation: KL per token, for example.

    The variance is C/(C-1) * sum over C clusters of (s_c - ratio * n_c)^2 / (sum n)^2 (Cochran, Sampling Techniques,
    chapter 6). `n` counts observations.
    """
    top, bottom = _grouped(np.asarray(sums, float), clusters), _grouped(np.asarray(sizes, float), clusters)
    count = len(top)
    total = float(bottom.sum())
    if not count or total == 0:
        return NOTHING
    value = float(top.sum()) / total
    if count == 1:
        return Estimate(value, math.nan, math.nan, len(sums))
    residuals = top - value * bottom
    error = math.sqrt(count / (count - 1) * float(residuals @ residuals)) / total
    half = student_t(count - 1) * error
    return Estimate(value, value - half, value + half, len(sums))


def paired_difference(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """The mean of after - before, both [N] in the same order, with a t interval over pairs (or clusters of them).

    A pair with a NaN on either side is left out.

    Raises:
        ConfigError: the two differ in length.
    """
    first, second = np.asarray(before, float), np.asarray(after, float)
    if first.shape != second.shape:
        raise ConfigError(f"{len(first)} values before and {len(second)} after", why="a paired difference needs pairs")
    return mean_interval(second - first, clusters)


def student_t(df: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t: P(|T| <= t) = confidence."""
    if df < 1:
        raise ConfigError(f"{df} degrees of freedom", why="an interval needs two observations")
    z = normal_quantile(confidence)
    if df > _EXACT_DF:
        return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    low, high = 0.0, z
    while _t_within(high, df) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < confidence else (low, middle)
    return (low + high) / 2


def normal_quantile(confidence: float = CONFIDENCE) -> float:
    """z with P(|Z| <= z) = confidence."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _t_within(t: float, df: int) -> float:
    """P(|T| <= t), the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0 if df == 1 else term
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _present(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None
) -> tuple[np.ndarray, list[Hashable] | None]:
    numbers = np.asarray(values, float)
    if clusters is not None and len(clusters) != len(numbers):
        raise ConfigError(f"{len(numbers)} values and {len(clusters)} clusters")
    there = ~np.isnan(numbers)
    names = None if clusters is None else [name for name, keep in zip(clusters, there, strict=True) if keep]
    return numbers[there], names


def _grouped(values: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    """Sums by cluster, in order of first appearance."""
    if clusters is None:
        return values
    place: dict[Hashable, int] = {}
    index = [place.setdefault(name, len(place)) for name in clusters]
    return np.bincount(index, weights=values, minlength=len(place)) if len(values) else values
