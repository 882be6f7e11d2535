"""How far two rankings of the same answers agree (CREAM, arXiv 2410.12735)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from align.core.errors import ConfigError

Rule = Literal["kendall", "ends"]


@dataclass(frozen=True, eq=False)
class Consistency:
    """C in [0, 1] of each group: 1 the same order, 0 the opposite one, NaN where it is not defined.

    Attributes:
        each: float64 [G], in the order of the groups; a group without a value keeps its place.
        undefined: groups without a value: fewer than two answers with both rewards, or all tied.
    """

    each: np.ndarray

    @property
    def mean(self) -> float:
        """Over the groups that have a value; NaN where none has."""
        there = self.each[~np.isnan(self.each)]
        return float(there.mean()) if len(there) else math.nan

    @property
    def undefined(self) -> int:
        return int(np.isnan(self.each).sum())


def consistency(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], rule: Rule = "kendall"
) -> Consistency:
    """C of each group from its rewards under two models.

    Args:
        first, second: [G][K]; NaN is missing and leaves its answer out.
        rule: `kendall` is C = (tau-b + 1) / 2; `ends` is 1 where both name the same best and the same worst answer,
            else 0 (CREAM's `toporder`; a tie for an end is no agreement).

    Raises:
        ConfigError: the two are not of the same groups and answers.
    """
    if len(first) != len(second) or any(len(a) != len(b) for a, b in zip(first, second, strict=True)):
        raise ConfigError("rewards of two models are not of the same answers", mend="score the same groups with both")
    one = kendall_consistency if rule == "kendall" else ends_consistency
    return Consistency(
        np.array([one(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(first, second, strict=True)])
    )


def kendall_consistency(a: np.ndarray, b: np.ndarray) -> float:
    """(tau-b + 1) / 2 of two reward vectors [K]; NaN where tau is not defined."""
    return (kendall_tau(a, b) + 1) / 2


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b: (concordant - discordant) / sqrt(pairs untied in a * pairs untied in b), [K] each.

    With ordinal ranks in place of ties, as in CREAM's code, the order of the answers would decide. NaN where one of the
    two ties all answers, or fewer than two have both rewards.
    """
    there = ~(np.isnan(a) | np.isnan(b))
    a, b = a[there], b[there]
    upper = np.triu_indices(len(a), 1)
    left, right = (np.sign(x[:, None] - x[None, :])[upper] for x in (a, b))
    untied = float((left != 0).sum()) * float((right != 0).sum())
    return float((left * right).sum()) / math.sqrt(untied) if untied else math.nan


def ends_consistency(a: np.ndarray, b: np.ndarray) -> float:
    """1 where both vectors [K] have the same single best and the same single worst answer, else 0."""
    there = ~(np.isnan(a) | np.isnan(b))
    a, b = a[there], b[there]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    same = all(
        np.flatnonzero(a == end(a)).tolist() == np.flatnonzero(b == end(b)).tolist() and (a == end(a)).sum() == 1
        for end in (np.max, np.min)
    )
    return float(same)
