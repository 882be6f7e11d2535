"""APO-zero."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, method, option
from align.scoring.views import Pairs


@method("apo_zero", paper="2408.06266", view="pairs", needs={"ref_logp"}, claim=("chosen_logp", "up", "style"))
class APOZero(Method):
    """Anchored Preference Optimization, zero: the chosen response up, the rejected one down; for data above the model.

        loss = (1 - sigmoid(beta * h_w)) + sigmoid(beta * h_l)

    One value per pair [P], in [0, 2], without unit; 1 at the reference. h is the log-ratio to the reference summed over
    tokens. The two responses' gradients are independent of each other, at most beta / 4, and vanish for large |h|:
    solved and hopeless examples are both ignored. It is kto on a pair with its anchor at zero, and reads sigmoid, not
    log sigmoid, which would be BCO. Source: arXiv 2408.06266.
    """

    formula: ClassVar[str] = r"\mathcal{L} = 1 - \sigma(\beta h_w) + \sigma(\beta h_l)"
    when: ClassVar[str] = (
        "Pick it when the chosen answers are better than what the model writes, so that they should become likelier."
    )

    beta: float = option(0.1, above=0, doc="how fast the value saturates")

    def loss(self, pairs: Pairs) -> Tensor:
        chosen = torch.sigmoid(-self.beta * pairs.chosen.sum_log_ratio)
        return chosen + torch.sigmoid(self.beta * pairs.rejected.sum_log_ratio)
