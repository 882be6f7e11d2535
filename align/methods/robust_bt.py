"""Robust Bradley-Terry."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.core.errors import ConfigError, DataError
from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs

FLOOR = 0.05
CEILING = 1.0


@method("robust_bt", view="pairs", needs={"ref_logp", "probability", "ties"}, claim=("gold_reward", "up", "noisy"))
class RobustBT(Method):
    """Bradley-Terry with a confidence per pair, c = P(label correct): votes, agreement of judges, an ensemble.

        z = beta * (h_w - h_l),   l(z) = -log sigmoid(z)
        mixture:  loss = -log(c sigmoid(z) + (1 - c) sigmoid(-z)),   c held in [floor, ceiling]
        soft:     loss = c l(z) + (1 - c) l(-z)
        debias:   loss = (c l(z) - (1 - c) l(-z)) / (2c - 1),   c > 1/2

    One value per pair [P], in nats; log 2 at the reference; dpo with c = 1. c is the data's `probability`; without that
    column they are refused. h is the log-ratio to the reference summed over tokens. soft is cdpo and debias is rdpo
    where eps is 1 - c. mixture is at most -log(1 - c), and its gradient vanishes for z to -infinity: outliers are given
    up, and so is a hard pair, so start it from a model trained with soft. At c = 1/2 it has no gradient at all. Source:
    the flip mixture of the literature on noisy labels; derived.
    """

    formula: ClassVar[str] = (
        r"z &= \beta (h_w - h_l) \qquad \ell(z) = -\log\sigma(z) \\ "
        r"\text{mixture:}\quad \mathcal{L} &= -\log(b \sigma(z) + (1 - b) \sigma(-z)) \qquad b = "
        r"\operatorname{clip}(c, c_{\min}, c_{\max}) \\ "
        r"\text{soft:}\quad \mathcal{L} &= c \ell(z) + (1 - c) \ell(-z) \\ "
        r"\text{debias:}\quad \mathcal{L} &= \frac{c \ell(z) - (1 - c) \ell(-z)}{2 c - 1}"
    )
    when: ClassVar[str] = (
        "Pick it when every pair has its own confidence, from votes, judges or an ensemble, and outliers should be "
        "given up."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    kind: Literal["mixture", "soft", "debias"] = option("mixture", doc="how the confidence enters")
    floor: float = option(FLOOR, at_least=0, at_most=1, doc="least confidence of the mixture")
    ceiling: float = option(CEILING, at_least=0, at_most=1, doc="greatest confidence of the mixture")

    def check(self) -> None:
        if self.floor > self.ceiling:
            raise ConfigError("method `robust_bt`: `floor` is above `ceiling`", mend="swap them")
        if self.kind != "mixture" and (self.floor, self.ceiling) != (FLOOR, CEILING):
            raise ConfigError("method `robust_bt`: `floor` and `ceiling` belong to the mixture", mend="leave them out")

    def loss(self, pairs: Pairs) -> Tensor:
        z, c = self.beta * pairs.delta, pairs.probability
        if self.kind == "soft":
            return logistic(z, 1 - c)
        if self.kind == "debias":
            if bool((c <= 0.5).any()):
                raise DataError("a pair's probability is 0.5 or less", mend="`debias` needs more: use `mixture`")
            return logistic(z, -(1 - c) / (2 * c - 1))
        c = c.clamp(self.floor, self.ceiling)
        return -torch.logaddexp(c.log() + logsigmoid(z), (-c).log1p() + logsigmoid(-z))
