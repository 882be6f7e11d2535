"""SPIN."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs


@method("spin", paper="2401.01335", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "style"))
class SPIN(Method):
    """Self-Play Fine-Tuning: dpo of human demonstrations against the previous iterate's own answers.

        loss = -log sigmoid(lambda * (h(y) - h(y'))),   y human,  y' ~ pi_k,  h = log pi / pi_k

    One value per pair [P], in nats; log 2 at the start of each iteration. The chosen response is the demonstration,
    the rejected one a sample of pi_k, and the reference is pi_k itself: after an iteration pi_{k+1} samples anew, and
    cached log-probabilities are those of another reference. It is dpo with that reference and beta = lambda. Where
    pi_k is the data's own distribution, pi = pi_k is the minimum, whatever lambda. The authors mix in the samples of
    the iteration before, take lambda 0.1 (5.0 in the last of three iterations) and a learning rate of 5e-7, then 1e-7.
    Source: arXiv 2401.01335, Eq. 4.7, and the authors' trainer.
    """

    formula: ClassVar[str] = r"\mathcal{L} = -\log\sigma(\lambda (h_w - h_l))"
    when: ClassVar[str] = "Pick it when you have demonstrations, no preferences, and time for rounds of sampling."

    lambda_: float = option(0.1, above=0, doc="scale of the implicit reward; 5.0 in the authors' last iteration")

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.lambda_ * pairs.delta)

    def implicit_reward(self, completions: Completions) -> Tensor:
        """lambda * h, [N]."""
        return self.lambda_ * completions.sum_log_ratio
