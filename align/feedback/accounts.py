"""Feedback applied to groups, and the account of what came of it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from align.core.errors import AlignError, ConfigError
from align.core.progress import Progress, silent
from align.data.rollouts import RolloutGroup
from align.feedback.base import Feedback, Gives, Verdict

_log = logging.getLogger(__name__)
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Count:
    """Of one feedback: how many answers or comparisons were asked for, and why some are missing."""

    gives: Gives
    asked: int
    missing: Mapping[str, int] = field(default_factory=dict)

    @property
    def judged(self) -> int:
        return self.asked - sum(self.missing.values())

    def __add__(self, other: Count) -> Count:
        missing = Counter(self.missing) + Counter(other.missing)
        return Count(self.gives, self.asked + other.asked, dict(sorted(missing.items())))

    def __str__(self) -> str:
        what = "answers have a reward" if self.gives == "reward" else "comparisons were made"
        text = f"{self.judged} of {self.asked} {what}"
        if not self.missing:
            return text
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(self.missing.items()))
        return f"{text}, {self.asked - self.judged} are missing ({reasons})"


@dataclass(frozen=True)
class Account:
    """What came of the feedback on some groups; accounts add up.

    Attributes:
        counts: by the feedback's name.
        metrics: "name/metric" -> (sum, count).
        extras: "name/column" -> (row, K values) of each group of which a reward function logged any.
    """

    counts: Mapping[str, Count] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    extras: Mapping[str, list[tuple[str, list[Any]]]] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float]:
        """The mean of each metric; one that nothing was counted in is left out."""
        return {name: total / count for name, (total, count) in self.metrics.items() if count}

    @property
    def silent(self) -> list[str]:
        """Names of feedback that was asked and said nothing at all."""
        return [name for name, count in self.counts.items() if count.asked and not count.judged]

    def __add__(self, other: Account) -> Account:
        counts = dict(self.counts)
        for name, count in other.counts.items():
            counts[name] = counts[name] + count if name in counts else count
        metrics = dict(self.metrics)
        for name, (total, number) in other.metrics.items():
            before = metrics.get(name, (0.0, 0))
            metrics[name] = (before[0] + total, before[1] + number)
        extras = {name: list(values) for name, values in self.extras.items()}
        for name, values in other.extras.items():
            extras.setdefault(name, []).extend(values)
        return Account(counts, metrics, extras)

    def __str__(self) -> str:
        return " ".join(f"`{name}`: {count}." for name, count in self.counts.items())


def apply(
    feedbacks: Sequence[Feedback], groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent
) -> tuple[list[RolloutGroup], Account]:
    """The groups with every feedback's numbers in `Answer.rewards` and `RolloutGroup.wins`.

    A feedback that raises on a group costs that group's numbers, which are then missing; `ConfigError`s pass, for no
    group would fare better. Several feedbacks that give preferences are averaged; a comparison that one of them lacks
    is missing.

    Raises:
        ConfigError: two feedbacks of one name, or one that is set up wrongly or breaks its contract.
    """
    names = Counter(one.name for one in feedbacks)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"two feedbacks are named `{twice[0]}`", mend="give each a name of its own")
    account = Account()
    rewards: dict[str, list[list[float]]] = {}
    wins: list[list[np.ndarray]] = []
    for one in feedbacks:
        checked = [
            _checked(one, group, v) for group, v in zip(groups, _judge(one, groups, seed, progress), strict=True)
        ]
        account = account + _account(one, groups, checked)
        if one.gives == "reward":
            rewards[one.name] = [verdict.rewards or [] for verdict in checked]
        else:
            wins.append([verdict.wins for verdict in checked if verdict.wins is not None])
    for name in account.silent:
        _log.warning("feedback `%s` gave nothing: %s", name, account.counts[name])
    return [_filled(group, place, rewards, wins) for place, group in enumerate(groups)], account


def _judge(one: Feedback, groups: Sequence[RolloutGroup], seed: int, progress: Progress) -> list[Verdict]:
    try:
        verdicts = one.judge(groups, seed, progress)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - it may be a user's own; what it raises costs its own rows
        if len(groups) == 1:
            _log.warning("feedback `%s` on row %s: %s: %s", one.name, groups[0].row, type(error).__name__, error)
            return [_nothing(one, groups[0], _reason(error))]
        return [verdict for group in groups for verdict in _judge(one, [group], seed, silent)]
    if len(verdicts) != len(groups):
        raise _broken(one, f"it returned {len(verdicts)} verdicts for {len(groups)} groups")
    return verdicts


def _reason(error: Exception) -> str:
    return f"raised {type(error).__name__}" + (f": {error.what}" if isinstance(error, AlignError) else "")


def _nothing(one: Feedback, group: RolloutGroup, reason: str) -> Verdict:
    count = len(group)
    if one.gives == "reward":
        return Verdict([math.nan] * count, None, (reason,) * count, count)
    wins = np.full((count, count), np.nan)
    np.fill_diagonal(wins, 0.5)
    pairs = count * (count - 1) // 2
    return Verdict(None, wins, (reason,) * pairs, pairs)


def _checked(one: Feedback, group: RolloutGroup, verdict: Verdict) -> Verdict:
    """A verdict that keeps the contract: right shapes, and nothing but finite numbers, probabilities and NaN."""
    count = len(group)
    if one.gives == "reward":
        if verdict.rewards is None or len(verdict.rewards) != count:
            found = "no" if verdict.rewards is None else len(verdict.rewards)
            raise _broken(one, f"it returned {found} rewards for {count} answers")
        infinite = sum(map(math.isinf, verdict.rewards))
        if not infinite:
            return verdict
        finite = [math.nan if math.isinf(value) else float(value) for value in verdict.rewards]
        return replace(verdict, rewards=finite, failures=(*verdict.failures, *["an infinite number"] * infinite))
    wins = verdict.wins
    if wins is None or wins.shape != (count, count):
        found = "no comparisons" if wins is None else f"comparisons of shape {wins.shape}"
        raise _broken(one, f"it returned {found} for {count} answers")
    there = ~np.isnan(wins)
    sums = wins + wins.T
    if ((wins[there] < 0) | (wins[there] > 1)).any() or (np.abs(sums[there & there.T] - 1) > _TOLERANCE).any():
        raise _broken(one, "its comparisons are no probabilities with P[i, j] + P[j, i] = 1")
    return verdict


def _broken(one: Feedback, why: str) -> ConfigError:
    return ConfigError(
        f"the feedback `{one.name}` breaks its contract",
        why=why,
        mend="one verdict per group, one number per answer; NaN where there is none",
    )


def _account(one: Feedback, groups: Sequence[RolloutGroup], verdicts: Sequence[Verdict]) -> Account:
    account = Account({one.name: Count(one.gives, 0)})
    for group, verdict in zip(groups, verdicts, strict=True):
        metrics = {f"{one.name}/{name}": value for name, value in verdict.metrics.items()}
        row = str(group.row)
        extras = {f"{one.name}/{name}": [(row, list(values))] for name, values in verdict.extras.items()}
        missing = dict(sorted(Counter(verdict.failures).items()))
        account = account + Account({one.name: Count(one.gives, verdict.asked, missing)}, metrics, extras)
    return account


def _filled(
    group: RolloutGroup, place: int, rewards: Mapping[str, list[list[float]]], wins: Sequence[Sequence[np.ndarray]]
) -> RolloutGroup:
    answers = tuple(
        replace(answer, rewards={**answer.rewards, **{name: values[place][k] for name, values in rewards.items()}})
        for k, answer in enumerate(group.answers)
    )
    if not wins:
        return replace(group, answers=answers)
    return replace(group, answers=answers, wins=np.mean([matrices[place] for matrices in wins], axis=0))
