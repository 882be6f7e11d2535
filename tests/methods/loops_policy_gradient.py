"""Policy gradients on rollouts, as plain loops over Python numbers: see `loops.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tests.methods.loops import Row, State, Values, scored, total

CEILING = 20.0
"""Where a log-ratio stops."""


def answers(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """All completions with their weight, that of their group included."""
    return [(row.get("weight", 1.0) * one.get("weight", 1.0), one) for row in rows for one in row["completions"]]


def raised(exponent: float) -> float:
    return math.exp(min(exponent, CEILING))


def differences(one: Row, first: str, second: str) -> list[float]:
    return [a - b for a, b in zip(scored(one, first), scored(one, second), strict=True)]


def surrogate(rho: float, advantage: float, low: float, high: float, delta: float | None = None) -> float:
    free = rho if delta is None else min(rho, delta)
    held = 1 - low if rho < 1 - low else 1 + high if rho > 1 + high else rho
    return min(free * advantage, held * advantage)


def kl_of(one: Row, estimator: str) -> list[float]:
    values = []
    for h, moved in zip(differences(one, "logp", "ref_logp"), differences(one, "logp", "old_logp"), strict=True):
        k3 = raised(-h) + h - 1
        values.append({"k1": h, "k2": h * h / 2, "k3": k3, "k3_ratio": raised(moved) * k3}[estimator])
    return values


def weights_of(one: Row, correction: str, cap: float) -> list[float]:
    gaps = differences(one, "old_logp", "sampler_logp") if correction != "off" else [0.0] * len(scored(one))
    if correction.startswith("sequence"):
        gaps = [math.fsum(gaps)] * len(gaps)
    ratios = [raised(gap) for gap in gaps]
    if correction.endswith("mask"):
        return [w if w <= cap else 0.0 for w in ratios]
    return [min(w, cap) if correction.endswith("truncate") else w for w in ratios]


def averaged(tokens: Sequence[Sequence[float]], how: str, longest: int) -> Values:
    """Values of the tokens of each answer in the unit of an aggregation, and the divisor of their sum."""
    if how == "tok":
        return [x for own in tokens for x in own], sum(map(len, tokens))
    divisors = [{"seq": len(own), "sum": 1, "const": longest}[how] for own in tokens]
    return [math.fsum(own) / n for own, n in zip(tokens, divisors, strict=True)], len(tokens)


def grpo(
    rows: Sequence[Row],
    state: State,
    num_generations: int = 8,
    beta: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    aggregation: str = "seq",
    max_completion_length: int = 1024,
    importance_level: str = "token",
    kl_estimator: str = "k3",
    scale: str = "group",
    ddof: int = 1,
    std_eps: float = 1e-4,
    dynamic_sampling: bool = False,
    mask_truncated: bool = False,
    overlong_cache: int = 0,
    sampler_correction: str = "off",
    sampler_cap: float = 3.0,
) -> Mapping[str, Values]:
    high = epsilon if epsilon_high is None else epsilon_high
    policy, kl = [], []
    for weight, one in answers(rows):
        logs = differences(one, "logp", "old_logp")
        if importance_level == "sequence":
            logs = [math.fsum(logs) / len(logs)] * len(logs)
        gains = [
            w * surrogate(raised(x), a, epsilon, high, delta)
            for x, a, w in zip(
                logs, scored(one, "advantage"), weights_of(one, sampler_correction, sampler_cap), strict=True
            )
        ]
        policy.append([-weight * gain for gain in gains])
        kl.append([beta * weight * k for k in kl_of(one, kl_estimator)] if beta else [])
    found = {"policy": averaged(policy, aggregation, max_completion_length)}
    return found | ({"kl": averaged(kl, aggregation, max_completion_length)} if beta else {})


def rloo(
    rows: Sequence[Row],
    state: State,
    num_generations: int = 4,
    beta: float = 0.03,
    ratio: str = "sequence",
    epsilon: float = 0.2,
    missing_eos_penalty: float = 0.0,
    reward_clip: float | None = None,
    kl_target: float | None = None,
    kl_horizon: int = 10000,
) -> Mapping[str, Values]:
    values = []
    for weight, one in answers(rows):
        given = scored(one, "advantage")
        advantage = math.fsum(given) / len(given)
        if ratio == "none":
            values.append(-weight * advantage * total(one))
        else:
            values.append(-weight * surrogate(raised(total(one) - total(one, "old_logp")), advantage, epsilon, epsilon))
    return {"policy": (values, len(values))}


def reinforce_pp(
    rows: Sequence[Row],
    state: State,
    num_generations: int = 1,
    beta: float = 0.01,
    gamma: float = 1.0,
    epsilon: float = 0.2,
    whiten_ddof: int = 0,
    no_std_norm: bool = False,
    missing_eos_penalty: float = 0.0,
    reward_clip: float | None = None,
    kl_target: float | None = None,
    kl_horizon: int = 10000,
    sampler_correction: str = "off",
    sampler_cap: float = 3.0,
) -> Mapping[str, Values]:
    return grpo(
        rows,
        state,
        beta=0.0,
        epsilon=epsilon,
        aggregation="tok",
        sampler_correction=sampler_correction,
        sampler_cap=sampler_cap,
    )


DAPO: dict[str, Any] = {
    "num_generations": 16,
    "beta": 0.0,
    "epsilon_high": 0.28,
    "aggregation": "tok",
    "max_completion_length": 20480,
    "dynamic_sampling": True,
    "overlong_cache": 4096,
}

LOOPS: dict[str, Callable[..., Any]] = {
    "grpo": grpo,
    "dr_grpo": partial(grpo, beta=0.0, aggregation="const", scale="none"),
    "dapo": partial(grpo, **DAPO),
    "gspo": partial(grpo, beta=0.0, epsilon=3e-4, epsilon_high=4e-4, importance_level="sequence"),
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": partial(reinforce_pp, num_generations=8),
}

STOPS: set[str] = set()
