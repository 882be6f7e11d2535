"""A judge's questions answered by a server that speaks OpenAI's protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.feedback.base import Failed
from align.feedback.endpoint import Endpoint, check_answer, choices
from align.feedback.judge import Heard
from align.feedback.judge_file import Asked
from align.sampling.base import SamplingParams

MOST = 20
"""Likeliest tokens that servers tell."""
TOLERANCE = 0.01
"""Share of the labels' probability that labels which were not told may hold."""


@dataclass(frozen=True, eq=False)
class EndpointJudge:
    """A judge over an endpoint: `vllm serve`, or a remote service.

    Labels are read from the likeliest first tokens, so a label must be one token there. A label that is not among them
    counts as 0 where it could hold no more than `TOLERANCE` of the labels' probability; else the answer is missing.
    """

    endpoint: Endpoint

    @property
    def key(self) -> Mapping[str, Any]:
        return self.endpoint.key

    def replies(
        self, asked: Mapping[int, Asked], n: int, params: SamplingParams, heard: Heard, seeds: Mapping[int, int]
    ) -> dict[int, Failed]:
        """See `JudgeModel.replies`."""
        own: dict[str, Any] = {
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "n": n,
        }
        # Services take seeds of 31 bits.
        bodies = {place: {**self._body(one), **own, "seed": seeds[place] % 2**31} for place, one in asked.items()}
        return self._ask(bodies, lambda answer: list(choices(answer, self.endpoint.api)), heard)

    def label_logps(self, asked: Mapping[int, Asked], labels: Sequence[str], heard: Heard) -> dict[int, Failed]:
        """See `JudgeModel.label_logps`."""
        chat = self.endpoint.api == "chat"
        own: dict[str, Any] = {"logprobs": True, "top_logprobs": MOST} if chat else {"logprobs": MOST}
        # At temperature 1 a server that tells the log-probs of what it draws from tells the model's own, too.
        own |= {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        bodies = {place: {**self._body(one), **own} for place, one in asked.items()}
        return self._ask(bodies, lambda answer: labels_of(_told(answer, chat), labels), heard)

    def _body(self, asked: Asked) -> dict[str, Any]:
        if self.endpoint.api == "chat":
            return {"model": self.endpoint.model, "messages": [dict(turn) for turn in asked.messages]}
        return {"model": self.endpoint.model, "prompt": asked.text}

    def _ask(
        self, bodies: Mapping[int, Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Any], heard: Heard
    ) -> dict[int, Failed]:
        unread: dict[int, Failed] = {}

        def take(place: int, answer: dict[str, Any]) -> None:
            found = check_answer(answer, read)
            if isinstance(found, Failed):
                unread[place] = found
            else:
                heard(place, found)

        return self.endpoint.ask(bodies, take) | unread


def labels_of(told: Mapping[str, float], labels: Sequence[str]) -> list[float] | Failed:
    """The log-prob of each label among the likeliest tokens; -inf for one that is too unlikely to matter."""
    found = [told.get(label, -math.inf) for label in labels]
    if all(math.isinf(value) for value in found):
        return Failed("none of the labels is among the judge's likeliest tokens")
    unseen = sum(math.isinf(value) for value in found)
    mass = float(np.exp([value for value in found if not math.isinf(value)]).sum())
    if unseen and unseen * math.exp(min(told.values())) > TOLERANCE * mass:
        return Failed("a label is not among the judge's likeliest tokens")
    return found


def _told(answer: Mapping[str, Any], chat: bool) -> dict[str, float]:
    """Token -> log-prob of the likeliest first tokens; of two tokens with one text the likelier."""
    logprobs = answer["choices"][0]["logprobs"]
    if chat:
        pairs = [(one["token"], float(one["logprob"])) for one in logprobs["content"][0]["top_logprobs"]]
    else:
        pairs = [(str(token), float(value)) for token, value in logprobs["top_logprobs"][0].items()]
    told: dict[str, float] = {}
    for token, value in pairs:
        if math.isnan(value):
            raise ValueError
        told[token] = max(value, told.get(token, -math.inf))
    if not told:
        raise ValueError
    return told
