"""Unpaired AOT."""

from __future__ import annotations

from typing import ClassVar

from align.methods._pairs import dominance
from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method(
    "aot_unpaired",
    paper="2406.05882",
    view="pairs",
    needs={"ref_logp"},
    coupling="batch",
    claim=("gold_reward", "up", "style"),
)
class UnpairedAOT(Method):
    """Alignment via Optimal Transport, unpaired: rewards of the chosen dominate those of the rejected, as two bags.

        u = sort_i(h_w,i),   v = sort_i(h_l,i)
        loss_i = -(1 - eps) log sigmoid(m_i) - eps log sigmoid(-m_i),   m_i = beta * (u_(i) - v_(i))

    One value per chosen response [P], in nats; log 2 at the reference. h is the log-ratio to the reference summed over
    tokens. Which chosen came with which rejected response does not matter, only that both bags are of one size, which
    pairs are. The sort runs over the global batch, all ranks and micro-batches together (TRL: one device's
    micro-batch). Gradients are those of the matched elements. Weights are masses of both bags: a pair of weight 2
    counts as two. A batch of one is dpo. Source: arXiv 2406.05882, its unpaired form with the logistic loss.
    """

    formula: ClassVar[str] = (
        r"u_i &= h_{w,i} \qquad v_i = h_{l,i} \qquad m_i = \beta (u_{(i)} - v_{(i)}) \\ "
        r"\mathcal{L} &= \frac{1}{P} \sum_{i=1}^{P} \left[-(1 - \varepsilon) \log\sigma(m_i) - \varepsilon "
        r"\log\sigma(-m_i)\right]"
    )
    when: ClassVar[str] = (
        "Pick it when good and bad answers are two bags whose pairing means nothing, and batches are large."
    )

    beta: float = option(0.01, above=0, doc="scale of the implicit reward")
    eps: float = option(0.0, at_least=0, below=0.5, doc="label smoothing")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        chosen, rejected = pairs.chosen.sum_log_ratio, pairs.rejected.sum_log_ratio
        return {"loss": dominance(chosen, rejected, pairs.weight, lambda m: logistic(self.beta * m, self.eps))}
