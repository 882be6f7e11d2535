"""AOT."""

from __future__ import annotations

from typing import ClassVar

from align.methods._pairs import dominance
from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method(
    "aot", paper="2406.05882", view="pairs", needs={"ref_logp"}, coupling="batch", claim=("gold_reward", "up", "style")
)
class AOT(Method):
    """Alignment via Optimal Transport, paired: the policy's margins dominate the reference's as a distribution.

        u = sort_i(log pi(y_w,i) - log pi(y_l,i)),   v = sort_i(log pi_ref(y_w,i) - log pi_ref(y_l,i))
        loss_i = -(1 - eps) log sigmoid(m_i) - eps log sigmoid(-m_i),   m_i = beta * (u_(i) - v_(i))

    One value per pair [P], in nats; log 2 at the reference. Sums over tokens. The sort runs over the global batch, all
    ranks and micro-batches together (TRL: one device's micro-batch), so the result is the same for every split; a
    larger batch is a better quantile. Gradients are those of the matched elements: the order is constant almost
    everywhere. Weights are masses of both distributions: a pair of weight 2 counts as two, and may meet parts of
    several others (a weight on a value after the sort would make the loss leap where ranks change). A batch of one is
    dpo. Source: arXiv 2406.05882, its paired form with the logistic loss.
    """

    formula: ClassVar[str] = (
        r"u_i &= \log\pi(y_{w,i}) - \log\pi(y_{l,i}) \qquad v_i = \log\pi_{\mathrm{ref}}(y_{w,i}) - "
        r"\log\pi_{\mathrm{ref}}(y_{l,i}) \\ "
        r"m_i &= \beta (u_{(i)} - v_{(i)}) \\ "
        r"\mathcal{L} &= \frac{1}{P} \sum_{i=1}^{P} \left[-(1 - \varepsilon) \log\sigma(m_i) - \varepsilon "
        r"\log\sigma(-m_i)\right]"
    )
    when: ClassVar[str] = (
        "Pick it when what counts is how rewards are spread over all prompts, not each pair's own margin, and "
        "batches are large."
    )

    beta: float = option(0.01, above=0, doc="scale of the margin")
    eps: float = option(0.0, at_least=0, below=0.5, doc="label smoothing")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        policy = pairs.chosen.sum_logp - pairs.rejected.sum_logp
        reference = pairs.chosen.sum_ref_logp - pairs.rejected.sum_ref_logp
        return {"loss": dominance(policy, reference, pairs.weight, lambda m: logistic(self.beta * m, self.eps))}
