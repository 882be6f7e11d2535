"""DNO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("dno", paper="2404.03715", view="pairs", needs={"ref_logp", "margin", "ties"})
class DNO(Method):
    """Direct Nash Optimization: soft policy iteration against the previous iterate, fitted by a cross-entropy.

        s = sigmoid(r_w - r_l),   M = h_w - h_l,   h = log pi - log pi_t
        loss = -s log sigmoid(eta * M) - (1 - s) log sigmoid(-eta * M)

    One value per pair [P], in nats; log 2 at pi = pi_t. The reference is the policy as the round began. r is the reward
    of an answer, in the paper its win rate against pi_t, and the pair's `margin` is the difference; turning the pair
    round with its margin changes nothing, and so does a constant added to all rewards. Least at eta M = r_w - r_l: on
    pairs that cover everything the minimiser is pi_t exp(r / eta) / Z, so **eta is a temperature, the inverse of a
    step**. Every exact step beats the policy before it and the last iterate may cycle all the same. Large margins make
    it `dno_prct` without its SFT term. Source: arXiv 2404.03715, Alg. 1.
    """

    formula: ClassVar[str] = (
        r"s &= \sigma(R) \qquad M = h_w - h_l \\ "
        r"\mathcal{L} &= -s \log\sigma(\eta M) - (1 - s) \log\sigma(-\eta M)"
    )
    when: ClassVar[str] = "Pick it for rounds in which both answers of a pair have a win rate or a reward."

    eta: float = option(0.1, above=0, doc="temperature: the log-ratio is the reward divided by it")

    def loss(self, pairs: Pairs) -> Tensor:
        if pairs.margin is None:
            raise ConfigError("method `dno`: some pairs have no `margin`", mend="supply the difference of rewards")
        return logistic(self.eta * pairs.delta, torch.sigmoid(-pairs.margin))
