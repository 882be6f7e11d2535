"""DPO with soft labels."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods._pairs import SoftLabels
from align.methods.base import method
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method(
    "soft_dpo",
    paper="2409.06691",
    view="pairs",
    needs={"ref_logp", "probability", "margin", "ties"},
    claim=("margin", "down", "noisy", "dpo"),
)
class SoftDPO(SoftLabels):
    """DPO with soft labels: the cross-entropy to a probability p that the chosen response is the better one.

        loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z),   z = beta * (h_w - h_l)

    One value per pair [P], in nats; log 2 at the reference; dpo plus (1 - p) z. h is the log-ratio to the reference
    summed over tokens. p is the data's probability, or sigmoid(margin / T) of a difference of scores; below 1/2 the
    pair is reversed, and 1 is dpo: data without the column are refused. Least at z = logit p: a tie pulls the margin to
    0, where `smpo` leaves it alone. Source: the cross-entropy form beside arXiv 2409.06691 and 2506.02698; derived.
    """

    formula: ClassVar[str] = (
        r"p &= \sigma(d / T) \qquad \text{probability:}\quad d = \log\frac{P}{1 - P} \qquad \text{margin:}\quad d = "
        r"R \\ "
        r"z &= \beta (h_w - h_l) \qquad \mathcal{L} = -p \log\sigma(z) - (1 - p) \log\sigma(-z)"
    )
    when: ClassVar[str] = (
        "Pick it for pairs with a probability or two scores when a near-tie should pull the two answers together."
    )

    def loss(self, pairs: Pairs) -> Tensor:
        p = self.label_probability(pairs)
        return logistic(self.beta * pairs.delta, 1 - p)
