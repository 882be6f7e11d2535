"""KTO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import kl_anchor
from align.scoring.views import Singles


@method(
    "kto",
    paper="2402.01306",
    view="singles",
    needs={"ref_logp", "label", "mismatched"},
    coupling="batch",
    claim=("gold_reward", "up", "style"),
)
class KTO(Method):
    """Kahneman-Tversky Optimization: a saturating value of each labelled response around a KL reference point.

        z0 = max(0, mean_i h(x_i, y'_i)) over mismatched pairs of the global batch, no gradient
        desirable:    loss = desirable_weight   * sigmoid(-beta * (h - z0))
        undesirable:  loss = undesirable_weight * sigmoid(-beta * (z0 - h))

    One value per completion [N], in [0, weight], half the weight at the reference; the mean is over all completions of
    both kinds. h is the log-ratio to the reference summed over tokens. y'_i is another row's completion after prompt
    x_i. z0 is one number for the global batch: means of means per rank, as in TRL, are another estimate where ranks
    hold unequal shares. The gradient beta s (1 - s) is largest at h = z0. Source: arXiv 2402.01306, Eq. 8.
    """

    formula: ClassVar[str] = (
        r"z_0 &= \operatorname{sg}\left[\max(0, \operatorname{mean}_i(h(x_i, y'_i)))\right] \\ "
        r"\text{desirable:}\quad \mathcal{L} &= w_D (1 - \sigma(\beta (h - z_0))) \\ "
        r"\text{undesirable:}\quad \mathcal{L} &= w_U (1 - \sigma(\beta (z_0 - h)))"
    )
    when: ClassVar[str] = "Pick it for answers with a thumb up or down, not in pairs, of uneven numbers or with noise."

    beta: float = option(0.1, above=0, doc="how fast the value saturates")
    desirable_weight: float = option(1.0, at_least=0, doc="choose so that w_D n_D / (w_U n_U) is in 1 to 1.5")
    undesirable_weight: float = option(1.0, at_least=0, doc="weight of undesirable completions")

    def loss(self, view: Singles) -> Tensor:
        h = view.completions.sum_log_ratio
        anchor = kl_anchor(view)
        gain = self.beta * (h - anchor)
        desirable = view.completions.label
        return torch.where(
            desirable, self.desirable_weight * torch.sigmoid(-gain), self.undesirable_weight * torch.sigmoid(gain)
        )
