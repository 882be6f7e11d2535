"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.methods.stages import nll
from align.scoring.views import Demonstrations, wide


@method("sft", view="demonstrations", claim=("gold_reward", "up", "style"))
class SFT(Method):
    """Maximum likelihood on demonstrations, prompts unscored.

        token:     loss = sum_i sum_t -log pi(y_it | x_i, y_i<t) / sum_i |y_i|
        sequence:  loss = mean_i (1/|y_i|) sum_t -log pi(y_it | x_i, y_i<t)

    Nats per token. `token` (unit `token`, values [N, T]) is the mean over all scored tokens of the global batch, so a
    long answer counts as much as its tokens; `sequence` (unit `completion`, values [N]) gives each answer one vote.
    They agree where all lengths are equal. A completion's weight multiplies its tokens and never the divisor.
    """

    formula: ClassVar[str] = (
        r"\text{token:}\quad \mathcal{L}_t &= -\log\pi(y_t) \\ "
        r"\text{sequence:}\quad \mathcal{L} &= -\frac{1}{|y|} \log\pi(y)"
    )
    when: ClassVar[str] = "Pick it when you have answers to imitate, and before any training on preferences."

    reduction: Literal["token", "sequence"] = option("token", doc="mean over all tokens, or over sequences' own means")

    def loss(self, view: Demonstrations) -> dict[str, Term]:
        completions = view.completions
        if self.reduction == "sequence":
            return {"loss": Term(nll(completions, "token_mean"), "completion")}
        values: Tensor = torch.where(completions.mask, -wide(completions.logp), 0.0)
        return {"loss": Term(values, Unit("token"))}
