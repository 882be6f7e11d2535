"""LiPO, pairwise logistic."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods._lists import per_list, scores_of
from align.methods.base import Method, method, option
from align.methods.stages import logistic, ordered_pairs
from align.scoring.views import Lists


@method("lipo", paper="2402.01878", view="lists", needs={"ref_logp", "scores"}, claim=("gold_reward", "up", "style"))
class LiPO(Method):
    """Listwise Preference Optimization with the pairwise logistic ranking loss.

        loss = sum over pairs i, j of a list with psi_i > psi_j of softplus(-(s_i - s_j)),   s = beta * h

    One value per list [G], in nats; h is the log-ratio to the reference summed over tokens, psi the data's scores (or,
    from ranks, the share of the others that a completion beats). Pairs of equal scores contribute nothing; a list
    without any ordered pair counts as a list of value 0. `mean` divides by the list's number of ordered pairs. A list
    of two is dpo. The paper's text has a sign slip, log(1 + e^{-(s_i - s_j)}) being the loss of psi_i > psi_j.
    Source: arXiv 2402.01878, the pairwise logistic loss of its Section 3.
    """

    formula: ClassVar[str] = (
        r"s_i &= \beta h_i \\ "
        r"\mathcal{L} &= -\frac{1}{n} \sum_{i,j:\, \psi_i > \psi_j} \log\sigma(s_i - s_j) \\ "
        r"\text{sum:}\quad n &= 1 \qquad \text{mean:}\quad n = \max\left(1, \sum_{i,j:\, \psi_i > \psi_j} 1\right)"
    )
    when: ClassVar[str] = (
        "Pick it when each prompt has several scored or ranked answers, and only their order should count."
    )

    beta: float = option(0.05, above=0, doc="scale of the implicit reward")
    reduction: Literal["sum", "mean"] = option("sum", doc="over the ordered pairs of a list")

    def loss(self, lists: Lists) -> Tensor:
        reward = self.beta * lists.completions.sum_log_ratio
        better, worse = ordered_pairs(lists.group, scores_of(lists))
        losses = logistic(reward[better] - reward[worse])
        return per_list(losses, lists.group[better], lists, self.reduction)
