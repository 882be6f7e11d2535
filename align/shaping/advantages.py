"""Rewards -> advantages: baselines within a group, returns of tokens, whitening over the batch.

A group is the completions of one prompt in one step, over all ranks. Missing rewards enter no statistic; their
completions get advantage 0 and are not trained on, and so is one that is left alone by missing rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from align.core.errors import ConfigError
from align.core.options import option
from align.shaping.base import Batch, ShapingStage, shaping
from align.shaping.controllers import KLStage


@shaping("group_center", paper="2503.20783")
@dataclass(frozen=True, kw_only=True)
class GroupCenter(ShapingStage):
    """A_i = r_i - mean of its group, r_i included (Dr. GRPO); with `into: reward`, the reward becomes that.

    (G - 1) / G of the leave-one-out advantage. Source: arXiv 2503.20783, Section 3.2.
    """

    into: Literal["advantage", "reward"] = option("advantage", doc="what the centred rewards become")

    def __call__(self, batch: Batch) -> Batch:
        centred, batch = _centred(batch, self.id)
        return batch.with_advantage(centred) if self.into == "advantage" else replace(batch, reward=centred)


@shaping("group_normalise", paper="2402.03300")
@dataclass(frozen=True, kw_only=True)
class GroupNormalise(ShapingStage):
    """A_i = (r_i - mean of its group) / (std + eps): GRPO's advantage.

    `group` takes the group's own std, `batch` that of all rewards of the step, `none` divides by 1. Public code has
    ddof 1 and eps 1e-4 (TRL), 1e-6 (verl), 1e-9 (OpenRLHF); papers mostly mean ddof 0. A group of equal rewards has
    advantage 0. Source: arXiv 2402.03300, Section 4.1.2.
    """

    scale: Literal["group", "batch", "none"] = option("group", doc="whose standard deviation divides")
    ddof: Literal[0, 1] = option(1, doc="1: the divisor of the variance is one less than the number of rewards")
    eps: float = option(1e-4, above=0, doc="added to the standard deviation")

    def __call__(self, batch: Batch) -> Batch:
        centred, batch = _centred(batch, self.id)
        if self.scale == "none":
            return batch.with_advantage(centred)
        if self.scale == "batch":
            rewards = batch.reward[batch.present]
            std = float(rewards.std(ddof=self.ddof)) if len(rewards) else 0.0
            return batch.with_advantage(centred / (std + self.eps))
        count = batch.sums(np.ones(len(batch.reward)))
        variance = batch.sums(centred**2) / np.maximum(count - self.ddof, 1)
        return batch.with_advantage(centred / (np.sqrt(variance) + self.eps)[batch.group])


@shaping("leave_one_out", paper="2402.14740")
@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(ShapingStage):
    """A_i = R_i - mean of the other rewards of its group (RLOO): an unbiased baseline.

    They sum to 0 in a group; of two, they are +-(R_1 - R_2). Source: arXiv 2402.14740, Equation 6.
    """

    def __call__(self, batch: Batch) -> Batch:
        centred, batch = _centred(batch, self.id)
        count = batch.sums(np.ones(len(batch.reward)))
        return batch.with_advantage(centred * (count / np.maximum(count - 1, 1))[batch.group])


@shaping("token_returns", paper="2501.03262")
@dataclass(frozen=True, kw_only=True)
class TokenReturns(KLStage):
    """A_it = sum over s >= t of gamma^(s - t) r_is, the return to go of a token.

        r_it = [t is the last token] r_i - beta * (log pi_old - log pi_ref)(y_it)

    Over scored tokens, each being one step. With beta 0 and gamma 1, r_i at every token.
    Source: REINFORCE++, arXiv 2501.03262.
    """

    beta: float = option(0.01, at_least=0, doc="weight of the KL of a token; with a target, at the first step")
    gamma: float = option(1.0, above=0, at_most=1, doc="discount of a token")

    def __call__(self, batch: Batch) -> Batch:
        made, price = self.charged(batch)
        there = batch.present
        earned = np.where(there[:, None], -price, 0.0)
        rows, last = np.flatnonzero(there & batch.mask.any(1)), _last(batch.mask)
        earned[rows, last[rows]] += batch.reward[rows]
        returns, after = np.zeros_like(earned), np.zeros(len(earned))
        for t in reversed(range(earned.shape[1])):
            after = np.where(batch.mask[:, t], earned[:, t] + self.gamma * after, after)
            returns[:, t] = np.where(batch.mask[:, t], after, 0.0)
        return replace(made, advantage=returns, train=made.train & there)


@shaping("whiten", paper="2501.03262")
@dataclass(frozen=True, kw_only=True)
class Whiten(ShapingStage):
    """A <- (A - mean) / sqrt(var + eps), over all scored tokens of the step whose completion has a reward.

    A long answer counts as much as its tokens. Afterwards they have mean 0 and standard deviation 1. With `mean_only`
    nothing is divided. Source: REINFORCE++, arXiv 2501.03262; ddof 0 in OpenRLHF, 1 in verl.
    """

    ddof: Literal[0, 1] = option(0, doc="1: the divisor of the variance is one less than the number of tokens")
    eps: float = option(1e-8, above=0, doc="added to the variance")
    mean_only: bool = option(False, doc="subtract the mean and do not divide")

    def __call__(self, batch: Batch) -> Batch:
        scored = batch.mask & batch.present[:, None]
        tokens = batch.advantage[scored]
        if not len(tokens):
            return batch
        centred = tokens - tokens.mean()
        variance = float((centred**2).sum()) / max(len(tokens) - self.ddof, 1)
        made = np.zeros_like(batch.advantage)
        made[scored] = centred if self.mean_only else centred / np.sqrt(variance + self.eps)
        return replace(batch, advantage=made)


def _centred(batch: Batch, stage: str) -> tuple[np.ndarray, Batch]:
    """r_i less the mean of its group, float64 [N], NaN where missing; and the batch without those left alone.

    Raises:
        ConfigError: a group has one completion, which no baseline can be made of.
    """
    sizes = np.bincount(batch.group, minlength=batch.groups)
    if (alone := int((sizes < 2).sum())) > 0:
        raise ConfigError(
            f"shaping `{stage}`: {alone} of {batch.groups} groups have fewer than 2 completions",
            why="a baseline is made of the other completions of the same prompt",
            mend="sample at least 2 for each prompt (`num_generations`)",
        )
    count = batch.sums(np.ones(len(batch.reward)))
    mean = batch.sums(batch.reward) / np.maximum(count, 1)
    return batch.reward - mean[batch.group], replace(batch, train=batch.train & (count >= 2)[batch.group])


def _last(mask: np.ndarray) -> np.ndarray:
    """Place of the last true of each row, int64 [N]; the last column where there is none."""
    width = mask.shape[1]
    found: np.ndarray = width - 1 - np.argmax(mask[:, ::-1], axis=1) if width else np.zeros(len(mask), np.int64)
    return found
