"""Reward functions that users name: found, called with TRL's signature, and their answers checked."""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.core.errors import ConfigError, suggestion
from align.core.hashing import file_digest
from align.data.groups import Message

RewardFunction = Callable[..., Sequence[float | None]]
"""f(prompts=, completions=, completion_ids=, **columns) -> one number, or None where there is none, per completion."""


@dataclass(frozen=True, eq=False)
class Reward:
    """A reward function.

    Attributes:
        name: as the user wrote it.
        function: see `RewardFunction`.
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
        """float64 [N], NaN where the function says None or NaN.

        Prompts that are messages get completions that are messages, as TRL gives them; texts get texts. All have
        length N.

        Raises:
            ConfigError: the function raises, or returns something else than N numbers.
        """
        given: dict[str, Any] = dict(columns)
        given |= {
            "prompts": [prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt] for prompt in prompts],
            "completions": [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, completions, strict=True)
            ],
            "completion_ids": [list(map(int, ids)) for ids in completion_ids],
        }
        try:
            answer = self.function(**_accepted(self.function, given))
        except Exception as error:  # whatever a user's function raises is theirs to see
            raise ConfigError(
                f"the reward function `{self.name}` raises {type(error).__name__}",
                where=_where(error),
                why=str(error),
                mend="mend the function, or let it return None for a completion that it cannot score",
            ) from error
        return self._checked(answer, len(completions))

    def _checked(self, answer: Any, count: int) -> np.ndarray:
        try:
            values = list(answer)
        except TypeError:
            raise self._wrong(f"it returned {type(answer).__name__}, not a list") from None
        if len(values) != count:
            raise self._wrong(f"it returned {len(values)} rewards for {count} completions")
        return np.array([self._number(value) for value in values], dtype=float)

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self._wrong(f"it returned a {type(value).__name__} as a reward") from None
        if math.isinf(number):
            raise self._wrong(f"it returned {number}")
        return number

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(
            f"the reward function `{self.name}` does not give one number per completion",
            why=why,
            mend="return a list with a float, or None where there is no reward, for each completion",
        )


def load_reward(name: str) -> Reward:
    """The reward function of `my_pkg.my_file:my_function`; a class is made without arguments.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
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
            where=_where(error) if not isinstance(error, ModuleNotFoundError) else "",
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
    return Reward(name, found, file_digest(file) if file and Path(file).is_file() else "")


def _accepted(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What the function's signature takes: columns that it does not name are left out where it has no `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return given
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return given
    return {name: value for name, value in given.items() if name in {parameter.name for parameter in parameters}}


def _where(error: BaseException) -> str:
    """The file and line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
