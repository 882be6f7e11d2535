"""NCA."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.methods._lists import scores_of
from align.methods.base import Method, method, option
from align.methods.stages import log_softmax_by, sum_by
from align.scoring.views import Lists


@method("nca", paper="2402.05369", view="lists", needs={"ref_logp", "scores"}, claim=("chosen_logp", "up", "style"))
class NCA(Method):
    """Noise contrastive alignment: each response is told from noise by itself, so the chosen one does not fall.

        s_i = beta * h_i,   p = softmax_K(r / alpha)
        loss = -sum_i p_i log sigmoid(s_i) - (1 / K) sum_i log sigmoid(-s_i)

    One value per list [G], in nats; 2 log 2 at the reference. h is the log-ratio to the reference summed over tokens, r
    the data's scores (1 and 0 for a pair, a share of wins from ranks), alpha in their unit. The responses are coupled
    through p alone; s_i is best at log(K p_i), so a pair's chosen reward has the finite optimum log 2. A pair with
    alpha of 0.01 or less, one-hot p, is TRL's `nca_pair`. The authors' code adds 0.01 to the first response's score,
    which is not done here, and divides by its `temperature_alpha`, 0.0001 in its recipe. Source: arXiv 2402.05369.
    """

    formula: ClassVar[str] = (
        r"s_i &= \beta h_i \qquad p_i \propto e^{r_i / \alpha} \\ "
        r"\mathcal{L} &= -\sum_{i=1}^{K} p_i \log\sigma(s_i) - \frac{1}{K} \sum_{i=1}^{K} \log\sigma(-s_i)"
    )
    when: ClassVar[str] = "Pick it for answers with rewards when the best answer's likelihood must not fall."

    beta: float = option(0.01, above=0, doc="scale of the implicit reward")
    alpha: float = option(1.0, above=0, doc="temperature of the rewards; towards 0 only the best response counts")

    def loss(self, lists: Lists) -> Tensor:
        reward = self.beta * lists.completions.sum_log_ratio
        size = sum_by(torch.ones_like(reward), lists.group, len(lists)).index_select(0, lists.group)
        p = log_softmax_by(scores_of(lists) / self.alpha, lists.group, len(lists)).exp()
        return -sum_by(p * logsigmoid(reward) + logsigmoid(-reward) / size, lists.group, len(lists))
