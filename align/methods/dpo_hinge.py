"""Hinge DPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.scoring.views import Pairs


@method("dpo_hinge", paper="2309.06657", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "style"))
class HingeDPO(Method):
    """Hinge DPO: the implicit reward difference is raised until it reaches 1, and then left alone.

        loss = max(0, 1 - beta * (h_w - h_l))

    One value per pair [P], without unit; 1 at the reference, 0 with no gradient from beta * (h_w - h_l) = 1 on, slope
    -beta below. h is the log-ratio to the reference summed over tokens. TRL's `hinge` is this loss, although its page
    cites SLiC, which has no reference (`slic`). Source: arXiv 2309.06657 (RSO), its hinge-norm loss with gamma for
    beta.
    """

    formula: ClassVar[str] = r"\mathcal{L} = \max(0, 1 - \beta (h_w - h_l))"
    when: ClassVar[str] = "Pick it when a pair that is learnt should be left alone: its gradient stops at a margin."

    beta: float = option(0.05, above=0, doc="scale of the implicit reward; 1 / beta nats is the margin that counts")

    def loss(self, pairs: Pairs) -> Tensor:
        return (1 - self.beta * pairs.delta).relu()
