"""APO-down."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, method, option
from align.scoring.views import Pairs


@method("apo_down", paper="2408.06266", view="pairs", needs={"ref_logp"}, claim=("chosen_logp", "down", "style"))
class APODown(Method):
    """Anchored Preference Optimization, down: both responses down, the rejected one further; for data below the model.

        loss = sigmoid(beta * h_w) + (1 - sigmoid(beta * (h_w - h_l)))

    One value per pair [P], in [0, 2], without unit; 1 at the reference. h is the log-ratio to the reference summed over
    tokens. The chosen response's gradient is exactly 0 at h_w = h_l = 0, and pushes down once h_l < h_w = 0. Choose it
    where the model is better than both responses; the choice between it and `apo_zero` is the method. Source: arXiv
    2408.06266.
    """

    formula: ClassVar[str] = r"\mathcal{L} = \sigma(\beta h_w) + 1 - \sigma(\beta (h_w - h_l))"
    when: ClassVar[str] = (
        "Pick it when the model already writes better answers than both of the pair, so that both should become "
        "less likely."
    )

    beta: float = option(0.1, above=0, doc="how fast the value saturates")

    def loss(self, pairs: Pairs) -> Tensor:
        down = torch.sigmoid(self.beta * pairs.chosen.sum_log_ratio)
        return down + torch.sigmoid(-self.beta * pairs.delta)
