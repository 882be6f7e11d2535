"""EXO on scored lists."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods._lists import kl_by, scores_of
from align.methods.base import Method, method, option
from align.methods.stages import log_softmax_by
from align.scoring.views import Lists


@method("exo_rw", paper="2402.00856", view="lists", needs={"ref_logp", "scores"}, claim=("gold_reward", "up", "style"))
class EXORW(Method):
    """Efficient Exact Optimization on rewards: reverse KL from the policy to the optimal policy over K samples.

        q = softmax over the list of beta_pi * h,   p = softmax over the list of r / beta_r
        loss = KL(q || p) = sum_i q_i (log q_i - log p_i)

    One value per list [G], in nats; h is the log-ratio to the reference summed over tokens, r the data's scores (from
    ranks, the share of the others that a completion beats). At the reference log q_i = -log K. 0 where
    h_i = r_i / (beta_pi beta_r) + c for all i, and nowhere else: the effective KL coefficient is beta_pi * beta_r. The
    samples are meant to be the reference's own, 2 to 8 a prompt. The forward KL on the same data, -sum p_i log q_i
    (the authors' `dpo_rw`), is infonca. A completion to which q gives almost nothing has
    almost no gradient, so warm up with that where many lists start mis-ordered. Log-probabilities are of temperature 1;
    the authors' code divides both models' logits by the sampling temperature, 0.8. Source: arXiv 2402.00856.
    """

    formula: ClassVar[str] = (
        r"q_i &\propto e^{\beta_\pi h_i} \qquad p_i \propto e^{r_i / \beta_r} \\ "
        r"\mathcal{L} &= \sum_{i=1}^{K} q_i \log\frac{q_i}{p_i}"
    )
    when: ClassVar[str] = (
        "Pick it when each prompt has several scored samples of the starting model and the main mode is wanted."
    )

    beta_pi: float = option(0.5, above=0, doc="scale of the implicit reward; 0.5 on TL;DR and HH, 0.1 on IMDb")
    beta_r: float = option(0.5, above=0, doc="temperature of the rewards, in their unit")

    def loss(self, lists: Lists) -> Tensor:
        policy = log_softmax_by(self.beta_pi * lists.completions.sum_log_ratio, lists.group, len(lists))
        target = log_softmax_by(scores_of(lists) / self.beta_r, lists.group, len(lists))
        return kl_by(policy, target, lists)
