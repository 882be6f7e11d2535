"""The stages that several offline methods share: margin losses, links, token averages, pairs within a group."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.core.errors import ConfigError
from align.scoring.views import Completions, Pairs, Singles


def logistic(margin: Tensor, smoothing: float | Tensor = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), elementwise.

    `smoothing` e is the assumed rate of flipped labels, or one probability of a flip per margin; below 0 it takes the
    effect of flips out again.
    """
    # softplus(m) = softplus(-m) + m, so the smoothed loss is the plain one plus e m.
    return -logsigmoid(margin) + smoothing * margin


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


def mean_by(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Means of `values` [M] over equal `owner` (long [M]), [size]; every one of them owns at least one value."""
    return sum_by(values, owner, size) / sum_by(torch.ones_like(values), owner, size)


def of_samples(pairs: Pairs, value: Callable[[Completions], Tensor]) -> Tensor:
    """The mean of `value` (completions -> one number each) over each pair's samples, [P]."""
    if pairs.samples is None or pairs.sample_pair is None:
        raise ConfigError(
            "the pairs have no `samples`", mend="supply them, or use `baseline: chosen` where there is one"
        )
    return mean_by(value(pairs.samples), pairs.sample_pair, len(pairs))


def of_response(pairs: Pairs, response: str, value: Callable[[Completions], Tensor]) -> Tensor:
    """`value` of a named response of each pair, [P]: `chosen`, the demonstration (`sft`), or the mean of `samples`."""
    if response == "chosen":
        return value(pairs.chosen)
    if response == "samples":
        return of_samples(pairs, value)
    if pairs.baseline is None:
        raise ConfigError("the pairs have no `baseline`", mend="supply it, or use `baseline: chosen`")
    return value(pairs.baseline)


RESPONSE_COLUMNS: dict[str, frozenset[str]] = {
    "chosen": frozenset(),
    "sft": frozenset({"baseline"}),
    "samples": frozenset({"samples"}),
}
"""A response that `of_response` takes -> the columns it reads."""


def log_softmax_by(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """values - log sum exp over equal `owner` (long [M], below `size`), [M]."""
    highest = values.new_zeros(size).scatter_reduce(0, owner, values.detach(), "amax", include_self=False)
    shifted = values - highest.index_select(0, owner)
    return shifted - sum_by(shifted.exp(), owner, size).log().index_select(0, owner)


def capped_exp(exponent: Tensor, cap: float) -> Tensor:
    """exp(min(x, cap)), elementwise; above the cap there is no gradient."""
    return exponent.clamp(max=cap).exp()
