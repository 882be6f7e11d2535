"""What every sampler takes and gives: prefixes of token ids, rollouts with the sampler's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from align.core.options import check_all, option
from align.core.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn."""

    max_new_tokens: int = option(256, at_least=1, doc="tokens of a completion, its end token included")
    temperature: float = option(1.0, at_least=0, doc="0: the likeliest token each time")
    top_p: float = option(1.0, above=0, at_most=1, doc="smallest set of tokens with this much probability; 1: all")
    top_k: int = option(0, at_least=0, doc="so many likeliest tokens; 0: all")
    seed: int = option(0, at_least=0, doc="seed of the draw")

    def __post_init__(self) -> None:
        check_all(self, "sampling")


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled completion.

    Attributes:
        ids: int64 [T], with the end token where the completion is finished.
        logp: float32 [T], log-probabilities under the distribution that was drawn from (after temperature, top_k and
            top_p; at temperature 0 the model's own).
        text: the completion without its end token.
        finished: whether it ended by an end token; false where `max_new_tokens` cut it.
    """

    ids: np.ndarray
    logp: np.ndarray
    text: str
    finished: bool

    def __len__(self) -> int:
        return len(self.ids)


class Sampler(Protocol):
    """Draws completions. `capabilities` names what a method may ask for beyond that."""

    capabilities: frozenset[str]

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams,
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """`n` completions (or `n[i]`) of each prefix of token ids, in the order of the prefixes.

        The draw of a prefix depends on (seed, its number, its tokens) and the other prefixes of its batch at most;
        the same call gives the same rollouts.
        """
        ...

    def sync(self, policy: Any) -> None:
        """Sample from these weights from now on."""
        ...
