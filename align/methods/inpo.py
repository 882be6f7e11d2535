"""INPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.core.errors import ConfigError
from align.methods._online import anchor_columns, anchored
from align.methods.base import Method, method, option
from align.scoring.views import Pairs


@method("inpo", paper="2407.00617", view="pairs", needs={"ref_logp", "anchor.previous"})
class INPO(Method):
    """Iterative Nash Policy Optimization: mirror descent against the previous iterate, with a KL to the reference.

        m = log pi - (tau / eta) log pi_ref - (1 - tau / eta) log pi_t, summed over tokens
        loss = (m_w - m_l - 1 / (2 eta))^2

    One value per pair [P]; 1 / (4 eta^2) at pi = pi_t = pi_ref. pi_t is the policy as the round began (the anchor
    `previous`), the reference never moves. **eta is the inverse of a step**: with two answers of pi_t and a winner
    drawn from the judge's P, the exact step is pi_{t+1} proportional to exp(P(y > pi_t) / eta) pi_ref^(tau / eta)
    pi_t^(1 - tau / eta), and the regularised Nash equilibrium of temperature tau is its fixed point for every eta. The
    best and worst of several answers, or the likelier winner of two, are another game, harmless only where preferences
    are transitive. tau 0 is `ipo` (`sum`) with the previous iterate as its reference. At eta 0.005 the target is 100
    nats and the first loss 10,000: clip the gradient. The paper takes tau = eta / 3, three rounds, eight answers a
    prompt and a learning rate of 5e-7. Source: arXiv 2407.00617, Eq. 10 and Alg. 1.
    """

    formula: ClassVar[str] = (
        r"m(y) &= \log\pi(y) - \frac{\tau}{\eta} \log\pi_{\mathrm{ref}}(y) - \left(1 - \frac{\tau}{\eta}\right) "
        r"\log\pi_{\mathrm{prev}}(y) \\ "
        r"\mathcal{L} &= \left(m(y_w) - m(y_l) - \frac{1}{2 \eta}\right)^2"
    )
    when: ClassVar[str] = "Pick it for a few large rounds with a pairwise judge whose preferences may be intransitive."

    eta: float = option(0.005, above=0, doc="inverse of the step; the target margin is 1 / (2 eta)")
    tau: float = option(0.00167, at_least=0, doc="strength of the KL to the reference, below eta: a third of it")

    def check(self) -> None:
        if self.tau >= self.eta:
            raise ConfigError(
                f"method `inpo`: `tau` is {self.tau:g} and `eta` {self.eta:g}",
                why="the weight 1 - tau / eta of the previous iterate would be <= 0",
                mend=f"keep `tau` below `eta`; the paper takes a third of it, {self.eta / 3:.3g}",
            )

    def requires(self) -> frozenset[str]:
        return anchor_columns(self._previous)

    @property
    def _previous(self) -> float:
        return 1 - self.tau / self.eta

    def loss(self, pairs: Pairs) -> Tensor:
        margin = anchored(pairs.chosen, self._previous) - anchored(pairs.rejected, self._previous)
        return (margin - 1 / (2 * self.eta)).square()
