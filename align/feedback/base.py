"""What feedback is: rewards of answers, or probabilities that one answer beats another; missing is NaN, never 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from align.core.errors import ConfigError
from align.core.progress import Progress, silent
from align.data.groups import Message
from align.data.rollouts import Answer, RolloutGroup

Gives = Literal["reward", "preference"]


@dataclass(frozen=True, slots=True)
class Failed:
    """A judgement that is missing, and why, in a few words that do not name its row: reasons are counted."""

    reason: str


Judged = float | Failed
"""A finite number, or why there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What one feedback says of one group of K answers.

    Attributes:
        rewards: K numbers, NaN where missing; None where it gives preferences.
        wins: float64 [K, K], P(answer i beats answer j), 1/2 on the diagonal, NaN where missing or not compared; None
            where it gives rewards.
        failures: a reason for each missing answer or comparison that was asked for.
        asked: answers or comparisons asked for.
        metrics: name -> (sum, count), of the group.
        extras: column -> K values that a reward function logged, None where it logged none.
    """

    rewards: list[float] | None
    wins: np.ndarray | None = None
    failures: tuple[str, ...] = ()
    asked: int = 0
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    extras: Mapping[str, list[Any]] = field(default_factory=dict)


class Feedback(Protocol):
    """Judges groups of answers.

    Attributes:
        name: under which its rewards are kept.
        gives: rewards, or preferences.
        key: all that determines its numbers, for caches and manifests.
    """

    @property
    def name(self) -> str: ...

    @property
    def gives(self) -> Gives: ...

    @property
    def key(self) -> Mapping[str, Any]: ...

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        """One verdict per group. What is drawn is a function of (seed, group), wherever the group stands.

        `progress` counts answers, or comparisons.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One answer to be scored."""

    group: RolloutGroup
    index: int

    @property
    def answer(self) -> Answer:
        return self.group.answers[self.index]

    def content(self) -> list[Any]:
        """What the text of prompt and answer determines; for a cache."""
        return [_plain(self.group.prompt), self.answer.text]


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """Two answers to be compared, in the order in which they are shown."""

    group: RolloutGroup
    first: int
    second: int

    @property
    def texts(self) -> tuple[str, str]:
        return self.group.answers[self.first].text, self.group.answers[self.second].text

    @property
    def turned(self) -> Match:
        return Match(self.group, self.second, self.first)

    def content(self) -> list[Any]:
        return [_plain(self.group.prompt), *self.texts]


class CallLog:
    """What reward functions say through `log_extra(column, values)` and `log_metric(name, value)`, until it is taken.

    Values of a column belong to the items of the call in which they are logged.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, tuple[float, int]] = {}
        self._extras: dict[int, dict[str, Any]] = {}

    def add(
        self,
        items: Sequence[Item],
        metrics: Sequence[tuple[str, float]],
        extras: Sequence[tuple[str, Sequence[Any]]],
    ) -> None:
        """Note what a successful call logged.

        Raises:
            ConfigError: a column has not one value per completion.
        """
        for name, value in metrics:
            total, count = self._metrics.get(name, (0.0, 0))
            self._metrics[name] = (total + float(value), count + 1)
        for column, values in extras:
            if len(values) != len(items):
                raise ConfigError(
                    f"`log_extra` was given {len(values)} values of `{column}` for {len(items)} completions",
                    mend="log one value per completion",
                )
            for item, value in zip(items, values, strict=True):
                self._extras.setdefault(id(item), {})[column] = value

    def take(self, items: Sequence[Item]) -> tuple[dict[str, tuple[float, int]], list[dict[str, Any]]]:
        """(metrics, for each item its extra columns); the log is empty afterwards."""
        metrics, extras = self._metrics, [self._extras.get(id(item), {}) for item in items]
        self._metrics, self._extras = {}, {}
        return metrics, extras


class Scorer(Protocol):
    """Scores answers one by one; `scored.Scored` makes a feedback of it.

    Attributes:
        key: all that determines its numbers.
        draws: whether the seed does, too.
        log: what it logs beside its numbers; None where it logs nothing.
    """

    @property
    def log(self) -> CallLog | None: ...

    @property
    def key(self) -> Mapping[str, Any]: ...

    @property
    def draws(self) -> bool: ...

    def content(self, item: Item) -> Any:
        """What of an item determines its number; `core.hashing.digest` must take it."""
        ...

    def score(self, items: Sequence[Item], seed: int, progress: Progress = silent) -> list[Judged]:
        """One number, or why there is none, per item; an item that fails costs no other."""
        ...


class Comparer(Protocol):
    """P(first beats second) of matches, in [0, 1]; `scored.Compared` makes a feedback of it."""

    @property
    def key(self) -> Mapping[str, Any]: ...

    @property
    def draws(self) -> bool: ...

    def content(self, match: Match) -> Any: ...

    def compare(self, matches: Sequence[Match], seed: int, progress: Progress = silent) -> list[Judged]: ...


def number(value: Any, low: float = -math.inf, high: float = math.inf) -> Judged:
    """A value that somebody else returned, as a finite number of a range, or why it is none."""
    if value is None:
        return Failed("no number given")
    if isinstance(value, (str, bytes)):
        return Failed("a text in place of a number")
    try:
        found = float(value)
    except (TypeError, ValueError):
        return Failed(f"a {type(value).__name__} in place of a number")
    if math.isnan(found):
        return Failed("no number given")
    if math.isinf(found):
        return Failed("an infinite number")
    if not low <= found <= high:
        return Failed(f"a number outside {low:g} to {high:g}")
    return found


def as_given(
    prompt: str | Sequence[Message], *texts: str
) -> tuple[str | list[dict[str, Any]], list[str | list[dict[str, Any]]]]:
    """A prompt and its answers as TRL gives them to reward functions: messages with messages, text with text."""
    if isinstance(prompt, str):
        return prompt, list(texts)
    return [dict(turn) for turn in prompt], [[{"role": "assistant", "content": text}] for text in texts]


def _plain(prompt: str | Sequence[Message]) -> Any:
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
