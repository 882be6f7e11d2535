"""REBEL."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Draw, Method, Rollouts, method, option
from align.scoring.views import Completions, Pairs, wide


@method("rebel", paper="2404.16767", view="pairs", needs={"old_logp", "ref_logp", "margin"})
class REBEL(Method):
    """REBEL: regress a pair's difference of log-ratios on its difference of rewards.

        old:        m = log pi - log pi_old, summed over tokens
        reference:  m = log pi - log pi_ref, summed over tokens
        loss = (m_w - m_l - eta (r_w - r_l))^2

    One value per pair [P]. Both answers are pi_old's, the policy that the update started from, at temperature 1: at
    another one its log-probs are not those of the sampler, and m is not 0 at the start. The pair's `margin` is the
    difference of the rewards, which the KL to the reference, if any, is part of. 0 at pi proportional to pi_old
    exp(eta r), to which one Gauss-Newton step on logits leads: natural policy gradient. A constant added to a prompt's
    rewards changes nothing, and eta and the rewards' scale are one number. With rewards of +-1/2 it is `ipo` (`sum`)
    to pi_old with tau = 1 / (2 eta). This is the authors' code; the paper's loss is 1 / eta^2 times that, which Adam
    hides and clipping does not. They take eta 1, four passes over each batch, a learning rate of 3e-6 (TL;DR), and
    subtract 0.05 of the sampled KL from the reward.

    With `anchor` `reference` it trains on pairs that are there, those of a round: the reference must then be the policy
    that sampled them (`loop.reference: previous`), and is pi_old by another name. Source: arXiv 2404.16767, Eq. 1 and
    Alg. 1.
    """

    formula: ClassVar[str] = (
        r"\text{old:}\quad m(y) &= \log\pi(y) - \log\pi_{\mathrm{old}}(y) \\ "
        r"\text{reference:}\quad m(y) &= \log\pi(y) - \log\pi_{\mathrm{ref}}(y) \\ "
        r"\mathcal{L} &= (m(y_w) - m(y_l) - \eta R)^2"
    )
    when: ClassVar[str] = (
        "Pick it for a scalar reward whose size means something, without a value model and without clipping."
    )

    eta: float = option(1.0, above=0, doc="step: log-ratio in nats for a reward difference of 1")

    anchor: Literal["old", "reference"] = option(
        "old", doc="`old`: the policy that the update started from, which samples; `reference`: pairs of a round"
    )

    def requires(self) -> frozenset[str]:
        return self.needs - {"old_logp" if self.anchor == "reference" else "ref_logp"}

    def rollouts(self) -> Rollouts | None:
        if self.anchor == "reference":
            return None
        # A tie says that m_w - m_l should be 0: `prob` keeps it.
        return Rollouts((Draw("policy", 2),), "reward", "pair", label="prob", ratio=True)

    def loss(self, pairs: Pairs) -> Tensor:
        if pairs.margin is None:
            raise ConfigError("method `rebel`: some pairs have no `margin`", mend="supply the difference of rewards")
        moved = self._moved(pairs.chosen) - self._moved(pairs.rejected)
        return (moved - self.eta * pairs.margin).square()

    def _moved(self, completions: Completions) -> Tensor:
        """log pi minus that of the anchor, summed over tokens, [N]."""
        anchor = completions.ref_logp if self.anchor == "reference" else completions.old_logp
        return completions.sum(wide(completions.logp) - wide(anchor))
