"""Hinge on lists."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods._lists import per_list, scores_of
from align.methods.base import Method, method, option
from align.methods.stages import ordered_pairs
from align.scoring.views import Lists


@method(
    "list_hinge", paper="2402.01878", view="lists", needs={"ref_logp", "scores"}, claim=("gold_reward", "up", "style")
)
class ListHinge(Method):
    """The pairwise hinge ranking loss on lists (SLiC's loss on all ordered pairs).

        loss = sum over pairs i, j of a list with psi_i > psi_j of max(0, 1 - (s_i - s_j)),   s = beta * h

    One value per list [G]; h is the log-ratio to the reference summed over tokens, in nats, psi the data's scores (or
    win shares, from ranks). At the reference the number of ordered pairs, 1 with `mean`. A pair whose margin has
    reached 1 has no gradient. Pairs of equal scores contribute nothing. A list of two is dpo_hinge.
    Source: arXiv 2402.01878, the pairwise hinge loss of its Section 3.
    """

    formula: ClassVar[str] = (
        r"s_i &= \beta h_i \\ "
        r"\mathcal{L} &= \frac{1}{n} \sum_{i,j:\, \psi_i > \psi_j} \max(0, 1 - (s_i - s_j)) \\ "
        r"\text{sum:}\quad n &= 1 \qquad \text{mean:}\quad n = \max\left(1, \sum_{i,j:\, \psi_i > \psi_j} 1\right)"
    )
    when: ClassVar[str] = "Pick it for several scored answers a prompt when pairs that are learnt should be left alone."

    beta: float = option(0.05, above=0, doc="scale of the implicit reward; margins of 1 / beta nats count as learnt")
    reduction: Literal["sum", "mean"] = option("sum", doc="over the ordered pairs of a list")

    def loss(self, lists: Lists) -> Tensor:
        reward = self.beta * lists.completions.sum_log_ratio
        better, worse = ordered_pairs(lists.group, scores_of(lists))
        losses = (1 - (reward[better] - reward[worse])).relu()
        return per_list(losses, lists.group[better], lists, self.reduction)
