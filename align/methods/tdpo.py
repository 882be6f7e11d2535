"""TDPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs

ALPHA = 0.5


@method(
    "tdpo", paper="2404.11999", view="pairs", needs={"ref_logp", "kl_ref_policy"}, claim=("kl", "down", "style", "dpo")
)
class TDPO(Method):
    """Token-level DPO: the margin minus the difference of sequential forward KLs.

        K(y) = sum_t KL(pi_ref(.|x, y_<t) || pi(.|x, y_<t)), over scored tokens
        1:  loss = -log sigmoid(beta * (h_w - h_l - (K(y_l) - K(y_w))))
        2:  loss = -log sigmoid(beta * (h_w - h_l - alpha * (K(y_l) - stop_gradient(K(y_w)))))

    One value per pair [P], in nats; log 2 at the reference. A larger K(y_l) raises the loss, so divergence on the
    rejected response is restrained; variant 1's gradient would raise K(y_w), hence the stop. Variant 2 with alpha 1 has
    variant 1's value, with alpha 0 it is dpo. Source: arXiv 2404.11999, Eqs. 13 and 16, and the authors' code.
    """

    formula: ClassVar[str] = (
        r"K(y) &= \sum_t \operatorname{KL}(\pi_{\mathrm{ref}}(\cdot \mid x, y_{<t}) \,\|\, \pi(\cdot \mid x, "
        r"y_{<t})) \\ "
        r"\text{1:}\quad \mathcal{L} &= -\log\sigma(\beta (h_w - h_l - (K(y_l) - K(y_w)))) \\ "
        r"\text{2:}\quad \mathcal{L} &= -\log\sigma(\beta (h_w - h_l - \alpha (K(y_l) - \operatorname{sg}[K(y_w)])))"
    )
    when: ClassVar[str] = (
        "Pick it when the policy drifts on the rejected answers: their divergence is held token by token."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    alpha: float = option(ALPHA, at_least=0, doc="weight of the KL difference in variant 2")
    variant: Literal[1, 2] = option(2, doc="TDPO1, or TDPO2 with its stopped gradient")

    def check(self) -> None:
        if self.variant == 1 and self.alpha != ALPHA:
            raise ConfigError("method `tdpo`: variant 1 has no `alpha`", mend="leave it out, or use variant 2")

    def loss(self, pairs: Pairs) -> Tensor:
        rejected = pairs.rejected.sum(pairs.rejected.kl_ref_policy)
        chosen = pairs.chosen.sum(pairs.chosen.kl_ref_policy)
        if self.variant == 1:
            return logistic(self.beta * (pairs.delta - (rejected - chosen)))
        return logistic(self.beta * (pairs.delta - self.alpha * (rejected - chosen.detach())))
