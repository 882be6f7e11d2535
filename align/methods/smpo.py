"""SmPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods._pairs import SoftLabels
from align.methods.base import method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method(
    "smpo",
    paper="2506.02698",
    view="pairs",
    needs={"ref_logp", "probability", "margin", "ties"},
    claim=("margin", "down", "noisy", "dpo"),
)
class SmPO(SoftLabels):
    """Smoothed Preference Optimization: the margin is scaled by 2p - 1, so that near-ties give no gradient.

        loss = -log sigmoid(c * (2p - 1) * beta * (h_w - h_l))

    One value per pair [P], in nats; log 2 at the reference. h is the log-ratio to the reference summed over tokens. p
    is the data's probability that the chosen response is the better one, or sigmoid(margin / T) of a difference of
    scores; below 1/2 the pair is reversed, and data without the column are refused. A geometric average of the two
    orders' likelihoods: a tie has loss log 2 and no gradient (the abstract's "loss approaches zero" is its gradient),
    and margins are pushed without end, where `soft_dpo` stops at logit p. The authors' code has c = 10 to undo scores
    squeezed into [0, 1]. Source: arXiv 2506.02698 and 2409.06691.
    """

    formula: ClassVar[str] = (
        r"p &= \sigma(d / T) \qquad \text{probability:}\quad d = \log\frac{P}{1 - P} \qquad \text{margin:}\quad d = "
        r"R \\ "
        r"\mathcal{L} &= -\log\sigma(c (2 p - 1) \beta (h_w - h_l))"
    )
    when: ClassVar[str] = "Pick it for pairs with a probability or two scores when near-ties should teach nothing."

    c: float = option(1.0, above=0, doc="factor of the margin; 1 where T is calibrated")

    def loss(self, pairs: Pairs) -> Tensor:
        p = self.label_probability(pairs)
        return logistic(self.c * (2 * p - 1) * self.beta * pairs.delta)
