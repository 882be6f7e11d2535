"""SePPO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("seppo", paper="2410.05255", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "style"))
class SePPO(Method):
    """Semi-Policy Preference Optimization: SPIN with a random earlier checkpoint, whose sample may be a second winner.

        sign = +1 where h_k(y_w) >= 0, else -1, no gradient
        loss = -log sigmoid(beta * (h_k(y_w) - sign * h_k(y'))),   y' ~ pi_k,  h_k = log pi / pi_k

    One value per pair [P], in nats; log 2 at pi = pi_k. The chosen response is a demonstration, the rejected one a
    sample of the checkpoint pi_k, and the reference is pi_k, drawn from the checkpoints of the run (the paper saves one
    every 30 steps, keeps 7 and draws uniformly: better than always the latest or the first). Where the policy has
    fallen behind pi_k on the demonstration, pi_k's sample is raised with it. The share of such pairs is logged as
    `displacement` and should go to 0. With sign +1 it is spin. The sign of a sum over tokens is that of their mean:
    normalising by length, which would make a noisy h steadier, cannot change it. Source: arXiv 2410.05255, Eqs. 7 and
    8, a method for diffusion models; the form for language models and its beta are derived, and untested in the paper.
    """

    formula: ClassVar[str] = (
        r"s &= \operatorname{sg}[\operatorname{sign}(h_w)] \\ "
        r"\mathcal{L} &= -\log\sigma(\beta (h_w - s h_l))"
    )
    when: ClassVar[str] = (
        "Pick it for demonstrations and saved checkpoints, where an older checkpoint may still be better than the "
        "policy."
    )

    beta: float = option(0.1, above=0, doc="scale of the implicit reward")

    def loss(self, pairs: Pairs) -> Tensor:
        chosen, sample = pairs.chosen.sum_log_ratio, pairs.rejected.sum_log_ratio
        behind = chosen.detach() < 0
        return logistic(self.beta * (chosen - torch.where(behind, -sample, sample)))
