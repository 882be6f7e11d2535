"""Softmax cross-entropy on lists."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.core.errors import ConfigError
from align.methods._lists import unit_scores
from align.methods.base import Method, method, option
from align.methods.stages import log_softmax_by, sum_by
from align.scoring.views import Lists


@method(
    "list_softmax", paper="2402.01878", view="lists", needs={"ref_logp", "scores"}, claim=("gold_reward", "up", "style")
)
class ListSoftmax(Method):
    """The softmax cross-entropy ranking loss: one classification over the list, weighted by the scores.

        loss = -sum_i psi_i log softmax(s)_i,   s = beta * h, the softmax over the list

    One value per list [G], in nats; h is the log-ratio to the reference summed over tokens, psi the data's scores (or
    win shares, from ranks), used as they are: not normalised, so log K * sum_i psi_i at the reference. Scores (1, 0)
    make it dpo; scores that sum to 1 make it a cross-entropy whose minimum is their entropy. Scores below 0 would be
    pushed down without bound and are refused. Source: arXiv 2402.01878, the softmax loss of its Section 3.
    """

    formula: ClassVar[str] = (
        r"s_i &= \beta h_i \\ "
        r"\mathcal{L} &= -\sum_{i=1}^{K} \psi_i \log\frac{e^{s_i}}{\sum_{j=1}^{K} e^{s_j}}"
    )
    when: ClassVar[str] = (
        "Pick it for several answers a prompt whose scores are shares: one classification over the list."
    )

    beta: float = option(0.05, above=0, doc="scale of the implicit reward")

    def loss(self, lists: Lists) -> Tensor:
        scores = unit_scores(lists, "they multiply the loss of their list")
        if bool((scores < 0).any()):
            raise ConfigError(
                "method `list_softmax`: a score is below 0",
                why="its loss has no lower bound then",
                mend="give scores in 0 to 1 (win shares), or ranks, or take `lipo`, which reads only their order",
            )
        log_share = log_softmax_by(self.beta * lists.completions.sum_log_ratio, lists.group, len(lists))
        return sum_by(-scores * log_share, lists.group, len(lists))
