"""What a stage of shaping takes and gives: the numbers of the whole batch of rollouts, gathered over all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np

from align.core.errors import ConfigError, raise_all
from align.core.options import build, check_all
from align.core.registry import Registry

SHAPING = Registry("shaping", "align.shaping")
"""Stages by id, found by their decorator."""

S = TypeVar("S", bound="type[ShapingStage]")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """N completions of G prompts.

    Attributes:
        group: int64 [N], 0 .. G-1, non-decreasing; groups are ragged.
        reward: float64 [N], NaN where the feedback is missing.
        length: int64 [N], scored tokens. finished: bool [N].
        mask: bool [N, T], scored tokens.
        log_ratio: float64 [N, T], log pi_old - log pi_ref of each token, 0 outside `mask`; None without a reference.
        advantage: float64 [N, T]; 0 before a stage makes it.
        train: bool [N], the completions that are trained on; the others keep their place in a group's statistics.
        state: arrays by name that controllers carry from step to step, and that a checkpoint saves.
        metrics: name -> number, for the log.
    """

    group: np.ndarray
    reward: np.ndarray
    length: np.ndarray
    finished: np.ndarray
    mask: np.ndarray
    advantage: np.ndarray
    train: np.ndarray
    log_ratio: np.ndarray | None = None
    state: Mapping[str, np.ndarray] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return int(self.group[-1]) + 1 if len(self.group) else 0


@dataclass(frozen=True, kw_only=True)
class ShapingStage(ABC):
    """A frozen dataclass of options and a pure function of a batch."""

    id: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_all(self, f"shaping `{self.id}`")

    @abstractmethod
    def __call__(self, batch: Batch) -> Batch:
        """The batch with what this stage changes."""


def shaping(id_: str) -> Callable[[S], S]:
    """Register a stage of this package under an id."""

    def mark(cls: S) -> S:
        cls.id = id_
        return cls

    return mark


def make(id_: str, options: Mapping[str, Any], where: str = "") -> ShapingStage:
    """A stage from its id and options.

    Raises:
        ConfigError: unknown id or option.
    """
    instance, errors = build(SHAPING.get(id_, where), f"shaping `{id_}`", dict(options))
    raise_all(errors)
    return instance  # type: ignore[no-any-return]


def run(stages: Sequence[ShapingStage], batch: Batch) -> Batch:
    """All stages in order.

    Raises:
        ConfigError: a stage needs a reference, and the batch has none.
    """
    for stage in stages:
        if stage.needs_reference and batch.log_ratio is None:
            raise ConfigError(
                f"shaping `{stage.id}` compares with a reference, and the method has none",
                mend="leave it out, or take a method with a reference",
            )
        batch = stage(batch)
    return batch
