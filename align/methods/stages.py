"""The stages that several offline methods share: margin losses, links, token averages, pairs within a group."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.scoring.views import Completions, Singles


def logistic(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), elementwise; `smoothing` e is the assumed rate of flipped labels."""
    loss = -logsigmoid(margin)
    # softplus(m) = softplus(-m) + m, so the smoothed loss is the plain one plus e m.
    return loss + smoothing * margin if smoothing else loss


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, elementwise; a branch that is not taken stays finite, and so does its gradient."""
    near = x > -math.log(2.0)
    half = torch.full_like(x, -math.log(2.0))
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, half))),
        torch.log1p(-torch.exp(torch.where(near, half, x))),
    )


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^logp, elementwise.

    A p that rounds to 1 has no odds: logp is held at one unit of rounding below 0, where the gradient stops.
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - log1mexp(logp)


def nll(completions: Completions, reduction: str) -> Tensor:
    """-log pi(y | x) as a sum over tokens (`sum`) or the mean over y's own tokens (`token_mean`), [N]."""
    return -(completions.sum_logp if reduction == "sum" else completions.mean_logp)


def split_by_label(completions: Completions, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum and number of `values` [N] over the desirable and over the undesirable, float64 scalars without gradient."""
    values = values.detach().double()
    label = completions.label.to(values.dtype)
    return (values * label).sum(), label.sum(), (values * (1 - label)).sum(), (1 - label).sum()


def kl_anchor(view: Singles) -> Tensor:
    """max(0, mean h) over the mismatched completions of the global batch, a scalar without gradient.

    0 where the batch has none: one row, or prompts that are all equal, give nothing to estimate a KL from.
    """
    if view.mismatched is None:
        return torch.zeros((), device=view.completions.mask.device)
    return view.mismatched.sum_log_ratio.detach().mean().clamp(min=0)


def ordered_pairs(group: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (better, worse), long [M] each, of all pairs within a group whose scores [N] differ."""
    better = (group[:, None] == group) & (scores[:, None] > scores)
    first, second = better.nonzero(as_tuple=True)
    return first, second


def sum_by(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Sums of `values` [M] over equal `owner` (long [M]), [size]."""
    return values.new_zeros(size).index_add(0, owner, values)
