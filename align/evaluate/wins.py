"""Win rates: how often an answer of the policy beats one of the baseline."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from align.core.errors import ConfigError
from align.evaluate.intervals import NOTHING, Estimate, mean_interval, normal_quantile, student_t

_RARE = 5.0
"""Wins or losses below which the spread of residuals says too little, and the model's own variance is taken."""


def win_rate(wins: int, losses: int, ties: int = 0) -> Estimate:
    """(wins + ties / 2) / all, with a Wilson interval.

    A comparison scores 1, 1/2 or 0. With tie share t the variance of a score of mean p is p (1 - p) - t / 4, so the
    interval holds all p with (estimate - p)^2 <= z^2 (p (1 - p) - t / 4) / n: Wilson's, and exactly his without ties.
    t is estimated with z^2 further comparisons that are no ties, or else a few ties would claim certainty.

    Raises:
        ConfigError: a count is negative.
    """
    if min(wins, losses, ties) < 0:
        raise ConfigError(f"{wins} wins, {losses} losses, {ties} ties", why="counts are not negative")
    n = wins + losses + ties
    return _wilson((wins + ties / 2) / n, ties, n, n, normal_quantile()) if n else NOTHING


def win_rate_of(scores: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of scores in [0, 1] (1 a win, 1/2 a tie, 0 a loss), [N]; NaN is missing.

    Comparisons of one cluster (a prompt) may depend on each other: the interval is then that of `win_rate` with the
    number of independent comparisons that would have the same standard error, and with t in place of z.
    """
    numbers = np.asarray(scores, float)
    there = ~np.isnan(numbers)
    if not there.any():
        return NOTHING
    ties = float((numbers[there] == 0.5).sum())
    n = int(there.sum())
    mean = float(numbers[there].mean())
    names = list(range(n)) if clusters is None else [c for c, keep in zip(clusters, there, strict=True) if keep]
    count = len(set(names))
    if count == n:
        return _wilson(mean, ties, n, n, normal_quantile())
    if count == 1:
        return Estimate(mean, math.nan, math.nan, n)
    clustered = mean_interval(numbers[there], names)
    quantile = student_t(count - 1)
    variance = ((clustered.high - clustered.low) / 2 / quantile) ** 2
    own = float(numbers[there].var())
    effective = min(float(n), own / variance) if variance > 1e-15 and own > 0 else float(count)
    return _wilson(mean, ties * effective / n, effective, n, quantile)


def length_controlled_win_rate(
    scores: Sequence[float] | np.ndarray,
    lengths: Sequence[float] | np.ndarray,
    baseline_lengths: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """The win rate that a logistic model predicts for answers of equal length.

    logit P(win) = a + b * tanh(d / s), with d the difference of the two lengths and s its root mean square; the
    result is sigmoid(a). The idea is AlpacaEval 2's (arXiv 2404.04475); this is our smaller model of it, without
    terms for instructions, and its numbers are not comparable with that leaderboard's. Ties count half.
    One further tie at equal length keeps the fit finite where every comparison is won. The interval is made on the
    logit from a covariance that is robust to clusters; with fewer than 5 wins or losses from the larger of that and
    the model's own.

    Args:
        scores: [N], 1 a win, 1/2 a tie, 0 a loss; NaN is missing.
        lengths, baseline_lengths: [N], tokens or characters of the two answers.
        clusters: [N], prompts.
    """
    wins = np.asarray(scores, float)
    gap = np.asarray(lengths, float) - np.asarray(baseline_lengths, float)
    if not wins.shape == gap.shape:
        raise ConfigError(f"{len(wins)} scores and {len(gap)} lengths")
    there = ~np.isnan(wins)
    wins, gap = wins[there], gap[there]
    n = len(wins)
    names = list(range(n)) if clusters is None else [c for c, keep in zip(clusters, there, strict=True) if keep]
    count = len(set(names))
    if count < 2:
        return NOTHING
    scale = math.sqrt(float(np.mean(gap**2)))
    shape = np.tanh(gap / scale) if scale > 0 else gap
    design = np.stack([np.ones(n), shape], 1) if np.ptp(shape) > 0 else np.ones((n, 1))
    fit = _logistic(design, wins)
    robust = _cluster_covariance(fit, design, wins, names)[0, 0] * count / (count - 1)
    own = np.linalg.inv(fit.information)[0, 0]
    variance = max(robust, own) if min(wins.sum(), n - wins.sum()) < _RARE else robust
    half = student_t(count - 1) * math.sqrt(max(0.0, float(variance)))
    centre = float(fit.weights[0])
    low, value, high = (_sigmoid(centre + side) for side in (-half, 0.0, half))
    return Estimate(value, low, high, n)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Weights [D] and the information matrix [D, D] at them."""

    weights: np.ndarray
    information: np.ndarray


def _logistic(design: np.ndarray, wins: np.ndarray) -> _Fit:
    """Newton's method on the quasi-likelihood of scores in [0, 1], with one more tie at length difference 0."""
    width = design.shape[1]
    tie = np.eye(1, width)
    rows, targets = np.concatenate([design, tie]), np.append(wins, 0.5)
    # A direction that the data leave open (all wins on one side of the length) gets a faint pull to 0.
    ridge = np.diag([0.0] + [1e-2] * (width - 1))
    weights = np.zeros(width)
    information = np.eye(width)
    for _ in range(100):
        fitted = _sigmoids(rows @ weights)
        information = rows.T @ (rows * (fitted * (1 - fitted))[:, None]) + ridge
        step = np.linalg.solve(information, rows.T @ (targets - fitted) - ridge @ weights)
        step *= min(1.0, 3.0 / max(float(np.abs(step).max()), 1e-12))
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    return _Fit(weights, information)


def _cluster_covariance(fit: _Fit, design: np.ndarray, wins: np.ndarray, names: Sequence[Hashable]) -> np.ndarray:
    """The sandwich: inverse information, outer products of cluster scores, inverse information."""
    slopes = design * (wins - _sigmoids(design @ fit.weights))[:, None]
    place: dict[Hashable, int] = {}
    index = np.array([place.setdefault(name, len(place)) for name in names])
    sums = np.zeros((len(place), design.shape[1]))
    np.add.at(sums, index, slopes)
    inverse = np.linalg.inv(fit.information)
    return inverse @ (sums.T @ sums) @ inverse


def _wilson(mean: float, ties: float, effective: float, n: int, z: float) -> Estimate:
    """The interval of `win_rate` for `effective` comparisons, of which `ties` are ties."""
    spread = z * z / effective
    share = ties / (effective + z * z)
    centre = (2 * mean + spread) / (2 * (1 + spread))
    inside = (2 * mean + spread) ** 2 - 4 * (1 + spread) * (mean * mean + spread * share / 4)
    half = math.sqrt(max(0.0, inside)) / (2 * (1 + spread))
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), n)


def _sigmoids(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(values / 2))


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
