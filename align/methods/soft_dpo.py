"""DPO with soft labels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from align.methods._pairs import label_probability
from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method(
    "soft_dpo",
    paper="2409.06691",
    view="pairs",
    needs={"ref_logp", "probability", "margin", "ties"},
    claim=("margin", "down", "noisy", "dpo"),
)
class SoftDPO(Method):
    """DPO with soft labels: the cross-entropy to a probability p that the chosen response is the better one.

        loss = -p log sigmoid(z) - (1 - p) log sigmoid(-z),   z = beta * (h_w - h_l)

    One value per pair [P], in nats; log 2 at the reference; dpo plus (1 - p) z. h is the log-ratio to the reference
    summed over tokens. p is the data's probability, or sigmoid(margin / T) of a difference of scores; below 1/2 the
    pair is reversed, and where the data say nothing it is 1, which is dpo. Least at z = logit p: a tie pulls the margin
    to 0, where `smpo` leaves it alone. Source: the cross-entropy form beside arXiv 2409.06691 and 2506.02698; derived.
    """

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    T: float = option(1.0, above=0, doc="temperature of the labels: p = sigmoid(d / T), d the log-odds or the margin")
    label: Literal["probability", "margin"] = option("probability", doc="what of the data p is made of")

    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp", "ties", self.label})

    def loss(self, pairs: Pairs) -> Tensor:
        p = label_probability(pairs, self.label, self.T, self.id)
        return logistic(self.beta * pairs.delta, 1 - p)
