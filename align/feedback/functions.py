"""Reward functions and preference functions that users name: found, called with TRL's signature, checked.

    f(prompts, completions, completion_ids, **columns) -> a number, or None where there is none, per completion
    g(prompts, first, second, **columns)               -> P(first beats second), or None, per pair

Prompts that are messages come with completions that are messages. Both may be `async`, and take `log_extra(column,
values)` and `log_metric(name, value)`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.core.errors import ConfigError, suggestion
from align.core.hashing import digest, file_digest
from align.core.progress import Progress, silent
from align.data.groups import Message
from align.feedback.base import CallLog, Item, Judged, Match, as_given, number
from align.feedback.calling import accepted, call, each, place
from align.feedback.worker import Worker

RewardFunction = Callable[..., Sequence[float | None]]
_LOGS = ("log_extra", "log_metric")


@dataclass(frozen=True, eq=False)
class Reward:
    """A reward function under strict rules, for a measurement: any fault in it stops the run.

    Attributes:
        name: as the user wrote it.
        function: see the head of this file.
        source: digest of the file it is in, or nothing; part of what determines a result.
    """

    name: str
    function: RewardFunction
    source: str = ""

    def __call__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> np.ndarray:
        """float64 [N], NaN where the function says None or NaN. All have length N.

        Raises:
            ConfigError: the function raises, or returns something else than N numbers.
        """
        given: dict[str, Any] = {**columns, "log_extra": _unheard, "log_metric": _unheard}
        shown = [as_given(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        given |= {
            "prompts": [prompt for prompt, _ in shown],
            "completions": [texts[0] for _, texts in shown],
            "completion_ids": [list(map(int, ids)) for ids in completion_ids],
        }
        owner = f"the reward function `{self.name}`"
        given = accepted(self.function, given, owner, list(columns))
        try:
            answer = call(self.function, given, None)
        except (Exception, SystemExit) as error:  # whatever a user's function raises is theirs to see
            raise ConfigError(
                f"{owner} raises {type(error).__name__}",
                where=place(error),
                why=str(error),
                mend="mend the function, or let it return None for a completion that it cannot score",
            ) from error
        return np.array([self._number(value) for value in as_list(answer, len(completions), owner)], dtype=float)

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        owner = f"the reward function `{self.name}`"
        try:
            found = float(value)
        except (TypeError, ValueError):
            raise _wrong(owner, f"it returned a {type(value).__name__} as a reward") from None
        if math.isinf(found):
            raise _wrong(owner, f"it returned {found}")
        return found


def load_reward(name: str) -> Reward:
    """The reward function of `my_pkg.my_file:my_function`; a class is made without arguments.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    function, source = load_function(name)
    return Reward(name, function, source)


def load_function(name: str) -> tuple[Callable[..., Any], str]:
    """(the function of `my_pkg.my_file:my_function`, digest of its file); see `load_reward`."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(
            f"`{name}` is no name of a reward function", mend="write `my_pkg.my_file:my_function`, with the colon"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's file may raise anything
        raise ConfigError(
            f"cannot import `{module_name}` for the reward `{name}`",
            where=place(error) if not isinstance(error, ModuleNotFoundError) else "",
            why=f"{type(error).__name__}: {error}",
            mend="run from the folder that holds it, or install it",
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"`{module_name}` has no `{attribute}`", mend=suggestion(attribute, public))
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise ConfigError(
                f"the reward class `{name}` cannot be made without arguments",
                why=str(error),
                mend="name a function, or an object",
            ) from error
    if not callable(found):
        raise ConfigError(f"`{name}` is not a function but {type(found).__name__}")
    file = getattr(module, "__file__", None)
    return found, file_digest(file) if file and Path(file).is_file() else ""


@dataclass(frozen=True, eq=False)
class _Called:
    """A user's function and how it is called.

    Args:
        name: `my_file:my_function`, or any name where `function` is given and not isolated.
        deadline: seconds of one call; None waits for ever.
        isolate: call it in a process of its own, which is ended at the deadline: a function that hangs, or takes its
            process with it, then costs its own rows. Without it a hanging call is left behind as a thread.
        batch: most completions (or pairs) of one call.
    """

    name: str
    function: Callable[..., Any]
    source: str = ""
    deadline: float | None = 60.0
    isolate: bool = False
    batch: int = 64
    log: CallLog = field(default_factory=CallLog)
    _worker: list[Worker] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.isolate:
            self._worker.append(Worker(self.name))

    @property
    def key(self) -> Mapping[str, Any]:
        return {"kind": type(self).__name__, "function": self.name, "source": self.source}

    @property
    def draws(self) -> bool:
        return False

    def called(self, items: Sequence[Item], columns: Mapping[str, list[Any]], given: dict[str, Any]) -> list[Any]:
        """The N values of one call; what it logged is noted."""
        count = len(next(iter(given.values())))
        metrics: list[tuple[str, float]] = []
        extras: list[tuple[str, Sequence[Any]]] = []
        owner = f"the function `{self.name}`"
        logs = {"log_extra": lambda name, values: extras.append((name, list(values)))}
        logs["log_metric"] = lambda name, value: metrics.append((name, float(value)))
        every = accepted(self.function, {**columns, **given, **logs}, owner, list(columns))
        if self._worker:
            heard = tuple(name for name in _LOGS if every.pop(name, None) is not None)
            values, metrics, extras = self._worker[0].call(every, heard, self.deadline)
        else:
            values = call(self.function, every, self.deadline)
        found = as_list(values, count, owner)
        self.log.add(items, metrics, extras)
        return found

    def close(self) -> None:
        """End the process of an isolated function."""
        for worker in self._worker:
            worker.close()


@dataclass(frozen=True, eq=False)
class RewardCall(_Called):
    """A reward function as a scorer: what fails is missing, and costs only its own rows."""

    def content(self, item: Item) -> Any:
        row = sorted((name, repr(value)) for name, value in item.group.columns.items())
        return [*item.content(), digest(item.answer.ids), row]

    def score(self, items: Sequence[Item], seed: int, progress: Progress = silent) -> list[Judged]:
        """See `Scorer.score`.

        Raises:
            ConfigError: the function returns a list of the wrong length, or needs a column that there is not.
        """

        def work(part: Sequence[Item]) -> list[Judged]:
            shown = [as_given(item.group.prompt, item.answer.text) for item in part]
            given = {
                "prompts": [prompt for prompt, _ in shown],
                "completions": [texts[0] for _, texts in shown],
                "completion_ids": [list(map(int, item.answer.ids)) for item in part],
            }
            values = self.called(part, columns_of(part), given)
            return [number(value) for value in values]

        return each(work, items, self.batch, f"reward function `{self.name}`", progress=progress)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class PreferenceCall(_Called):
    """A function that compares two answers, as a comparer."""

    def content(self, match: Match) -> Any:
        return [*match.content(), sorted((name, repr(value)) for name, value in match.group.columns.items())]

    def compare(self, matches: Sequence[Match], seed: int, progress: Progress = silent) -> list[Judged]:
        def work(part: Sequence[Match]) -> list[Judged]:
            shown = [as_given(match.group.prompt, *match.texts) for match in part]
            given = {
                "prompts": [prompt for prompt, _ in shown],
                "first": [texts[0] for _, texts in shown],
                "second": [texts[1] for _, texts in shown],
            }
            values = self.called((), columns_of(part), given)
            return [number(value, 0, 1) for value in values]

        return each(work, matches, self.batch, f"preference function `{self.name}`", progress=progress)  # type: ignore[arg-type]


def reward_function(name: str, **options: Any) -> RewardCall:
    """The reward function `my_file:my_function` as a scorer; options are those of `RewardCall`."""
    function, source = load_function(name)
    return RewardCall(name, function, source, **options)


def preference_function(name: str, **options: Any) -> PreferenceCall:
    """The preference function `my_file:my_function` as a comparer."""
    function, source = load_function(name)
    return PreferenceCall(name, function, source, **options)


def columns_of(items: Sequence[Item] | Sequence[Match]) -> dict[str, list[Any]]:
    """The rows' columns, one value per item; None where a row lacks one that others have."""
    names = sorted({name for item in items for name in item.group.columns})
    return {name: [item.group.columns.get(name) for item in items] for name in names}


def as_list(answer: Any, count: int, owner: str) -> list[Any]:
    """What a function returned, as a list of `count` values.

    Raises:
        ConfigError: it is no list, or of another length.
    """
    try:
        values = list(answer)
    except TypeError:
        raise _wrong(owner, f"it returned {type(answer).__name__}, not a list") from None
    if len(values) != count:
        raise _wrong(owner, f"it returned {len(values)} rewards for {count} completions")
    return values


def _wrong(owner: str, why: str) -> ConfigError:
    return ConfigError(
        f"{owner} does not give one number per completion",
        why=why,
        mend="return a list with a float, or None where there is no reward, for each completion",
    )


def _unheard(name: str, value: Any) -> None:
    """A measurement keeps no log of what reward functions say beside."""


__all__ = [
    "PreferenceCall",
    "Reward",
    "RewardCall",
    "RewardFunction",
    "load_reward",
    "preference_function",
    "reward_function",
]
