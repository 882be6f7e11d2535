"""R-DPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("r_dpo", paper="2403.19159", view="pairs", needs={"ref_logp"}, claim=("length", "down", "length_biased", "dpo"))
class RegularisedDPO(Method):
    """Length-regularised DPO: part of each preference is put down to length, so that the policy need not grow longer.

        loss = -log sigmoid(beta * (h_w - h_l) + alpha * (|y_w| - |y_l|))

    One value per pair [P], in nats; alpha in nats per token, |y| the number of scored tokens. h is the log-ratio to the
    reference summed over tokens. The sign: maximising E[r - alpha |y|] under the KL leash gives pi proportional to
    pi_ref exp((r - alpha |y|) / beta), so r = beta * h + alpha * |y| up to a function of the prompt. A longer winner is
    partly explained and has a smaller gradient than in dpo, a longer loser a larger one; alpha 0 is dpo. At the
    reference it is softplus(-alpha (|y_w| - |y_l|)). Source: arXiv 2403.19159.
    """

    formula: ClassVar[str] = r"\mathcal{L} = -\log\sigma(\beta (h_w - h_l) + \alpha (|y_w| - |y_l|))"
    when: ClassVar[str] = (
        "Pick it when the longer answer tends to win in your data and the policy should not learn length."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    alpha: float = option(0.01, at_least=0, doc="reward of a token of length, 0.01 to 0.05")

    def loss(self, pairs: Pairs) -> Tensor:
        length = pairs.chosen.length - pairs.rejected.length
        return logistic(self.beta * pairs.delta + self.alpha * length)
