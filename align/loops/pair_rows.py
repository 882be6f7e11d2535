"""Rows of `align pairs`: TRL's columns, which `data.train` reads, and where each pair comes from, which it does not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from align.core.errors import DataError
from align.data.groups import Message
from align.data.rollout_rows import REWARDS, reward_rows
from align.data.rollouts import Answer, RolloutGroup
from align.shaping.selection import Candidates, Pair, PairSpec, Selected

Form = Literal["text", "messages", "json"]
"""How prompts and answers are written: plain texts; lists of messages; where a message holds more than its role and
content (tool calls), JSON of them, which the readers take as well."""
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SIDE = pa.struct(
    [
        ("index", pa.int64()),
        ("origin", pa.string()),
        ("model", pa.string()),
        ("temperature", pa.float64()),
        ("finished", pa.bool_()),
        ("tokens", pa.int64()),
        ("logp", pa.float64()),
        ("score", pa.float64()),
        ("win_rate", pa.float64()),
        ("rewards", REWARDS),
    ]
)
_SINGLES = ("top", "top_share")


@dataclass(frozen=True)
class PairLayout:
    """The columns of an artefact of pairs.

    Attributes:
        form: of prompts and answers.
        spec: the rule. judged: whether there is feedback; without it, there are no rewards and margins.
        tools: whether rows have tools.
    """

    form: Form
    spec: PairSpec
    judged: bool
    tools: bool

    @property
    def single(self) -> bool:
        """Whether rows are demonstrations."""
        return self.spec.rule in _SINGLES

    @property
    def schema(self) -> pa.Schema:
        text = _MESSAGES if self.form == "messages" else pa.string()
        fields = [("prompt", text)]
        if self.single:
            fields += [("completion", text)]
        else:
            fields += [("chosen", text), ("rejected", text)]
            fields += [("probability", pa.float64())] if self.spec.label == "prob" else []
            judged = ("margin", "chosen_reward", "rejected_reward")
            fields += [(name, pa.float64()) for name in judged] if self.judged else []
            fields += [("weight", pa.float64())] if self.spec.rule in ("all", "by_origin") else []
        fields += [("tools", pa.string())] if self.tools else []
        sides = ("completion",) if self.single else ("chosen", "rejected")
        told = [("rule", pa.string()), ("source", pa.string()), ("row", pa.int64()), ("iteration", pa.int64())]
        if not self.single:
            told += [("win_probability", pa.float64()), ("swapped", pa.bool_())]
        told += [(side, _SIDE) for side in sides]
        return pa.schema([*fields, ("provenance", pa.struct(told))])

    def rows(self, group: RolloutGroup, one: Candidates, selected: Selected) -> list[dict[str, Any]]:
        """The rows of a prompt."""
        if self.single:
            return [self._single(group, one, index) for index in selected.singles]
        return [self._pair(group, one, pair, len(selected.pairs)) for pair in selected.pairs]

    def _pair(self, group: RolloutGroup, one: Candidates, pair: Pair, pairs: int) -> dict[str, Any]:
        value = one.score if self.spec.reward == "score" else one.win_rate
        row = self._common(group) | {
            "chosen": self._answer(group.answers[pair.chosen]),
            "rejected": self._answer(group.answers[pair.rejected]),
            "probability": _null(pair.probability),
            "margin": _null(pair.margin),
            "chosen_reward": _null(value[pair.chosen]),
            "rejected_reward": _null(value[pair.rejected]),
            "weight": 1.0 / pairs,
        }
        row["provenance"] |= {
            "win_probability": _null(pair.probability),
            "swapped": pair.swapped,
            "chosen": _side(group, one, pair.chosen),
            "rejected": _side(group, one, pair.rejected),
        }
        return self._kept(row)

    def _single(self, group: RolloutGroup, one: Candidates, index: int) -> dict[str, Any]:
        row = self._common(group) | {"completion": self._answer(group.answers[index])}
        row["provenance"]["completion"] = _side(group, one, index)
        return self._kept(row)

    def _common(self, group: RolloutGroup) -> dict[str, Any]:
        prompt: Any = group.prompt if isinstance(group.prompt, str) else [dict(turn) for turn in group.prompt]
        return {
            "prompt": json.dumps(prompt) if self.form == "json" else prompt,
            "tools": None if group.tools is None else json.dumps(group.tools),
            "provenance": {
                "rule": self.spec.rule,
                "source": group.row.source,
                "row": group.row.row,
                "iteration": group.iteration,
            },
        }

    def _answer(self, answer: Answer) -> Any:
        if self.form == "text":
            return answer.text
        messages = [{"role": "assistant", "content": answer.text}]
        return json.dumps(messages) if self.form == "json" else messages

    def _kept(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row[name] for name in self.schema.names}


def layout_of(groups: Iterable[RolloutGroup], spec: PairSpec, judged: bool) -> PairLayout:
    """The columns that fit all groups.

    Raises:
        DataError: some prompts are plain text and some messages.
    """
    plain = messages = richer = tools = False
    for group in groups:
        tools |= group.tools is not None
        if isinstance(group.prompt, str):
            plain = True
        else:
            messages = True
            richer |= any(not _simple(turn) for turn in group.prompt)
    if plain and messages:
        raise DataError(
            "some prompts are plain text and some are messages",
            why="a column has one type",
            mend="sample again with `chat: true` on the streams of plain prompts",
        )
    return PairLayout("text" if plain else "json" if richer else "messages", spec, judged, tools)


def _simple(turn: Message) -> bool:
    return set(turn) == {"role", "content"} and isinstance(turn["content"], str)


def _side(group: RolloutGroup, one: Candidates, index: int) -> dict[str, Any]:
    answer = group.answers[index]
    return {
        "index": index,
        "origin": answer.origin,
        "model": answer.model,
        "temperature": None if answer.logp is None else answer.temperature,
        "finished": answer.finished,
        "tokens": len(answer),
        "logp": None if answer.logp is None else float(answer.logp.sum(dtype=np.float64)),
        "score": _null(one.score[index]),
        "win_rate": _null(one.win_rate[index]),
        "rewards": reward_rows(answer.rewards),
    }


def _null(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
