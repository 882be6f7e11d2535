"""CPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs, wide


@method("cpo", paper="2401.08417", view="pairs", claim=("gold_reward", "up", "style"))
class CPO(Method):
    """Contrastive Preference Optimization: dpo with a uniform reference, plus the likelihood of the chosen response.

        loss = mean over pairs of -log sigmoid(beta * (log pi(y_w) - log pi(y_l)))
               + lambda * mean over all chosen tokens of -log pi(y_w,t)

    Preference: one value per pair [P], sums over tokens, in nats. SFT: one value per chosen token [P, T]; the mean is
    over the tokens of the whole global batch, as in the public code, so a long answer weighs more than a short one;
    prompt tokens are out. log 2 + lambda * NLL where both responses are equally likely. Made for chosen responses of
    high quality; the paper's rate is 1e-4, with LoRA. TRL averages over tokens inside the sigmoid for its `simpo` loss
    only. The ALMA repository's present trainer computes another loss. Source: arXiv 2401.08417, and TRL's CPO trainer
    for the reduction of the NLL.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} = -\frac{1}{P} \sum_{i=1}^{P} \log\sigma(\beta (\log\pi(y_{w,i}) - \log\pi(y_{l,i}))) - "
        r"\lambda \frac{\sum_{i=1}^{P} \log\pi(y_{w,i})}{\sum_{i=1}^{P} |y_{w,i}|}"
    )
    when: ClassVar[str] = (
        "Pick it when there is memory for one model only and the chosen answers are good enough to imitate."
    )

    beta: float = option(0.1, above=0, doc="scale of the implicit reward")
    lambda_: float = option(1.0, at_least=0, doc="weight of the chosen response's token-mean NLL")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        chosen = pairs.chosen
        margin = self.beta * (chosen.sum_logp - pairs.rejected.sum_logp)
        return {
            "preference": Term(logistic(margin), "pair"),
            "sft": Term(-wide(chosen.logp), Unit("token", chosen.mask), self.lambda_),
        }

    def implicit_reward(self, completions: Completions) -> Tensor:
        """beta * log pi(y | x), [N]."""
        return self.beta * completions.sum_logp
