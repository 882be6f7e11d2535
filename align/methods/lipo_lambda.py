"""LiPO-lambda."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.methods._lists import per_list, unit_scores
from align.methods.base import Method, method, option
from align.methods.stages import logistic, ordered_pairs
from align.scoring.views import Lists


@method(
    "lipo_lambda", paper="2402.01878", view="lists", needs={"ref_logp", "scores"}, claim=("gold_reward", "up", "style")
)
class LiPOLambda(Method):
    """Listwise Preference Optimization with LambdaLoss weights: a pair counts by the change of DCG of swapping it.

        loss = sum over pairs i, j of a list with psi_i > psi_j of D_ij softplus(-(s_i - s_j)),   s = beta * h
        D_ij = |G_i - G_j| |1/D(t_i) - 1/D(t_j)|,   G = 2^psi - 1,   D(t) = ln(1 + t), no gradient

    One value per list [G], in nats; h is the log-ratio to the reference summed over tokens, psi the data's scores in
    [0, 1] (or win shares, from ranks), t_i the place of i in its list by s, 1 the highest. A list of two with psi 1 and
    0 is 0.5325 times dpo. A discount to base 2 would multiply the loss by ln 2, and a sum grows as K^2.

    Equal s, as in the first step, where all are 0: D_ij is the mean over all orders of the tied, so the order in which
    the data list the answers does not matter (a tie-break by index would favour the first). Source: arXiv 2402.01878,
    the lambda weights of its Section 3.
    """

    formula: ClassVar[str] = (
        r"s_i &= \beta h_i \qquad G_i = 2^{\psi_i} - 1 \qquad D_{i,j} = |G_i - G_j| \left|\frac{1}{\ln(1 + t_i)} - "
        r"\frac{1}{\ln(1 + t_j)}\right| \\ "
        r"\mathcal{L} &= -\frac{1}{n} \sum_{i,j:\, \psi_i > \psi_j} \operatorname{sg}[D_{i,j}] "
        r"\log\sigma(s_i - s_j) \\ "
        r"\text{sum:}\quad n &= 1 \qquad \text{mean:}\quad n = \max\left(1, \sum_{i,j:\, \psi_i > \psi_j} 1\right)"
    )
    when: ClassVar[str] = "Pick it when each prompt has several scored answers and which comes first matters most."

    beta: float = option(0.05, above=0, doc="scale of the implicit reward")
    reduction: Literal["sum", "mean"] = option("sum", doc="over the ordered pairs of a list")

    def loss(self, lists: Lists) -> Tensor:
        scores = unit_scores(lists, "the gain 2^score grows without bound")
        reward = self.beta * lists.completions.sum_log_ratio
        better, worse = ordered_pairs(lists.group, scores)
        gain = torch.exp2(scores[better]) - torch.exp2(scores[worse])
        weight = gain * _discount_gap(reward.detach(), lists.group, better, worse)
        losses = weight * logistic(reward[better] - reward[worse])
        return per_list(losses, lists.group[better], lists, self.reduction)


def _discount_gap(reward: Tensor, group: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """E |1/D(t_i) - 1/D(t_j)| over the orders of equal rewards, for pairs of completions, [M]."""
    same = group[:, None] == group
    above = (same & (reward > reward[:, None])).sum(1)
    tied = (same & (reward == reward[:, None])).sum(1)
    place = torch.arange(1, len(reward) + 1, dtype=reward.dtype, device=reward.device)
    each = 1 / torch.log1p(place)
    until, moment = (torch.cat([each.new_zeros(1), x.cumsum(0)]) for x in (each, each * place))
    total, weighted = until[above + tied] - until[above], moment[above + tied] - moment[above]
    mean = total / tied
    # Of two of the places a + 1 .. a + m, the discount of a + k is the larger in m - k cases, the smaller in k - 1.
    within = 2 * ((tied + 1 + 2 * above) * total - 2 * weighted) / (tied * (tied - 1)).clamp(min=1)
    together = reward[first] == reward[second]
    return torch.where(together, within[first], (mean[first] - mean[second]).abs())
