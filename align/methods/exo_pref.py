"""EXO on pairs."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.methods.base import Method, method, option
from align.scoring.views import Completions, Pairs


@method("exo_pref", paper="2402.00856", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "style"))
class EXOPref(Method):
    """Efficient Exact Optimization on pairs: reverse KL from the policy's two-point distribution to smoothed labels.

        z = beta_pi * (h_w - h_l),   q = (sigmoid(z), sigmoid(-z)),   p = (1 - eps, eps)
        loss = KL(q || p) = q_w log(q_w / (1 - eps)) + q_l log(q_l / eps)

    One value per pair [P], in nats; -log 2 - log(eps (1 - eps)) / 2 at the reference, 0 at z = logit(1 - eps) and
    nowhere else. h is the log-ratio to the reference summed over tokens. dL/dz = q_w q_l (z - logit(1 - eps)): at the
    reference 3.5 times dpo's for eps 0.001, and 0 as z falls: a pair that is strongly mis-ordered gets no gradient, so
    warm up with dpo where many are. It is mode-seeking, where dpo (forward KL to the same labels) covers modes. The
    authors' code takes log p = (0, -10), which does not sum to 1, and divides both models' logits by the sampling
    temperature, 0.8; log-probabilities here are of temperature 1. Source: arXiv 2402.00856, Eq. 16; TRL's `exo_pair`.
    """

    formula: ClassVar[str] = (
        r"z &= \beta_\pi (h_w - h_l) \qquad q = \sigma(z) \\ "
        r"\mathcal{L} &= q \log\frac{q}{1 - \varepsilon} + (1 - q) \log\frac{1 - q}{\varepsilon}"
    )
    when: ClassVar[str] = (
        "Pick it when the policy should seek the main mode of good answers, and few pairs start strongly mis-ordered."
    )

    beta_pi: float = option(0.5, above=0, doc="scale of the implicit reward; 0.5 on TL;DR and HH, 0.1 on IMDb")
    eps: float = option(1e-3, above=0, below=0.5, doc="label smoothing; at 0 the loss is infinite")

    def loss(self, pairs: Pairs) -> Tensor:
        z = self.beta_pi * pairs.delta
        chosen = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-self.eps))
        return chosen + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(self.eps))

    def implicit_reward(self, completions: Completions) -> Tensor:
        return self.beta_pi * completions.sum_log_ratio
