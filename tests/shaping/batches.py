"""Batches of rollouts for tests of shaping, and each stage once more as plain loops over Python numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.shaping import Batch

NAN = math.nan


def batch(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[int] | None = None,
    *,
    finished: Sequence[bool] | None = None,
    log_ratio: Sequence[Sequence[float]] | None = None,
    masks: Sequence[Sequence[bool]] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Batch:
    """Groups of rewards; `lengths`, and the rest, by completion. Three tokens each unless it is said otherwise."""
    flat = [r for own in rewards for r in own]
    lengths = list(lengths or [3] * len(flat))
    width = max(lengths, default=0)
    scored = [list(own) for own in masks] if masks else [[True] * n for n in lengths]
    mask = np.array([own + [False] * (width - len(own)) for own in scored], dtype=bool).reshape(len(flat), width)
    ratios = None
    if log_ratio is not None:
        ratios = np.array([[*own, *[0.0] * (width - len(own))] for own in log_ratio], dtype=np.float64)
    return Batch(
        group=np.array([g for g, own in enumerate(rewards) for _ in own], dtype=np.int64),
        reward=np.array(flat, dtype=np.float64),
        length=mask.sum(1).astype(np.int64),
        finished=np.array(finished if finished is not None else [True] * len(flat), dtype=bool),
        mask=mask,
        advantage=np.zeros(mask.shape),
        train=np.ones(len(flat), dtype=bool),
        log_ratio=ratios,
        state={name: np.array(value) for name, value in (state or {}).items()},
    )


def random_batch(seed: int, missing: float = 0.2) -> Batch:
    """Ragged groups of 2 to 5, of 1 to 6 tokens of which some are unscored; some rewards missing, some answers cut."""
    rng = random.Random(seed)
    rewards = [
        [NAN if rng.random() < missing else rng.gauss(0.5, 2.0) for _ in range(rng.randint(2, 5))] for _ in range(6)
    ]
    count = sum(map(len, rewards))
    lengths = [rng.randint(1, 6) for _ in range(count)]
    masks = [[rng.random() < 0.7 for _ in range(n - 1)] + [True] for n in lengths]
    ratios = [[rng.gauss(0.1, 0.4) if keep else 9.0 for keep in own] for own in masks]
    finished = [rng.random() < 0.7 for _ in range(count)]
    return batch(rewards, lengths, finished=finished, log_ratio=ratios, masks=masks)


def members(made: Batch) -> list[list[int]]:
    """Of each group the completions whose reward is there."""
    return [
        [i for i in np.flatnonzero(made.group == g).tolist() if not math.isnan(made.reward[i])]
        for g in range(made.groups)
    ]


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def variance(numbers: Sequence[float], ddof: int) -> float:
    centre = mean(numbers)
    return math.fsum((x - centre) ** 2 for x in numbers) / max(len(numbers) - ddof, 1)


def advantages(made: Batch, of: Any) -> np.ndarray:
    """[N] of `of` (rewards of the group, place in it); 0 where there is no reward."""
    found = np.zeros(len(made.reward))
    for own in members(made):
        for place, i in enumerate(own):
            found[i] = of([float(made.reward[j]) for j in own], place)
    return found


def centred(rewards: Sequence[float], place: int) -> float:
    return rewards[place] - mean(rewards)


def normalised(made: Batch, scale: str, ddof: int, eps: float) -> np.ndarray:
    everything = [float(r) for r in made.reward if not math.isnan(r)]

    def one(rewards: Sequence[float], place: int) -> float:
        divisor = {
            "group": lambda: math.sqrt(variance(rewards, ddof)) + eps,
            "batch": lambda: math.sqrt(variance(everything, ddof)) + eps,
            "none": lambda: 1.0,
        }[scale]()
        return centred(rewards, place) / divisor

    return advantages(made, one)


def left_out(rewards: Sequence[float], place: int) -> float:
    others = [r for j, r in enumerate(rewards) if j != place]
    return rewards[place] - mean(others) if others else 0.0


def returns(made: Batch, beta: float, gamma: float) -> np.ndarray:
    """[N, T], each token's return as a sum over the scored tokens from it on."""
    found = np.zeros(made.mask.shape)
    assert made.log_ratio is not None
    for i, reward in enumerate(made.reward.tolist()):
        if math.isnan(reward):
            continue
        places = np.flatnonzero(made.mask[i]).tolist()
        earned = [-beta * made.log_ratio[i, t] + (reward if t == places[-1] else 0.0) for t in places]
        for number, t in enumerate(places):
            found[i, t] = math.fsum(gamma**k * r for k, r in enumerate(earned[number:]))
    return found


def whitened(made: Batch, ddof: int, eps: float) -> np.ndarray:
    scored = made.mask & ~np.isnan(made.reward)[:, None]
    tokens = made.advantage[scored].tolist()
    centre, spread = mean(tokens), math.sqrt(variance(tokens, ddof) + eps)
    return np.where(scored, (made.advantage - centre) / spread, 0.0)
