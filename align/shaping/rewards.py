"""Rewards -> rewards: what is charged for, clipped, or set for an answer that did not end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from align.core.errors import ConfigError
from align.core.options import option
from align.shaping.base import Batch, ShapingStage, shaping
from align.shaping.controllers import KLStage


@shaping("missing_eos")
@dataclass(frozen=True, kw_only=True)
class MissingEos(ShapingStage):
    """What an answer without an end token costs.

    `subtract` takes `penalty` off its reward, `replace` puts minus `penalty` in the reward's place. An answer that was
    cut is judged on half a text; a reward model may like it. A missing reward stays missing.
    """

    penalty: float = option(1.0, at_least=0, doc="taken off the reward of an answer that was cut, or minus its reward")
    kind: Literal["subtract", "replace"] = option("subtract", doc="subtract it, or put minus it in place of the reward")

    def __call__(self, batch: Batch) -> Batch:
        cut = batch.reward - self.penalty if self.kind == "subtract" else np.where(batch.present, -self.penalty, np.nan)
        made = replace(batch, reward=np.where(batch.finished, batch.reward, cut))
        return made.with_metrics(missing_eos_share=float(1.0 - batch.finished.mean())) if len(batch.finished) else made


@shaping("overlong", paper="2503.14476")
@dataclass(frozen=True, kw_only=True)
class Overlong(ShapingStage):
    """DAPO's soft punishment of length.

        r <- r + 0                                    |y| <= max_length - cache
             r + (max_length - cache - |y|) / cache   up to max_length
             r - 1                                    beyond

    Lengths in scored tokens. It is added to a correctness of +-1. Source: arXiv 2503.14476, Equation 13.
    """

    max_length: int = option(20480, at_least=1, doc="tokens from which the penalty is 1")
    cache: int = option(4096, at_least=1, doc="tokens below max_length over which it grows from 0")

    def check(self) -> None:
        if self.cache > self.max_length:
            raise ConfigError(
                f"shaping `overlong`: `cache` is {self.cache}, more than `max_length` {self.max_length}",
                mend="use a value of at most max_length",
            )

    def __call__(self, batch: Batch) -> Batch:
        penalty = np.clip((self.max_length - self.cache - batch.length) / self.cache, -1.0, 0.0)
        made = replace(batch, reward=batch.reward + penalty)
        return made.with_metrics(overlong_share=float((penalty < 0).mean())) if len(penalty) else made


@shaping("clip_reward")
@dataclass(frozen=True, kw_only=True)
class ClipReward(ShapingStage):
    """Rewards held between `low` and `high`, before anything is subtracted."""

    low: float = option(-10.0, doc="the lowest reward")
    high: float = option(10.0, doc="the highest reward")

    def check(self) -> None:
        if self.low >= self.high:
            raise ConfigError(
                f"shaping `clip_reward`: `low` is {self.low!r}, `high` {self.high!r}", mend="use low < high"
            )

    def __call__(self, batch: Batch) -> Batch:
        there = batch.reward[batch.present]
        made = replace(batch, reward=np.clip(batch.reward, self.low, self.high))
        outside = (there < self.low) | (there > self.high)
        return made.with_metrics(reward_clipped_share=float(outside.mean())) if len(there) else made


@shaping("kl_in_reward", paper="1909.08593")
@dataclass(frozen=True, kw_only=True)
class KLInReward(KLStage):
    """R_i = r_i - beta * sum_t (log pi_old - log pi_ref)(y_it): the KL of a whole answer, charged to its reward.

    It is a constant in the loss, so that the policy gradient of the reward is that of the KL too. Put it before the
    baseline: the baseline then holds the KL as well. Source: RLOO, arXiv 2402.14740, Section 2.
    """

    beta: float = option(0.03, above=0, doc="weight of the KL; with a target, at the first step")

    def __call__(self, batch: Batch) -> Batch:
        made, price = self.charged(batch)
        return replace(made, reward=made.reward - price.sum(1))
