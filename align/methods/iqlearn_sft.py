"""Inverse soft-Q SFT (IQ-Learn on tokens)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.scoring.views import Completions, Demonstrations, wide


@method(
    "iqlearn_sft",
    paper="2409.01369",
    view="demonstrations",
    needs={"logit", "logsumexp", "finished"},
    claim=("entropy", "up", "style", "sft"),
)
class IQLearnSFT(Method):
    """Maximum likelihood, and the square of the reward that the logits mean as soft Q-values.

        q_t = logit of y_t,  v_t = logsumexp of the logits,  v after the end = 0,  r_t = q_t - gamma v_{t+1}
        loss = mean_t [ -(q_t - v_t) + lambda r_t^2 ]

    Nats and squared logits per token; values [N, T], the mean over all scored tokens of the global batch. lambda 0 is
    sft, which is blind to a shift of a position's logits; the second term is not. Gradients flow through v_{t+1} unless
    `detach_next`. v_{t+1} is that of the next scored token, so turns of users in between are stepped over. A response
    that was cut has no state after its last token: its last square is 0 and stays in the divisor. lambda is 1/(4 alpha)
    of IQ-Learn with chi^2 and values of the expert's states. Logits of pretrained models have an offset (v of 10 to
    30), so the first squares are hundreds: `warmup_steps` raises lambda linearly. The logits are the model's own, after
    its soft-cap. Source: arXiv 2409.01369, Eq. 14, and IQ-Learn's code.
    """

    formula: ClassVar[str] = r"r_t &= q_t - \gamma v_{t+1} \\ \mathcal{L}_t &= v_t - q_t + \lambda r_t^2"
    when: ClassVar[str] = "Pick it for demonstrations when answers should stay diverse at the quality of sft."

    lambda_: float = option(0.1, at_least=0, doc="weight of the squared reward; 0.01 to 1 is worth a scan")
    gamma: float = option(1.0, above=0, at_most=1, doc="discount of a token")
    detach_next: bool = option(False, doc="no gradient through the value of the next state")
    warmup_steps: int = option(0, at_least=0, doc="optimiser steps over which lambda rises from 0")

    def initial_state(self) -> dict[str, Tensor]:
        return {"steps": torch.zeros((), dtype=torch.float64)} if self.warmup_steps else {}

    def observe(self, view: Demonstrations) -> dict[str, Tensor]:
        return {name: steps + 1 for name, steps in {**self.initial_state(), **view.state}.items()}

    def loss(self, view: Demonstrations) -> dict[str, Term]:
        completions = view.completions
        square = self._rewards(completions).square()
        if self.warmup_steps:
            square = square * (self.observe(view)["steps"] / self.warmup_steps).clamp(max=1).to(square)
        nll = torch.where(completions.mask, wide(completions.logsumexp) - wide(completions.logit), 0.0)
        return {"nll": Term(nll, Unit("token")), "square": Term(square, Unit("token"), self.lambda_)}

    def _rewards(self, completions: Completions) -> Tensor:
        """q_t - gamma v_{t+1}, [N, T]; 0 where nothing is scored and at the last token of a cut response."""
        mask, v = completions.mask, wide(completions.logsumexp)
        if self.detach_next:
            v = v.detach()
        width = mask.shape[1]
        place = torch.where(mask, torch.arange(width, device=mask.device), width)
        following = place.flip(-1).cummin(-1).values.flip(-1)
        following = torch.nn.functional.pad(following[:, 1:], (0, 1), value=width)
        after = torch.nn.functional.pad(v, (0, 1)).gather(-1, following)
        known = mask & ((following < width) | completions.finished[:, None])
        return torch.where(known, wide(completions.logit) - self.gamma * after, 0.0)
