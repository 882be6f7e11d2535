"""A prompt with the completions that policies wrote for it and what was said of them: what sampling makes, feedback
fills in and shaping reads.

Raw feedback stays raw here; what is trained on (advantages, pairs) is made of it elsewhere. Missing is NaN, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.data.groups import Message, RowId


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One sampled (or given) completion.

    Attributes:
        ids: int64 [T], with the end token where it is finished.
        text: without its end token.
        finished: whether it ended by an end token; false where it was cut.
        logp: float32 [T], the sampler's own log-probs of the tokens under the distribution drawn from; None where the
            answer was not sampled (a demonstration).
        origin: who wrote it: `policy`, `reference`, `mixture`, `previous`, `data`, ...
        model: name of the weights. temperature: it was drawn at.
        rewards: raw numbers by the feedback's name; NaN where that feedback is missing.
    """

    ids: np.ndarray
    text: str
    finished: bool = True
    logp: np.ndarray | None = None
    origin: str = "policy"
    model: str = ""
    temperature: float = 1.0
    rewards: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """The answers to one prompt.

    Attributes:
        row: where the prompt was read. prompt: text or messages. prompt_ids: int64 [P], what the model was asked with.
        answers: K of them, K may differ between groups.
        wins: float64 [K, K], P(answer i beats answer j), 0.5 on the diagonal; NaN where nobody compared the two; None
            where there is no pairwise feedback.
        columns: the row's other columns, for reward functions.
        iteration: the round or optimiser step in which it was sampled.
    """

    row: RowId
    prompt: str | tuple[Message, ...]
    prompt_ids: np.ndarray
    answers: tuple[Answer, ...]
    wins: np.ndarray | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: Any = None
    iteration: int = 0

    def __len__(self) -> int:
        return len(self.answers)

    def rewards(self, weights: Mapping[str, float] | None = None) -> np.ndarray:
        """float64 [K]: the weighted sum of the raw rewards by name (weight 1 by default), NaN where one is missing.

        Rewards to which `weights` gives no weight are left out; without any reward all are NaN.
        """
        names = list(self.answers[0].rewards) if self.answers else []
        chosen = [name for name in names if weights is None or weights.get(name, 0.0)]
        if not chosen:
            return np.full(len(self), np.nan)
        return np.array(
            [
                sum((1.0 if weights is None else weights[name]) * one.rewards.get(name, np.nan) for name in chosen)
                for one in self.answers
            ],
            dtype=np.float64,
        )
