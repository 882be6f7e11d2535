"""Alpha-SPIN."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods._online import anchor_columns, anchored
from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("alpha_spin", paper="2404.04291", view="pairs", needs={"ref_logp", "anchor.previous"})
class AlphaSPIN(Method):
    """Regularised SPIN: self-play on demonstrations whose anchor is a geometric mixture with the first model.

        m = log pi - (1 - alpha) log pi_t - alpha log pi_ref, summed over tokens
        loss = -log sigmoid(beta * (m(y) - m(y'))),   y a demonstration,  y' ~ pi_t

    One value per pair [P], in nats; log 2 at pi = pi_t = pi_ref. pi_t is the policy as the round began (the anchor
    `previous`), the reference the one that the first round started from. alpha 0 is `spin`, alpha 1 dpo against
    synthetic losers. The margin is beta (1 - alpha) times that of `spin` plus beta alpha times that of dpo. The exact
    step is pi_t^(1 - alpha) pi_ref^alpha (p_data / pi_t)^(1 / beta); its fixed point (p_data pi_ref^(alpha beta))^(1 /
    (1 + alpha beta)) is not p_data but lies towards the reference, and it is stable where |1 - alpha - 1 / beta| < 1:
    below beta 1/2 only short rounds keep it from overshooting, and a larger alpha does not help. The geometric form is
    a second-hand account of the paper, whose alpha is not known here. Source: arXiv 2404.04291.
    """

    formula: ClassVar[str] = (
        r"m(y) &= \log\pi(y) - (1 - \alpha) \log\pi_{\mathrm{prev}}(y) - \alpha \log\pi_{\mathrm{ref}}(y) \\ "
        r"\mathcal{L} &= -\log\sigma(\beta (m(y_w) - m(y_l)))"
    )
    when: ClassVar[str] = "Pick it in place of spin when its rounds fluctuate: it stays nearer to the first model."

    beta: float = option(0.1, above=0, doc="scale of the implicit reward")
    alpha: float = option(0.5, at_least=0, at_most=1, doc="weight of the reference in the anchor; 0 is spin")

    def requires(self) -> frozenset[str]:
        return anchor_columns(1 - self.alpha)

    def loss(self, pairs: Pairs) -> Tensor:
        previous = 1 - self.alpha
        return logistic(self.beta * (anchored(pairs.chosen, previous) - anchored(pairs.rejected, previous)))
