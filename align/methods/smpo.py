"""SmPO."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from align.methods._pairs import label_probability
from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method(
    "smpo",
    paper="2506.02698",
    view="pairs",
    needs={"ref_logp", "probability", "margin", "ties"},
    claim=("margin", "down", "noisy", "dpo"),
)
class SmPO(Method):
    """Smoothed Preference Optimization: the margin is scaled by 2p - 1, so that near-ties give no gradient.

        loss = -log sigmoid(c * (2p - 1) * beta * (h_w - h_l))

    One value per pair [P], in nats; log 2 at the reference. h is the log-ratio to the reference summed over tokens. p
    is the data's probability that the chosen response is the better one, or sigmoid(margin / T) of a difference of
    scores; below 1/2 the pair is reversed, and where the data say nothing it is 1. A geometric average of the two
    orders' likelihoods: a tie has loss log 2 and no gradient (the abstract's "loss approaches zero" is its gradient),
    and margins are pushed without end, where `soft_dpo` stops at logit p. The authors' code has c = 10 to undo scores
    squeezed into [0, 1]. Source: arXiv 2506.02698 and 2409.06691.
    """

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    T: float = option(1.0, above=0, doc="temperature of the labels: p = sigmoid(d / T), d the log-odds or the margin")
    c: float = option(1.0, above=0, doc="factor of the margin; 1 where T is calibrated")
    label: Literal["probability", "margin"] = option("probability", doc="what of the data p is made of")

    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp", "ties", self.label})

    def loss(self, pairs: Pairs) -> Tensor:
        p = label_probability(pairs, self.label, self.T, self.id)
        return logistic(self.c * (2 * p - 1) * self.beta * pairs.delta)
