"""Preference models: P(first beats second) from a model that reads both answers, or from a reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from align.core.errors import ConfigError
from align.core.progress import Progress, silent
from align.core.seeds import generator
from align.data.rollouts import RolloutGroup
from align.feedback.base import Failed, Feedback, Gives, Judged, Match, Verdict
from align.feedback.judge_file import JudgeFile
from align.feedback.reward_model import read_rows
from align.feedback.scored import Opponents, pairs
from align.feedback.sequences import Classifier, Valued, column_of, load_sequencer


@dataclass(frozen=True, eq=False)
class PairwiseModel:
    """P(first beats second) by a sequence classification model that reads a rendering of both answers (PairRM's way).

    With one label P = sigmoid(logit); with several, the probability of `label` (the first one wins).

    Args:
        file: how prompt and answers are rendered; read as plain text, its `system` before its `prompt`.
        max_length: most tokens; longer matches are missing, never cut.
    """

    read: Classifier | Valued
    tokenizer: Any
    file: JudgeFile
    label: str | int | None = None
    max_length: int | None = None
    draws: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        column_of(self.read, self.label)
        if self.file.mode != "pairwise":
            raise ConfigError(f"the prompt `{self.file.name}` shows one answer", mend="use one with `mode: pairwise`")

    @classmethod
    def open(
        cls,
        name: str,
        file: JudgeFile,
        dtype: str = "auto",
        device: str | None = None,
        budget: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> PairwiseModel:
        """From a folder or hub id. Raises as `load_sequencer`."""
        read, tokenizer = load_sequencer(name, dtype, device, budget, trust_remote_code)
        return cls(read, tokenizer, file, **options)

    @property
    def key(self) -> Mapping[str, Any]:
        own = {"label": self.label, "max_length": self.max_length, "file": self.file.digest}
        return {"kind": "pairwise", **self.read.key, **own}

    def content(self, match: Match) -> Any:
        return match.content()

    def compare(self, matches: Sequence[Match], seed: int, progress: Progress = silent) -> list[Judged]:
        """See `Comparer.compare`."""
        limit = self.max_length or self.read.positions
        column = column_of(self.read, self.label)

        def rendered(match: Match) -> list[int]:
            asked = self.file.render(match.group, match.texts)
            text = f"{asked.system}\n\n{asked.user}" if asked.system else asked.user
            return [int(token) for token in self.tokenizer(text, verbose=False)["input_ids"]]

        logits = read_rows(self.read, matches, rendered, column, limit, "missing", progress)
        return [value if isinstance(value, Failed) else sigmoid(value) for value in logits]


@dataclass(frozen=True, eq=False)
class FromRewards:
    """Preferences out of a feedback that gives rewards: the Bradley-Terry model of them.

    Args:
        rule: `sigmoid` is P = sigmoid(scale * (r_i - r_j)); `hard` is 1, 0, or 1/2 for equal rewards.
        opponents, rivals: as for `Compared`; comparing costs nothing here, so all by default.
    """

    feedback: Feedback
    rule: Literal["sigmoid", "hard"] = "sigmoid"
    scale: float = 1.0
    opponents: Opponents = "all"
    rivals: int = 1
    gives: Gives = field(default="preference", init=False)

    def __post_init__(self) -> None:
        if self.feedback.gives != "reward":
            raise ConfigError(f"`{self.feedback.name}` gives preferences already", mend="use it as it is")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"`scale` is {self.scale}", mend="use a finite number above 0")

    @property
    def name(self) -> str:
        return self.feedback.name

    @property
    def key(self) -> Mapping[str, Any]:
        own = {"rule": self.rule, "scale": self.scale, "opponents": self.opponents, "rivals": self.rivals}
        return {"kind": "from_rewards", "of": dict(self.feedback.key), **own}

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        verdicts = self.feedback.judge(groups, seed, progress)
        return [self._compared(group, one, seed) for group, one in zip(groups, verdicts, strict=True)]

    def _compared(self, group: RolloutGroup, verdict: Verdict, seed: int) -> Verdict:
        rewards = np.asarray(verdict.rewards, dtype=np.float64)
        gaps = rewards[:, None] - rewards[None, :]
        if self.rule == "hard":
            every = np.where(np.isnan(gaps), np.nan, (np.sign(gaps) + 1) / 2)
        else:
            every = 0.5 * (1 + np.tanh(self.scale * gaps / 2))
        wins = np.full_like(every, np.nan)
        np.fill_diagonal(wins, 0.5)
        rng = generator(seed, "opponents", str(group.row))
        asked = list(pairs(len(group), self.opponents, self.rivals, rng))
        for i, j in asked:
            wins[i, j], wins[j, i] = every[i, j], every[j, i]
        missing = sum(bool(np.isnan(every[pair])) for pair in asked)
        reason = "a reward is missing" + (f" ({verdict.failures[0]})" if verdict.failures else "")
        return Verdict(None, wins, (reason,) * missing, len(asked), verdict.metrics, verdict.extras)


def sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
