"""How much the answers of a batch differ: within themselves, from each other, and in their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from align.data.rollouts import Answer, RolloutGroup
from align.trainers.rollouts import reward_of


def repeated_share(groups: Sequence[RolloutGroup], n: int = 4) -> float:
    """Mean over answers of 1 - (distinct n-grams) / (n-grams): 0 where no n tokens come twice in a row, near 1 in a
    loop. Answers of fewer than n tokens have none and are left out; NaN where all are so."""
    shares = [
        1 - len(set(grams)) / len(grams) for group in groups for one in group.answers if (grams := _grams(one, n))
    ]
    return float(np.mean(shares)) if shares else float("nan")


def distinct_share(groups: Sequence[RolloutGroup], n: int = 2) -> float:
    """Mean over prompts of (distinct n-grams) / (n-grams) of all their answers (distinct-n, arXiv 1510.03055): 1 / K
    where K answers are one and the same. NaN where no answer has n tokens."""
    shares = []
    for group in groups:
        grams = [gram for one in group.answers for gram in _grams(one, n)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else float("nan")


def no_spread_share(groups: Sequence[RolloutGroup], weights: Mapping[str, float] | None = None) -> float:
    """The share of prompts all of whose answers have the same reward, of those with two rewards or more; with pairwise
    feedback, all of whose win rates are the same. NaN where no prompt has two."""
    flat = []
    for group in groups:
        rewards = reward_of(group, weights)
        there = rewards[~np.isnan(rewards)]
        if len(there) > 1:
            flat.append(bool(np.ptp(there) <= 1e-9 * max(1.0, float(np.abs(there).max()))))
    return float(np.mean(flat)) if flat else float("nan")


def _grams(answer: Answer, n: int) -> list[tuple[int, ...]]:
    ids = answer.ids.tolist()
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
