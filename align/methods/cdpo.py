"""Conservative DPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("cdpo", view="pairs", needs={"ref_logp"}, claim=("margin", "down", "flipped", "dpo"))
class ConservativeDPO(Method):
    """Conservative DPO: label smoothing of dpo, a finite target margin for labels that may be flipped.

        z = beta * (h_w - h_l)
        loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)

    One value per pair [P], in nats; log 2 at the reference; dpo plus eps * z. h is the log-ratio to the reference
    summed over tokens. Convex, least at z = log((1 - eps) / eps); beyond it the slope tends to +eps and pulls back.
    Biased where labels are truly flipped: it shrinks margins, which rdpo does not. TRL's `label_smoothing` does nothing
    with its `sigmoid` loss. Source: E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023,
    and the code of DPO's authors.
    """

    formula: ClassVar[str] = (
        r"z &= \beta (h_w - h_l) \\ "
        r"\mathcal{L} &= -(1 - \varepsilon) \log\sigma(z) - \varepsilon \log\sigma(-z)"
    )
    when: ClassVar[str] = (
        "Pick it when labels are noisy and over-confidence is the worry: margins stop at a finite size."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    eps: float = option(0.1, at_least=0, below=0.5, doc="assumed rate of flipped labels")

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * pairs.delta, self.eps)
