"""The token view of a trained policy ('from r to Q*'): what reward each token got, as a diagnostic.

In the token MDP the optimal policy of a KL-regularised reward obeys, with the soft value V* and V* = 0 after the end,

    beta * h_t = beta * log pi*(y_t|s_t) / pi_ref(y_t|s_t) = r(s_t, y_t) + V*(s_{t+1}) - V*(s_t)

so beta * h_t is an advantage (Q - V), not a Q-value. With a reward at the end alone, sums of it over a prefix are
V*(s_{t+1}) - V*(s_0), and the whole sum is r(x, y) - V*(s_0). Source: arXiv 2404.12358, Section 4; the identities are
checked on a solved token tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data.encode import Encoder, pieces
from align.data.groups import TokenGroup, beside
from align.scoring.views import Completions, Pairs

SHOWN = 4
"""Rows whose answers are shown token by token."""
_TOKENS, _PROMPT = 400, 2000
"""Most tokens of an answer and last characters of a prompt that are told."""


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


def told(group: TokenGroup, values: Sequence[np.ndarray], encoder: Encoder) -> dict[str, Any]:
    """A row's answers token by token, in plain values: the first pair, or every judged answer.

    Args:
        values: for each completion of the group float [>= T], a number for each of its tokens; what is not scored is
            left aside.

    Returns:
        `{"row", "prompt", "answers": [{"label", "total", "scored", "tokens": [{"text", "value"}], "left"}]}`. `total`
        is the sum over all scored tokens, also of those `left` off at the end; `value` is missing where a token is not
        scored.
    """
    answers = []
    for label, place in _labelled(group):
        one = group.completions[place]
        numbers = np.where(one.mask, values[place][: len(one)], 0.0)
        texts = pieces(encoder, one.ids[:_TOKENS].tolist())
        tokens = [
            {"text": text} | ({"value": float(number)} if scored else {})
            for text, number, scored in zip(texts, numbers, one.mask, strict=False)
        ]
        answers.append(
            {
                "label": label,
                "total": float(numbers.sum()),
                "scored": int(one.mask.sum()),
                "tokens": tokens,
                "left": len(one) - len(tokens),
            }
        )
    return {"row": str(group.row), "prompt": encoder.decode(group.prompt.tolist())[-_PROMPT:], "answers": answers}


def _labelled(group: TokenGroup) -> list[tuple[str, int]]:
    """What an answer is called on a page, and its place in the group."""
    for pair in group.preferences[:1]:
        names = ("tied", "tied") if pair.tie else ("chosen", "rejected")
        return [(names[0], pair.winner), (names[1], pair.loser)]
    words = {True: "desirable", False: "undesirable"}
    judged = [place for place, one in enumerate(group.completions) if not beside(one.role)]
    return [(words.get(group.completions[place].label, "answer"), place) for place in judged]  # type: ignore[arg-type]
