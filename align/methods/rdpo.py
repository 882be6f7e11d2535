"""Robust DPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("rdpo", paper="2403.00409", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "flipped", "dpo"))
class RobustDPO(Method):
    """Provably robust DPO: an unbiased estimate of dpo's loss under symmetric flips of a known rate.

        z = beta * (h_w - h_l),   l(z) = -log sigmoid(z)
        loss = ((1 - eps) l(z) - eps l(-z)) / (1 - 2 eps)

    One value per pair [P], in nats; log 2 at the reference; dpo minus eps / (1 - 2 eps) * z. h is the log-ratio to the
    reference summed over tokens. Averaged over flips it is dpo's loss on the true labels, pair by pair; its variance
    grows as 1 / (1 - 2 eps)^2. Unbounded below, since the slope tends to -eps / (1 - 2 eps): train few epochs, and do
    not compare losses of different eps. Not cDPO, whose correction has the other sign. Source: arXiv 2403.00409, its
    robust loss.
    """

    formula: ClassVar[str] = (
        r"z &= \beta (h_w - h_l) \qquad \ell(z) = -\log\sigma(z) \\ "
        r"\mathcal{L} &= \frac{(1 - \varepsilon) \ell(z) - \varepsilon \ell(-z)}{1 - 2 \varepsilon}"
    )
    when: ClassVar[str] = "Pick it when a known share of the labels is flipped at random."

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    eps: float = option(0.1, at_least=0, below=0.5, doc="known rate of flipped labels")

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * pairs.delta, -self.eps / (1 - 2 * self.eps))

    def cautions(self) -> tuple[str, ...]:
        return ("rdpo: with `eps` above 0.4 the variance grows more than 25-fold",) if self.eps > 0.4 else ()
