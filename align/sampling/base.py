"""What every sampler takes and gives: prefixes of token ids, rollouts with the sampler's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from align.core.errors import ConfigError
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
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """`n` completions (or `n[i]`) of each prefix of token ids, in the order of the prefixes.

        The draw of a prefix depends on (seed, its number, its tokens) and the other prefixes of its batch at most;
        the same call gives the same rollouts.

        Args:
            params: for all prefixes, or one a prefix (its own temperature, seed, length).
            progress: counts completions.
        """
        ...

    def sync(self, policy: Any) -> None:
        """Sample from these weights from now on."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What `Sampler.sample` was asked for, a count and parameters for each prefix.

    Attributes:
        prefixes: token ids. counts: completions of each. params: of each.
    """

    prefixes: Sequence[Sequence[int]]
    counts: Sequence[int]
    params: Sequence[SamplingParams]

    @classmethod
    def of(
        cls,
        prefixes: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        vocabulary: int | None,
        positions: int | None,
    ) -> Request:
        """Spread `n` and `params` over the prefixes, and refuse what no model could do.

        Args:
            vocabulary, positions: of the model; None where they are not known.

        Raises:
            ConfigError: numbers that do not match, an empty or too long prefix, or an id outside the vocabulary.
        """
        counts = [n] * len(prefixes) if isinstance(n, int) else list(n)
        each = [params] * len(prefixes) if isinstance(params, SamplingParams) else list(params)
        for given, name in ((counts, "counts"), (each, "`params`")):
            if len(given) != len(prefixes):
                raise ConfigError(f"{len(given)} {name} for {len(prefixes)} prefixes", mend="give one, or one each")
        if any(count < 0 for count in counts):
            raise ConfigError(f"{min(counts)} completions of a prefix", mend="ask for 0 or more")
        for number, (prefix, own) in enumerate(zip(prefixes, each, strict=True)):
            _check_prefix(number, prefix, own, vocabulary, positions)
        return cls(prefixes, counts, each)


def _check_prefix(
    number: int, prefix: Sequence[int], params: SamplingParams, vocabulary: int | None, positions: int | None
) -> None:
    if not len(prefix):
        raise ConfigError(f"prefix {number} is empty", mend="begin it with the BOS token")
    if min(prefix) < 0 or (vocabulary is not None and max(prefix) >= vocabulary):
        raise ConfigError(
            f"prefix {number} holds an id outside the vocabulary of {vocabulary}",
            mend="encode it with the model's own tokenizer",
        )
    longest = len(prefix) + params.max_new_tokens
    if positions is not None and longest > positions:
        raise ConfigError(
            f"prefix {number} and `max_new_tokens` make {longest} tokens, and the model has {positions} positions",
            mend="lower `max_new_tokens`, or leave long prefixes out",
        )
