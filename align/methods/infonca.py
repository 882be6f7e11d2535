"""InfoNCA."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods._lists import scores_of
from align.methods.base import Method, method, option
from align.methods.stages import log_softmax_by, sum_by
from align.scoring.views import Lists


@method("infonca", paper="2402.05369", view="lists", needs={"ref_logp", "scores"}, claim=("gold_reward", "up", "style"))
class InfoNCA(Method):
    """InfoNCA: cross-entropy of the policy's shares of a list to those of the rewards; dpo for explicit rewards.

        s_i = beta * h_i,   p = softmax_K(r / alpha)
        loss = -sum_i p_i log softmax_K(s)_i

    One value per list [G], in nats; log K at the reference. h is the log-ratio to the reference summed over tokens, r
    the data's scores (1 and 0 for a pair, a share of wins from ranks), alpha in their unit. A pair with alpha of 0.01
    or less, one-hot p, is dpo. Depends on differences of h alone, so that the chosen response may fall. The authors'
    code adds 0.01 to the first response's score, which is not done here, and divides by its `temperature_alpha`, 0.0001
    in its recipe. Source: arXiv 2402.05369.
    """

    formula: ClassVar[str] = (
        r"q_i &\propto e^{\beta h_i} \qquad p_i \propto e^{r_i / \alpha} \\ "
        r"\mathcal{L} &= -\sum_{i=1}^{K} p_i \log q_i"
    )
    when: ClassVar[str] = (
        "Pick it when each prompt has several answers with rewards and dpo's behaviour is what you want."
    )

    beta: float = option(0.01, above=0, doc="scale of the implicit reward")
    alpha: float = option(1.0, above=0, doc="temperature of the rewards; towards 0 only the best response counts")

    def loss(self, lists: Lists) -> Tensor:
        target = log_softmax_by(scores_of(lists) / self.alpha, lists.group, len(lists)).exp()
        share = log_softmax_by(self.beta * lists.completions.sum_log_ratio, lists.group, len(lists))
        return -sum_by(target * share, lists.group, len(lists))
