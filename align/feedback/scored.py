"""Feedback out of scorers and comparers: what is asked for, what is remembered, and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from align.core.errors import ConfigError
from align.core.hashing import digest
from align.core.progress import Progress, silent
from align.core.seeds import generator
from align.data.comparisons import Pair, play
from align.data.rollouts import RolloutGroup
from align.feedback.base import Comparer, Failed, Gives, Item, Judged, Match, Scorer, Verdict
from align.feedback.cache import JudgementCache

Opponents = Literal["all", "first", "random", "tournament"]
"""Whom an answer is compared with: every other, the first of its group, some at random, or a knock-out."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Rewards by a scorer.

    Args:
        cache: remembers numbers by content; missing ones are asked for again.
    """

    name: str
    scorer: Scorer
    cache: JudgementCache | None = None
    gives: Gives = field(default="reward", init=False)

    @property
    def key(self) -> Mapping[str, Any]:
        return self.scorer.key

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        items = [Item(group, index) for group in groups for index in range(len(group))]

        def ask(missing: Sequence[int]) -> list[Judged]:
            return self.scorer.score([items[i] for i in missing], seed, progress)

        def key(place: int) -> str:
            return _key(self.scorer, seed, self.scorer.content(items[place]))

        values = _remembered(self.cache, key, len(items), ask, progress)
        metrics, logged = self.scorer.log.take(items) if self.scorer.log is not None else ({}, [{}] * len(items))
        found, rows = iter(values), iter(logged)
        verdicts = []
        for place, group in enumerate(groups):
            own = [next(found) for _ in group.answers]
            said = [next(rows) for _ in group.answers]
            columns = {name: [row.get(name) for row in said] for name in sorted({n for row in said for n in row})}
            failures = tuple(value.reason for value in own if isinstance(value, Failed))
            rewards = [float("nan") if isinstance(value, Failed) else value for value in own]
            # Metrics are of the whole call: they are noted with its first group.
            verdicts.append(Verdict(rewards, None, failures, len(own), {} if place else metrics, columns))
        return verdicts


@dataclass(frozen=True, eq=False)
class Compared:
    """Preferences by a comparer.

    Answers of the same text are tied, and not asked about.

    Args:
        swap: show every pair in both orders; P is the mean of both, so a judge who always says the first gives 1/2. A
            pair of which one order is missing is missing.
        opponents: see `Opponents`; comparisons grow with K^2 under `all` only.
        rivals: under `random`, how many others each answer is compared with.
        cache: remembers numbers by content and order.
    """

    name: str
    comparer: Comparer
    swap: bool = True
    opponents: Opponents = "all"
    rivals: int = 1
    cache: JudgementCache | None = None
    gives: Gives = field(default="preference", init=False)

    def __post_init__(self) -> None:
        if self.rivals < 1:
            raise ConfigError(f"`{self.name}`: `rivals` is {self.rivals}", mend="use 1 or more")

    @property
    def key(self) -> Mapping[str, Any]:
        own = {"swap": self.swap, "opponents": self.opponents}
        return {**self.comparer.key, **own, **({"rivals": self.rivals} if self.opponents == "random" else {})}

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        plans = [self._plan(group, seed) for group in groups]
        asked: dict[int, list[Pair]] = {}
        for place, plan in enumerate(plans):
            if (pairs := next(plan, None)) is not None:
                asked[place] = pairs
        notes: list[dict[Pair, Judged]] = [{} for _ in groups]
        shown: list[tuple[float, int]] = [(0.0, 0)] * len(groups)
        while asked:
            matches = [Match(groups[place], *pair) for place, pairs in asked.items() for pair in pairs]
            answers, first = self._compare(matches, seed, progress)
            results, firsts = iter(answers), iter(first)
            further: dict[int, list[Pair]] = {}
            for place, pairs in asked.items():
                own = [next(results) for _ in pairs]
                for value in (next(firsts) for _ in pairs):
                    shown[place] = (shown[place][0] + value[0], shown[place][1] + value[1])
                notes[place].update(zip(pairs, own, strict=True))
                try:
                    further[place] = plans[place].send([np.nan if isinstance(v, Failed) else v for v in own])
                except StopIteration:
                    continue
            asked = further
        return [
            _matrix(group, known, seen if self.swap else (0.0, 0))
            for group, known, seen in zip(groups, notes, shown, strict=True)
        ]

    def _plan(self, group: RolloutGroup, seed: int) -> Generator[list[Pair], list[float], Any]:
        if self.opponents == "tournament":
            return play(len(group))
        rng = generator(seed, "opponents", str(group.row))
        return _once(list(pairs(len(group), self.opponents, self.rivals, rng)))

    def _compare(
        self, matches: Sequence[Match], seed: int, progress: Progress
    ) -> tuple[list[Judged], list[tuple[float, int]]]:
        """P of each match; and (sum, count) of the probability given to the answer that was shown first."""
        live = [place for place, match in enumerate(matches) if match.texts[0] != match.texts[1]]
        turns = [matches[place] for place in live]
        ordered = [*turns, *(match.turned for match in turns)] if self.swap else turns
        half = len(turns)

        def ask(missing: Sequence[int]) -> list[Judged]:
            return self.comparer.compare([ordered[i] for i in missing], seed, progress)

        def key(place: int) -> str:
            return _key(self.comparer, seed, self.comparer.content(ordered[place]))

        values = _remembered(self.cache, key, len(ordered), ask, progress)
        out: list[Judged] = [0.5] * len(matches)
        firsts = [(0.0, 0)] * len(matches)
        for place, index in zip(live, range(half), strict=True):
            there = values[index]
            back = values[index + half] if self.swap else None
            if back is None or isinstance(there, Failed):
                out[place] = there
            elif isinstance(back, Failed):
                out[place] = back
            else:
                out[place] = (there + 1 - back) / 2
                firsts[place] = (there + back, 2)
        return out, firsts


def pairs(count: int, opponents: Opponents, rivals: int, rng: np.random.Generator) -> Iterator[Pair]:
    """The pairs (i, j), i < j, that are compared among `count` answers, each once."""
    if opponents == "all":
        yield from ((i, j) for i in range(count) for j in range(i + 1, count))
    elif opponents == "first":
        yield from ((0, j) for j in range(1, count))
    elif opponents == "random":
        chosen = set()
        for i in range(count):
            others = [j for j in range(count) if j != i]
            for j in rng.choice(others, min(rivals, len(others)), replace=False) if others else ():
                chosen.add((min(i, int(j)), max(i, int(j))))
        yield from sorted(chosen)
    else:
        raise ConfigError(f"there are no opponents `{opponents}`", mend="use all, first, random or tournament")


def _once(asked: list[Pair]) -> Generator[list[Pair], list[float], None]:
    if asked:
        yield asked


def _matrix(group: RolloutGroup, known: Mapping[Pair, Judged], first: tuple[float, int]) -> Verdict:
    count = len(group)
    wins = np.full((count, count), np.nan)
    np.fill_diagonal(wins, 0.5)
    failures = []
    for (i, j), value in known.items():
        if isinstance(value, Failed):
            failures.append(value.reason)
        else:
            wins[i, j], wins[j, i] = value, 1 - value
    metrics = {"first_position": first} if first[1] else {}
    return Verdict(None, wins, tuple(failures), len(known), metrics)


def _key(judge: Scorer | Comparer, seed: int, content: Any) -> str:
    return digest([dict(judge.key), content, seed if judge.draws else None])


def _remembered(
    cache: JudgementCache | None,
    key: Callable[[int], str],
    count: int,
    ask: Callable[[Sequence[int]], list[Judged]],
    progress: Progress,
) -> list[Judged]:
    """The numbers of `count` things: remembered ones, and the rest by `ask(indices)`; what fails is not remembered."""
    if cache is None:
        return _right(ask(range(count)), count) if count else []
    keys = [key(index) for index in range(count)]
    values: dict[int, Judged] = {}
    for index, name in enumerate(keys):
        kept = cache.get(name)
        if isinstance(kept, (int, float)):
            values[index] = float(kept)
    progress(len(values))
    missing = [index for index in range(count) if index not in values]
    if missing:
        for index, value in zip(missing, _right(ask(missing), len(missing)), strict=True):
            values[index] = value
            if not isinstance(value, Failed):
                cache.put(keys[index], value)
        cache.sync()
    return [values[index] for index in range(count)]


def _right(values: list[Judged], count: int) -> list[Judged]:
    if len(values) != count:
        raise ConfigError(f"a judge returned {len(values)} numbers for {count} questions")
    return values
