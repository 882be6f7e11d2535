"""Functionals of the next-token distribution: each a small pure function of a (tokens x vocabulary) tile.

All take a `Tile` and return one number per token, [n], in the tile's dtype, with gradient. To add one, write it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from align.core.errors import ConfigError


@dataclass(eq=False)
class Tile:
    """Logits of n tokens over V entries, in float32 or float64.

    Attributes:
        logits: [n, V]. targets: long [n]. other: [n, V] logits of a second, frozen model, or None.
    """

    logits: Tensor
    targets: Tensor
    other: Tensor | None = None

    @cached_property
    def log_sum(self) -> Tensor:
        return torch.logsumexp(self.logits, dim=-1)

    @cached_property
    def log_probs(self) -> Tensor:
        return torch.log_softmax(self.logits, dim=-1)

    @cached_property
    def other_log_probs(self) -> Tensor:
        if self.other is None:
            raise ConfigError("this functional needs the logits of a second model")
        return torch.log_softmax(self.other, dim=-1)


def logit(tile: Tile) -> Tensor:
    """z_y, the logit of the token that was taken."""
    return tile.logits.gather(-1, tile.targets[:, None]).squeeze(-1)


def logsumexp(tile: Tile) -> Tensor:
    """log sum_v exp(z_v)."""
    return tile.log_sum


def logp(tile: Tile) -> Tensor:
    """log pi(y) = z_y - logsumexp(z)."""
    return tile.log_probs.gather(-1, tile.targets[:, None]).squeeze(-1)


def entropy(tile: Tile) -> Tensor:
    """-sum_v pi(v) log pi(v), in nats."""
    return -(tile.log_probs.exp() * tile.log_probs).sum(-1)


def log_sum_sq(tile: Tile) -> Tensor:
    """log sum_v pi(v)^2."""
    return torch.logsumexp(2 * tile.log_probs, dim=-1)


def log_max(tile: Tile) -> Tensor:
    """log max_v pi(v). The gradient is that of the maximum (of the first, where several are equal)."""
    return tile.log_probs.max(dim=-1).values


def kl_policy_ref(tile: Tile) -> Tensor:
    """KL(policy || other) = sum_v pi(v) (log pi(v) - log q(v))."""
    return (tile.log_probs.exp() * (tile.log_probs - tile.other_log_probs)).sum(-1)


def kl_ref_policy(tile: Tile) -> Tensor:
    """KL(other || policy) = sum_v q(v) (log q(v) - log pi(v))."""
    return (tile.other_log_probs.exp() * (tile.other_log_probs - tile.log_probs)).sum(-1)


def cross_entropy(tile: Tile) -> Tensor:
    """-sum_v q(v) log pi(v), with q of the other model."""
    return -(tile.other_log_probs.exp() * tile.log_probs).sum(-1)


FUNCTIONALS: dict[str, Callable[[Tile], Tensor]] = {
    function.__name__: function
    for function in (logp, logit, logsumexp, entropy, log_sum_sq, log_max, kl_policy_ref, kl_ref_policy, cross_entropy)
}
NEEDS_OTHER = frozenset({"kl_policy_ref", "kl_ref_policy", "cross_entropy"})
