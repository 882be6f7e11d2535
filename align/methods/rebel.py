"""REBEL."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Draw, Method, Rollouts, method, option
from align.scoring.views import Completions, Pairs, wide


@method("rebel", paper="2404.16767", view="pairs", needs={"old_logp", "margin"})
class REBEL(Method):
    """REBEL: regress a pair's difference of log-ratios on its difference of rewards.

        m = log pi - log pi_old, summed over tokens
        loss = (m_w - m_l - eta (r_w - r_l))^2

    One value per pair [P]. Both answers are pi_old's, the policy that the update started from, at temperature 1: at
    another one its log-probs are not those of the sampler, and m is not 0 at the start. The pair's `margin` is the
    difference of the rewards, which the KL to the reference, if any, is part of. 0 at pi proportional to pi_old
    exp(eta r), to which one Gauss-Newton step on logits leads: natural policy gradient. A constant added to a prompt's
    rewards changes nothing, and eta and the rewards' scale are one number. With rewards of +-1/2 it is `ipo` (`sum`)
    to pi_old with tau = 1 / (2 eta). This is the authors' code; the paper's loss is 1 / eta^2 times that, which Adam
    hides and clipping does not. They take eta 1, four passes over each batch, a learning rate of 3e-6 (TL;DR), and
    subtract 0.05 of the sampled KL from the reward. Source: arXiv 2404.16767, Eq. 1 and Alg. 1.
    """

    formula: ClassVar[str] = (
        r"m(y) &= \log\pi(y) - \log\pi_{\mathrm{old}}(y) \\ \mathcal{L} &= (m(y_w) - m(y_l) - \eta R)^2"
    )
    when: ClassVar[str] = (
        "Pick it for a scalar reward whose size means something, without a value model and without clipping."
    )

    eta: float = option(1.0, above=0, doc="step: log-ratio in nats for a reward difference of 1")

    def rollouts(self) -> Rollouts:
        # A tie says that m_w - m_l should be 0: `prob` keeps it.
        return Rollouts((Draw("policy", 2),), "reward", "pair", label="prob", ratio=True)

    def loss(self, pairs: Pairs) -> Tensor:
        if pairs.margin is None:
            raise ConfigError("method `rebel`: some pairs have no `margin`", mend="supply the difference of rewards")
        return (_moved(pairs.chosen) - _moved(pairs.rejected) - self.eta * pairs.margin).square()


def _moved(completions: Completions) -> Tensor:
    """log pi - log pi_old, summed over tokens, [N]."""
    return completions.sum(wide(completions.logp) - wide(completions.old_logp))
