"""DPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("dpo", paper="2305.18290", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "style"))
class DPO(Method):
    """Direct Preference Optimization: Bradley-Terry on the implicit reward beta * h.

        loss = -log sigmoid(beta * (h_w - h_l)),   h = log pi(y|x) - log pi_ref(y|x), sums over tokens

    One value per pair [P], in nats; log 2 at the reference. Exact minimiser with infinite data:
    pi proportional to pi_ref exp(r / beta) for the Bradley-Terry reward r. Source: arXiv 2305.18290, Eq. 7.
    """

    formula: ClassVar[str] = r"\mathcal{L} = -\log\sigma(\beta (h_w - h_l))"
    when: ClassVar[str] = "Pick it first: the default for pairs, and the method that most published numbers are for."

    beta: float = option(0.1, above=0, doc="strength of the KL leash; larger moves the policy less")

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * pairs.delta)

    def cautions(self) -> tuple[str, ...]:
        return ("dpo: with `beta` above 1 the policy hardly moves",) if self.beta > 1 else ()
