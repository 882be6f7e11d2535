"""What policy gradients on rollouts share: ratios, the clipped surrogate, KL estimators, averages, sampler weights.

A ratio compares the policy with the one that the update started from (`old_logp`); the sampler's own numbers
(`sampler_logp`) enter only through a weight. The advantage is a column that shaping made of the rewards.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from align.methods.base import Stage, Term, Unit
from align.methods.stages import capped_exp
from align.scoring.views import Completions, wide

Aggregation = Literal["seq", "tok", "sum", "const"]
Estimator = Literal["k1", "k2", "k3", "k3_ratio"]
Level = Literal["token", "sequence"]
Correction = Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

CAP = 20.0
"""Log-ratios above it count as this one and have no gradient; e^20 squared still fits into float32."""


def scored(completions: Completions, values: Tensor) -> Tensor:
    """`values` [N, T] at scored tokens, 0 elsewhere."""
    return torch.where(completions.mask, values, 0.0)


def log_ratio(completions: Completions) -> Tensor:
    """log pi - log pi_old of each scored token, [N, T]."""
    return scored(completions, wide(completions.logp) - wide(completions.old_logp))


def ratio(completions: Completions, level: Level) -> Tensor:
    """pi / pi_old of each token [N, T], or its geometric mean over an answer's tokens [N, 1] (GSPO)."""
    logs = log_ratio(completions)
    if level == "sequence":
        logs = logs.sum(-1, keepdim=True) / completions.length[:, None].clamp(min=1)
    return capped_exp(logs, CAP)


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """min(min(rho, delta) A, clip(rho, 1 - low, 1 + high) A), elementwise; PPO's objective, to be raised.

    No gradient where A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low. `delta` bounds what a rare token of a bad
    answer can do, rho of A < 0 being unbounded otherwise; it is the dual clip of constant delta.
    """
    free = ratio if delta is None else ratio.clamp(max=delta)
    return torch.minimum(free * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def clip_shares(
    ratio: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float
) -> dict[str, tuple[Tensor, float]]:
    """Metrics under TRL's names: the tokens (or answers) without a gradient for clipping, and of how many."""
    below = (ratio < 1 - low) & (advantage < 0) & mask
    above = (ratio > 1 + high) & (advantage > 0) & mask
    count = float(mask.sum())
    return {
        "clip_ratio/low_mean": (below.sum(), count),
        "clip_ratio/high_mean": (above.sum(), count),
        "clip_ratio/region_mean": ((below | above).sum(), count),
    }


def kl(completions: Completions, estimator: Estimator) -> Tensor:
    """An estimate of KL(pi || pi_ref) at each scored token, [N, T], with d = log pi_ref - log pi.

        k1 = -d,   k2 = d^2 / 2,   k3 = e^d - d - 1,   k3_ratio = rho k3

    On samples of the policy itself the expected *gradient* of k1 is 0, of k2 that of KL(pi || pi_ref), of k3 that of
    KL(pi_ref || pi), of k3_ratio that of KL(pi || pi_ref). Values of k1 and k3 are unbiased, of k2 not.
    """
    d = scored(completions, -completions.log_ratio)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    k3 = capped_exp(d, CAP) - d - 1
    return k3 if estimator == "k3" else ratio(completions, "token") * k3


def aggregate(completions: Completions, values: Tensor, how: Aggregation, longest: int, scale: float = 1.0) -> Term:
    """Values of tokens [N, T] (0 where unscored) as a term, whose unit divides by the counts of the global batch.

    tok:    sum_i sum_t / sum_i |y_i|             unit `token`, [N, T]
    seq:    mean_i (1/|y_i|) sum_t                unit `completion`, [N]
    sum:    mean_i sum_t                          unit `completion`, [N]
    const:  mean_i (1/longest) sum_t              unit `completion`, [N]
    """
    if how == "tok":
        return Term(values, Unit("token", completions.mask), scale)
    total = completions.sum(values)
    if how == "seq":
        total = total / completions.length.clamp(min=1)
    return Term(total / longest if how == "const" else total, "completion", scale)


def sampler_weight(completions: Completions, correction: Correction, cap: float) -> Tensor:
    """w = pi_old / mu, mu the policy that really sampled, of tokens [N, T] or of whole answers [N, 1]; no gradient.

    `truncate` holds it at `cap`, `mask` makes it 0 above. A token whose sampler log-prob is missing (NaN) counts as
    ratio 1. The sampler's log-probs must be those of the distribution that it drew from, temperature included.
    """
    logs = scored(completions, wide(completions.old_logp) - wide(completions.sampler_logp)).nan_to_num(nan=0.0)
    if correction.startswith("sequence"):
        logs = logs.sum(-1, keepdim=True)
    weight = capped_exp(logs, CAP)
    return weight.clamp(max=cap) if correction.endswith("truncate") else torch.where(weight > cap, 0.0, weight)


def reward_stages(clip: float | None, missing_eos_penalty: float) -> list[Stage]:
    """Shaping before anything is charged or subtracted: the clip of rewards, and what a cut answer costs."""
    stages = [] if clip is None else [Stage("clip_reward", {"low": -clip, "high": clip})]
    return [*stages, *([Stage("missing_eos", {"penalty": missing_eos_penalty})] if missing_eos_penalty else [])]


def kl_stage(id_: str, beta: float, target: float | None, horizon: int, **more: float) -> Stage:
    """A stage that charges beta times the log-ratio, with its controller."""
    return Stage(id_, {"beta": beta, "target": target, "horizon": horizon, **more})
