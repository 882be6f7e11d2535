"""What online methods and methods of rounds share: a mixed anchor, soft labels, who writes the answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from align.methods.base import Draw
from align.scoring.views import Completions, wide

PREVIOUS = "anchor.previous"
"""The column of the policy as it was when the round began."""


def anchored(completions: Completions, previous: float) -> Tensor:
    """m = log pi - (1 - w) log pi_ref - w log pi_prev, summed over tokens, [N]; w = `previous`, in [0, 1].

    A policy without weight is not read. The anchor's normaliser cancels in a difference within one prompt.
    """
    parts = []
    if previous < 1:
        parts.append((1 - previous) * completions.sum_log_ratio)
    if previous > 0:
        ratio = wide(completions.logp) - wide(completions.anchor("previous"))
        parts.append(previous * completions.sum(ratio))
    return torch.stack(parts).sum(0)


def anchor_columns(previous: float) -> frozenset[str]:
    """The columns that `anchored` reads."""
    return frozenset({"ref_logp"} if previous < 1 else ()) | frozenset({PREVIOUS} if previous > 0 else ())


def either_way(loss: Callable[[Tensor], Tensor], margin: Tensor, probability: Tensor) -> Tensor:
    """P loss(margin) + (1 - P) loss(-margin), elementwise: the mean over labels drawn with probability P."""
    return probability * loss(margin) + (1 - probability) * loss(-margin)


def mixture(mix: float, count: int) -> Draw:
    """`count` answers of the mixture of policy and reference: of one of the two alone where the other has no weight."""
    if mix in (0, 1):
        return Draw("reference" if mix else "policy", count)
    return Draw("mixture", count, mix=mix)
