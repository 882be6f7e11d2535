"""What a stage of shaping takes and gives: the numbers of the whole batch of rollouts, gathered over all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    @property
    def present(self) -> np.ndarray:
        """bool [N], the completions whose reward is there."""
        return ~np.isnan(self.reward)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of `values` [N] over the completions of each group whose reward is there, float64 [G]."""
        return np.bincount(self.group, weights=np.where(self.present, values, 0.0), minlength=self.groups)

    def with_metrics(self, **metrics: float) -> Batch:
        return replace(self, metrics={**self.metrics, **metrics})

    def with_advantage(self, values: np.ndarray) -> Batch:
        """One advantage [N] a completion, at each of its scored tokens; no reward, no advantage and no training."""
        there = self.present
        given = np.where(there, values, 0.0)[:, None]
        return replace(self, advantage=np.where(self.mask, given, 0.0), train=self.train & there)


@dataclass(frozen=True, kw_only=True)
class ShapingStage(ABC):
    """A frozen dataclass of options and a pure function of a batch."""

    id: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_all(self, f"shaping `{self.id}`")
        self.check()

    def check(self) -> None:  # noqa: B027  most stages have nothing to refuse
        """Refuse combinations of options; ranges of single options are declared, not checked here."""

    @property
    def needs_reference(self) -> bool:
        """Whether it reads `log_ratio`."""
        return False

    @abstractmethod
    def __call__(self, batch: Batch) -> Batch:
        """The batch with what this stage changes."""


def shaping(id_: str, *, paper: str = "") -> Callable[[S], S]:
    """Register a stage of this package under an id."""

    def mark(cls: S) -> S:
        cls.id, cls.paper = id_, paper
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
    """All stages in order; completions without a reward are not trained on, whatever the stages.

    `metrics` tell of the rewards as they came (`reward`, `reward_std`, `reward_missing`, `frac_reward_zero_std`), of
    what is trained on (`trained_share`, of completions) and of its `advantage_abs_mean`, over tokens.

    Raises:
        ConfigError: a stage needs a reference, and the batch has none; or a group is too small for a baseline.
    """
    for stage in stages:
        if stage.needs_reference and batch.log_ratio is None:
            raise ConfigError(
                f"shaping `{stage.id}` compares with a reference, and the method has none",
                mend="leave it out, or take a method with a reference",
            )
    made = replace(batch, train=batch.train & batch.present)
    for stage in stages:
        made = stage(made)
    return made.with_metrics(**_raw(batch), **_trained(made))


def equal_groups(batch: Batch) -> np.ndarray:
    """bool [G], the groups whose rewards, where there are any, are all the same."""
    highest, lowest = np.full(batch.groups, -np.inf), np.full(batch.groups, np.inf)
    there = batch.present
    np.maximum.at(highest, batch.group[there], batch.reward[there])
    np.minimum.at(lowest, batch.group[there], batch.reward[there])
    return highest <= lowest


def _raw(batch: Batch) -> dict[str, float]:
    if not len(batch.reward):
        return {}
    there = batch.reward[batch.present]
    found = {"reward_missing": 1.0 - len(there) / len(batch.reward)}
    if len(there):
        found["reward"] = float(there.mean())
        found["frac_reward_zero_std"] = float(equal_groups(batch).mean())
    return found | ({"reward_std": float(there.std(ddof=1))} if len(there) > 1 else {})


def _trained(batch: Batch) -> dict[str, float]:
    if not len(batch.train):
        return {}
    tokens = batch.advantage[batch.mask & batch.train[:, None]]
    found = {"trained_share": float(batch.train.mean())}
    return found | ({"advantage_abs_mean": float(np.abs(tokens).mean())} if len(tokens) else {})
