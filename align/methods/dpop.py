"""DPOP."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("dpop", paper="2402.13228", view="pairs", needs={"ref_logp"}, claim=("chosen_logp", "up", "style", "dpo"))
class DPOP(Method):
    """DPO-Positive: a penalty inside the sigmoid where the chosen response falls below its reference likelihood.

        loss = -log sigmoid(beta * (h_w - h_l - lambda * max(0, -h_w)))

    One value per pair [P], in nats; log 2 at the reference. h is the log-ratio to the reference summed over tokens. dpo
    where h_w >= 0 or lambda is 0; where h_w < 0 the chosen response's gradient is 1 + lambda times that of dpo at the
    same margin, the rejected one's is not. For pairs of small edit distance. Clip the gradient's norm: with lambda 50
    it leaps by a factor of 51 at the kink h_w = 0, where the gradient taken is dpo's. Source: arXiv 2402.13228.
    """

    formula: ClassVar[str] = r"\mathcal{L} = -\log\sigma(\beta (h_w - h_l - \lambda \max(0, -h_w)))"
    when: ClassVar[str] = (
        "Pick it for pairs that differ in few tokens, as in mathematics and code, where dpo lowers the chosen "
        "answer too."
    )

    beta: float = option(0.3, above=0, doc="strength of the KL leash")
    lambda_: float = option(50.0, at_least=0, doc="weight of the penalty, 5 to 500")

    def loss(self, pairs: Pairs) -> Tensor:
        fall = (-pairs.chosen.sum_log_ratio).relu()
        return logistic(self.beta * (pairs.delta - self.lambda_ * fall))
