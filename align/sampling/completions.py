"""What every sampler does with drawn ids: which of them end a completion, and the text of a completion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import GenerationConfig

from align.core.errors import ConfigError, ModelError
from align.core.seeds import derive
from align.sampling.base import Request, Rollout, SamplingParams

_CONTEXT = 8
"""Tokens before a completion with which it is decoded, so that a leading space is not lost."""

_LEAST_TEMPERATURE = 0.01


def as_ids(value: Any) -> frozenset[int]:
    """The ids of a configuration's end tokens: none, one, or a list."""
    if value is None:
        return frozenset()
    return frozenset(int(one) for one in (value if isinstance(value, (list, tuple)) else [value]))


def end_ids_of(model: str, tokenizer: Any) -> frozenset[int]:
    """End tokens of a tokenizer and of a model's `generation_config.json` (or its configuration, without one)."""
    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # no such file; transformers then takes the configuration's own
        from transformers import AutoConfig

        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    return as_ids(tokenizer.eos_token_id) | as_ids(config.eos_token_id)


@dataclass(frozen=True, slots=True)
class Draw:
    """One completion that an engine is to make.

    Attributes:
        place: (number of the prefix, number of the completion). prefix: its ids.
        seed: a function of (seed, place), so that a draw does not depend on what is drawn beside it.
    """

    place: tuple[int, int]
    prefix: Sequence[int]
    params: SamplingParams
    seed: int


def draws(request: Request) -> Iterator[Draw]:
    """Every completion of a request to vLLM, prefix by prefix.

    Seeds of one prefix follow one another, as vLLM's own do for `n` completions of one request: a server and an engine
    in process draw alike.

    Raises:
        ConfigError: a temperature that vLLM would raise without a word.
    """
    for number, (prefix, count, own) in enumerate(zip(request.prefixes, request.counts, request.params, strict=True)):
        if 0 < own.temperature < _LEAST_TEMPERATURE:
            raise ConfigError(
                f"the temperature {own.temperature:g} is below {_LEAST_TEMPERATURE}, the least that vLLM takes",
                mend="use 0 for the likeliest tokens",
            )
        first = derive(own.seed, "rollout", number) >> 1  # so that the sum stays below 2**63
        for sample in range(count):
            yield Draw((number, sample), prefix, own, first + sample)


class Decoder:
    """Turns drawn ids into rollouts, a completion's text being what follows its prefix's last tokens.

    Args:
        ends: tokens that end a completion; the text is without them.
    """

    def __init__(self, tokenizer: Any, prefixes: Sequence[Sequence[int]], ends: frozenset[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        tails = [[int(token) for token in prefix[-_CONTEXT:]] for prefix in prefixes]
        self._contexts = list(zip(tails, self._decode(tails), strict=True))

    def rollouts(self, drawn: Sequence[tuple[int, Sequence[int], Sequence[float]]]) -> list[Rollout]:
        """One rollout for each (number of the prefix, ids with the end token, log-probs).

        Raises:
            ModelError: a log-prob that is not finite.
        """
        finished = [len(ids) > 0 and ids[-1] in self._ends for _, ids, _ in drawn]
        bodies = [list(ids[:-1] if ended else ids) for (_, ids, _), ended in zip(drawn, finished, strict=True)]
        contexts = [self._contexts[number] for number, _, _ in drawn]
        joined = self._decode([[*ids, *body] for (ids, _), body in zip(contexts, bodies, strict=True)])
        made = []
        for (number, ids, logp), ended, (_, start), text, body in zip(
            drawn, finished, contexts, joined, bodies, strict=True
        ):
            refuse_not_finite(np.asarray(logp, np.float32), number)
            own = text[len(start) :] if text.startswith(start) else self._decode([body])[0]
            made.append(Rollout(np.asarray(ids, np.int64), np.asarray(logp, np.float32), own, ended))
        return made

    def _decode(self, rows: list[list[int]]) -> list[str]:
        if not rows:
            return []
        return list(self._tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def refuse_not_finite(logp: np.ndarray, number: int, before: int = 0) -> None:
    """Raise `ModelError` where a log-prob of prefix `number` is not finite; `before`: tokens drawn earlier."""
    wrong = ~np.isfinite(logp)
    if wrong.any():
        raise ModelError(
            "the model gives numbers that are not finite",
            where=f"prefix {number}, token {before + int(wrong.argmax())}",
            mend="check the weights; float16 overflows where bfloat16 does not",
        )
