"""Drawing tokens from logits: one number between 0 and 1 a token, so that a draw depends on nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from align.sampling.base import SamplingParams


def draw(scores: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row, by inverting the cumulative distribution.

    Args:
        scores: float32 logits [B, V].
        uniforms: [B], each in [0, 1); not read at temperature 0.

    Returns:
        (ids int64 [B], log-probs float32 [B]) under the distribution drawn from: temperature first, then `top_k`, then
        `top_p` over what `top_k` left, renormalised. At temperature 0 the likeliest token, with its log-prob at
        temperature 1.
    """
    if params.temperature == 0:
        token = scores.argmax(-1, keepdim=True)
        return token[:, 0], scores.log_softmax(-1).gather(1, token)[:, 0]
    scores, ids = _kept(scores / params.temperature, params)
    logp = scores.log_softmax(-1)
    # In float32 the sums of a large vocabulary lose the tail.
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    reached = logp.exp().cumsum(-1, dtype=wide)
    total = reached[:, -1:]
    # Strictly below the total: a token of probability 0 behind the last likely one must not be drawn.
    point = torch.minimum(uniforms[:, None].to(wide) * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(reached, point, right=True).clamp_(max=scores.shape[1] - 1)
    token = place if ids is None else ids.gather(1, place)
    return token[:, 0], logp.gather(1, place)[:, 0]


def _kept(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """The scores that may be drawn and their ids, likeliest first; all scores and None where nothing is cut."""
    cut = 0 < params.top_k < scores.shape[1]
    if not cut and params.top_p >= 1:
        return scores, None
    scores, ids = torch.topk(scores, params.top_k) if cut else torch.sort(scores, descending=True, stable=True)
    if params.top_p < 1:
        probability = scores.softmax(-1)
        before = probability.cumsum(-1) - probability
        outside = before >= params.top_p
        outside[:, 0] = False
        scores = scores.masked_fill(outside, -torch.inf)
    return scores, ids


class Drawing(LogitsProcessor):
    """Draws inside `generate` and leaves it no choice; keeps the log-probs, never the logits.

    `generate` would draw from the global random state, and keep a [B, V] copy of the logits of every step.

    Args:
        uniforms: [B, steps].
    """

    def __init__(self, uniforms: Tensor, params: SamplingParams) -> None:
        self.uniforms, self.params = uniforms, params
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, logp = draw(scores, self.uniforms[:, len(self.logp)], self.params)
        self.logp.append(logp)
        return scores.fill_(-torch.inf).scatter_(1, token[:, None], 0.0)
