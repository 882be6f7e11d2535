"""LD-DPO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs


@method(
    "ld_dpo", paper="2409.06411", view="pairs", needs={"ref_logp"}, claim=("length", "down", "length_biased", "dpo")
)
class LDDPO(Method):
    """Length-desensitised DPO: tokens beyond the shorter response's length count less.

        l = min(|y_w|, |y_l|),   h'(y) = sum_{t <= l} h_t + alpha * sum_{t > l} h_t
        loss = -log sigmoid(beta * (h'_w - h'_l))

    One value per pair [P], in nats; log 2 at the reference. Lengths count scored tokens, the end token with them, so
    the longer response's end is in its tail. alpha weighs policy and reference alike (a weight on the policy alone
    makes h' non-zero at the start). alpha 1, or equal lengths, is dpo; alpha 0 ignores the tail.
    Source: arXiv 2409.06411; TRL's `ld_alpha`.
    """

    formula: ClassVar[str] = (
        r"n &= \min(|y_w|, |y_l|) \qquad H(y) = \sum_{t \le n} h_t(y) + \alpha \sum_{t > n} h_t(y) \\ "
        r"\mathcal{L} &= -\log\sigma(\beta (H(y_w) - H(y_l)))"
    )
    when: ClassVar[str] = (
        "Pick it when answers grow long under dpo: what lies beyond the shorter answer's length counts less."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    alpha: float = option(0.5, at_least=0, at_most=1, doc="weight of the longer response's tail; 0.3 to 0.6 is usual")

    def loss(self, pairs: Pairs) -> Tensor:
        shared = torch.minimum(pairs.chosen.length, pairs.rejected.length)
        return logistic(self.beta * (self._sum(pairs.chosen, shared) - self._sum(pairs.rejected, shared)))

    def _sum(self, completions: Completions, shared: Tensor) -> Tensor:
        tail = completions.mask.cumsum(-1) > shared[:, None]
        return completions.sum(torch.where(tail, self.alpha * completions.log_ratio, completions.log_ratio))
