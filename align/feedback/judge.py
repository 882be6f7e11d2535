"""A language model as judge: a prompt file, a model that answers, and how its answers become numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from align.core.errors import ConfigError
from align.core.hashing import digest
from align.core.progress import Progress, silent
from align.core.seeds import derive
from align.data.rows import RowError
from align.feedback.base import Failed, Item, Judged, Match
from align.feedback.cache import JudgementCache
from align.feedback.judge_file import Asked, JudgeFile
from align.sampling.base import SamplingParams

Heard = Callable[[int, Any], None]
"""Told (number of the question, what came back) as soon as it is there: a paid answer is kept at once."""


class JudgeModel(Protocol):
    """What answers a judge's questions.

    Attributes:
        key: all that determines its answers.
    """

    @property
    def key(self) -> Mapping[str, Any]: ...

    def replies(
        self, asked: Mapping[int, Asked], n: int, params: SamplingParams, heard: Heard, seeds: Mapping[int, int]
    ) -> dict[int, Failed]:
        """`n` replies (list of texts) to each question, told to `heard`; why there are none, for the others.

        Args:
            asked: by number. A reply to a question is a function of it, its number and its seed, and not of the others.
        """
        ...

    def label_logps(self, asked: Mapping[int, Asked], labels: Sequence[str], heard: Heard) -> dict[int, Failed]:
        """For each question the log-probs of each label as the first token of the reply (list of floats)."""
        ...


@dataclass(frozen=True, eq=False)
class _Judge:
    """Args: file: the judge. model: what answers. cache: of raw replies, so that another way to read them is free."""

    file: JudgeFile
    model: JudgeModel
    cache: JudgementCache | None = None
    log: None = field(default=None, init=False)

    @property
    def key(self) -> Mapping[str, Any]:
        return {"kind": "judge", "file": self.file.digest, **self.model.key}

    @property
    def draws(self) -> bool:
        return self.file.read != "labels" and self.file.temperature > 0

    def _ask(self, given: Sequence[tuple[Any, Sequence[str]]], seed: int, progress: Progress) -> list[Judged]:
        """The number of each (group, texts)."""
        out: dict[int, Judged] = {}
        asked: dict[int, Asked] = {}
        for place, (group, texts) in enumerate(given):
            try:
                asked[place] = self.file.render(group, texts)
            except RowError as error:
                out[place] = Failed(error.reason)
        keys = self._reply_keys(asked, seed) if self.cache is not None else {}
        for place, key in keys.items():
            kept = self.cache.get(key) if self.cache is not None else None
            if kept is not None:
                out[place] = self._read(kept)
        progress(len(out))

        def heard(place: int, reply: Any) -> None:
            if self.cache is not None:
                self.cache.put(keys[place], reply)
            out[place] = self._read(reply)
            progress(1)

        missing = {place: one for place, one in asked.items() if place not in out}
        if missing:
            failed = self._answers(missing, seed, heard)
            out |= failed
            progress(len(failed))
            if self.cache is not None:
                self.cache.sync()
        return [out[place] for place in range(len(given))]

    def _answers(self, asked: Mapping[int, Asked], seed: int, heard: Heard) -> dict[int, Failed]:
        file = self.file
        if file.read == "labels":
            return self.model.label_logps(asked, list(file.labels), heard)
        params = SamplingParams(
            max_new_tokens=file.max_new_tokens, temperature=file.temperature, top_p=file.top_p, seed=seed
        )
        seeds = {place: derive(seed, "judge", one.system, one.user) for place, one in asked.items()}
        return self.model.replies(asked, file.samples, params, heard, seeds)

    def _read(self, reply: Any) -> Judged:
        """The number of what came back: the mean over replies that can be read, or over labels by probability."""
        if self.file.read == "labels":
            return expected(np.array(reply, dtype=np.float64), np.array(list(self.file.labels.values()), dtype=float))
        found = [self.file.parse(str(text)) for text in reply]
        numbers = [value for value in found if not isinstance(value, Failed)]
        if numbers:
            return float(np.mean(numbers))
        return next((value for value in found if isinstance(value, Failed)), Failed("the judge did not reply"))

    def _reply_keys(self, asked: Mapping[int, Asked], seed: int) -> dict[int, str]:
        """By number: of what determines the reply, and not of how it is read."""
        file, model = self.file, dict(self.model.key)
        if file.read == "labels":
            way: list[Any] = ["labels", *file.labels]
        else:
            way = ["replies", file.samples, file.temperature, file.top_p, file.max_new_tokens]
        drawn = seed if self.draws else None
        return {place: digest([model, one.system, one.user, way, drawn]) for place, one in asked.items()}


@dataclass(frozen=True, eq=False)
class PointJudge(_Judge):
    """A judge that scores one answer; a scorer."""

    def __post_init__(self) -> None:
        _check(self.file, "pointwise")

    def content(self, item: Item) -> Any:
        return item.content()

    def score(self, items: Sequence[Item], seed: int, progress: Progress = silent) -> list[Judged]:
        return self._ask([(item.group, (item.answer.text,)) for item in items], seed, progress)


@dataclass(frozen=True, eq=False)
class PairJudge(_Judge):
    """A judge that compares two answers, in the order shown; a comparer. `Compared(swap=True)` shows both orders."""

    def __post_init__(self) -> None:
        _check(self.file, "pairwise")

    def content(self, match: Match) -> Any:
        return match.content()

    def compare(self, matches: Sequence[Match], seed: int, progress: Progress = silent) -> list[Judged]:
        return self._ask([(match.group, match.texts) for match in matches], seed, progress)


def expected(logps: np.ndarray, values: np.ndarray) -> Judged:
    """sum_l value_l p_l / sum_l p_l over the labels: for Yes = 1 and No = 0 it is sigmoid(logp_yes - logp_no).

    Args:
        logps: [L], -inf for a label without probability. values: [L].
    """
    top = logps.max() if len(logps) else -np.inf
    if not np.isfinite(top) or np.isnan(logps).any():
        return Failed("the judge gives its labels no probability")
    weights = np.exp(logps - top)
    return float((weights * values).sum() / weights.sum())


def _check(file: JudgeFile, mode: str) -> None:
    if file.mode != mode:
        raise ConfigError(f"the judge `{file.name}` is {file.mode}, not {mode}", mend="use the other kind of judge")
