"""Nash-MD-PG."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods._online import mixture
from align.methods.base import Draw, Method, Rollouts, method, option
from align.scoring.views import Singles


@method("nash_md", paper="2312.00886", view="singles", needs={"ref_logp", "reward"})
class NashMD(Method):
    """Nash-MD-PG: policy gradient on the probability of beating a mixture of oneself and the reference.

        c_t = sg[-(P(y > y') - 1/2) + tau * sum_{n >= t} h_n],   h_n = log pi(y_n) - log pi_ref(y_n)
        loss = sum_t c_t log pi(y_t)

    One value per answer [N], a surrogate: the value means nothing, and its expected gradient over own answers y is that
    of -(P(pi > pi') - tau KL(pi || pi_ref)). `reward` is P(y > y'), y' drawn token by token from
    softmax((1 - mix) log pi + mix log pi_ref), which is not the mixture of whole answers. `mix` 0 is self-play, which
    stops at the regularised Nash equilibrium of temperature tau; 1 is the best response to the reference, which
    over-optimises; 0.125 to 0.375 were the paper's best. The 1/2 only takes variance away. A token answers for the
    log-ratios from itself on: with its own alone, as in TRL's former trainer, early tokens miss what they do to the KL
    of later ones, and the gradient is not that of the objective. P must be a judge's of pairs: from a difference of
    scores it is transitive, and nothing is left to balance. Source: arXiv 2312.00886, Section 7.
    """

    formula: ClassVar[str] = (
        r"c_t &= \operatorname{sg}\left[\frac{1}{2} - r + \tau \sum_{j : t \le j} h_j(y)\right] \\ "
        r"\mathcal{L} &= \sum_t c_t \log\pi(y_t)"
    )
    when: ClassVar[str] = (
        "Pick it when a judge compares answers, preferences may be intransitive, and two models can be sampled as one."
    )

    tau: float = option(0.008, at_least=0, doc="weight of KL(pi || pi_ref), in units of a win probability")
    mix: float = option(0.125, at_least=0, at_most=1, doc="weight of the reference in the opponent's mixture")

    def requires(self) -> frozenset[str]:
        return self.needs if self.tau else frozenset({"reward"})

    def rollouts(self) -> Rollouts:
        return Rollouts((Draw("policy"), mixture(self.mix, 1)), "preference", "first")

    def loss(self, view: Singles) -> Tensor:
        own = view.completions
        coefficient = (0.5 - own.reward)[:, None]
        if self.tau:
            ahead = torch.where(own.mask, own.log_ratio, 0.0).flip(-1).cumsum(-1).flip(-1)
            coefficient = coefficient + self.tau * ahead
        return own.sum(coefficient.detach() * own.logp)

    def cautions(self) -> tuple[str, ...]:
        if not self.tau:
            return ("nash_md: with `tau` 0 nothing anchors the policy: at best the average of its iterates converges",)
        return ()
