"""The token view of a trained policy ('from r to Q*'): what reward each token got, as a diagnostic.

In the token MDP the optimal policy of a KL-regularised reward obeys, with the soft value V* and V* = 0 after the end,

    beta * h_t = beta * log pi*(y_t|s_t) / pi_ref(y_t|s_t) = r(s_t, y_t) + V*(s_{t+1}) - V*(s_t)

so beta * h_t is an advantage (Q - V), not a Q-value. With a reward at the end alone, sums of it over a prefix are
V*(s_{t+1}) - V*(s_0), and the whole sum is r(x, y) - V*(s_0). Source: arXiv 2404.12358, Section 4; the identities are
checked on a solved token tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align.scoring.views import Completions, Pairs


@dataclass(frozen=True, eq=False)
class TokenRewards:
    """Rewards of tokens, in units of the reward (nats times beta).

    Attributes:
        reward: [N, T] beta * h_t; zero where nothing is scored.
        prefix: [N, T] sum of `reward` over scored tokens up to and including this one; zero where nothing is scored.
    """

    reward: Tensor
    prefix: Tensor


def token_rewards(completions: Completions, beta: float) -> TokenRewards:
    """beta * h_t and its prefix sums. Needs `logp` and `ref_logp`."""
    mask = completions.mask
    reward = torch.where(mask, beta * completions.log_ratio, 0.0)
    return TokenRewards(reward, torch.where(mask, reward.cumsum(-1), 0.0))


def first_token_log_ratio(completions: Completions) -> Tensor:
    """h_t of each completion's first scored token, [N]; 0 for a completion without one."""
    first = completions.mask & (completions.mask.cumsum(-1) == 1)
    return torch.where(first, completions.log_ratio, 0.0).sum(-1)


def first_token_delta(pairs: Pairs) -> Tensor:
    """The part of `pairs.delta` that the first scored tokens make, [P].

    Formatting and openings end up here; a share of the whole margin near 1 means that little else was learnt.
    """
    return first_token_log_ratio(pairs.chosen) - first_token_log_ratio(pairs.rejected)
