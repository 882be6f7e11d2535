"""Plackett-Luce DPO."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from align.methods._lists import scores_of
from align.methods.base import Method, method, option
from align.methods.stages import sum_by
from align.scoring.views import Lists


@method("pl_dpo", paper="2305.18290", view="lists", needs={"ref_logp", "scores"}, claim=("gold_reward", "up", "style"))
class PLDPO(Method):
    """DPO for a full order: the Plackett-Luce likelihood of the list's ranking.

        loss = -sum_k [s_(k) - log sum_{j >= k} exp(s_(j))],   s = beta * h, (1) the best

    One value per list [G], in nats; log K! at the reference. h is the log-ratio to the reference summed over tokens;
    the order is that of the data's scores or ranks. A list of two is dpo; in each stage the best of what is left is
    chosen. Equal scores say nothing about each other: a completion competes with those scored strictly below it, so a
    list that is all tied is 0, and one winner over tied others is exactly the likelihood that it comes first.
    Source: arXiv 2305.18290, App. A.3.
    """

    formula: ClassVar[str] = (
        r"s_i &= \beta h_i \\ "
        r"\mathcal{L} &= -\sum_{i=1}^{K} \log\frac{e^{s_i}}{e^{s_i} + \sum_{j:\, \psi_j < \psi_i} e^{s_j}}"
    )
    when: ClassVar[str] = "Pick it when each prompt has a full ranking of several answers."

    beta: float = option(0.05, above=0, doc="scale of the implicit reward")

    def loss(self, lists: Lists) -> Tensor:
        reward, scores = self.beta * lists.completions.sum_log_ratio, scores_of(lists)
        below = (lists.group[:, None] == lists.group) & (scores[:, None] > scores)
        rivals = below | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        left = torch.where(rivals, reward, -math.inf).logsumexp(1)
        return sum_by(left - reward, lists.group, len(lists))
