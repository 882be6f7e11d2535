"""One pass over the rows of a stream: what is kept and why not, duplicates, refusals, characters, labels."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.core.progress import Progress, silent
from align.data.doctor import texts
from align.data.doctor.benchmarks import Benchmarks
from align.data.doctor.numbers import evenly, mean, quantiles, share
from align.data.groups import Group, RowId
from align.data.prepare import Opened
from align.data.rows import BadRow, Row, RowError
from align.data.views import PairRule, Selection, select

EXAMPLES = 3
_CHUNK = 1024
_EXCERPT = 120
_TOP = 10


@dataclass(frozen=True)
class Wanted:
    """What is made of a row: see `Tokeniser`."""

    view: str
    needs: frozenset[str] = frozenset()
    pairs: PairRule = "best_worst"


class Reasons:
    """Why rows were left out: a count and three examples a reason, bad and dropped apart."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, bool]] = Counter()
        self.examples: dict[tuple[str, bool], list[dict[str, str]]] = {}

    def add(self, row: RowId, error: RowError | BadRow, value: Row | None) -> None:
        dropped = isinstance(error, RowError) and error.dropped
        reason = f"`{error.field}`: {error.reason}" if error.field else error.reason
        self.counts[reason, dropped] += 1
        examples = self.examples.setdefault((reason, dropped), [])
        if len(examples) < EXAMPLES:
            examples.append({"row": str(row), "text": excerpt(value, error.field)})

    def total(self, dropped: bool) -> int:
        return sum(count for (_, kind), count in self.counts.items() if kind == dropped)

    def matching(self, *words: str) -> int:
        """Rows whose reason holds one of the words."""
        return sum(count for (reason, _), count in self.counts.items() if any(word in reason for word in words))

    def report(self) -> list[dict[str, Any]]:
        return [
            {
                "reason": reason,
                "kind": "dropped" if dropped else "bad",
                "count": count,
                "examples": self.examples[reason, dropped],
            }
            for (reason, dropped), count in self.counts.most_common()
        ]


class Seen:
    """How often a key came before, and where first. Keys are hashes of this process: 64 bits."""

    def __init__(self) -> None:
        self.first: dict[int, int] = {}
        self.repeats = 0
        self.examples: list[tuple[int, int]] = []

    def add(self, key: int, index: int) -> None:
        first = self.first.setdefault(key, index)
        if first != index:
            self.repeats += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append((first, index))


@dataclass
class Answers:
    """Answers of one role: winner, loser, desirable, undesirable or answer."""

    count: int = 0
    refusals: int = 0
    characters: array[int] = field(default_factory=lambda: array("q"))

    def add(self, text: str) -> None:
        self.count += 1
        self.refusals += texts.refuses(text)
        self.characters.append(len(text))


def excerpt(value: Row | None, field: str) -> str:
    """The part of a row that an example shows, shortened."""
    if value is None:
        return ""
    text = json.dumps(value.get(field, value), ensure_ascii=False, default=str)
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."


def roles_of(chosen: Selection) -> Iterator[tuple[str, int]]:
    """(role, index) of every answer that is used; of a pair two, else by its label, or just `answer`."""
    if chosen.preferences:
        for pair in chosen.preferences:
            yield "winner", pair.winner
            yield "loser", pair.loser
        return
    for place, completion in enumerate(chosen.completions):
        yield role_of(completion.label), place


def role_of(label: bool | None) -> str:
    return "answer" if label is None else ("desirable" if label else "undesirable")


class RowPass:
    """Reads the rows of a stream once.

    Args:
        opened: the sources and their readers, end to end.
        wanted: the view.
        limit: most rows read, evenly spaced; None for all.
        sample: so many groups are kept for what needs tokens, evenly spaced among the rows read.
    """

    def __init__(self, opened: Sequence[Opened], wanted: Wanted, limit: int | None, sample: int) -> None:
        self.opened, self.wanted = list(opened), wanted
        self.total = sum(len(one.source) for one in opened)
        self.indices = evenly(self.total, self.total if limit is None else limit)
        self._sampled = {self.indices[place] for place in evenly(len(self.indices), sample)}
        self.sample: list[Group] = []
        self.reasons = Reasons()
        self.read = self.kept = self.ties = self.kept_ties = 0
        self.prompts, self.rows, self.contradictions = Seen(), Seen(), Seen()
        self.questions: dict[int, int] = {}
        self._verdicts: dict[int, tuple[int, int]] = {}
        self.answers: dict[str, Answers] = {}
        self.differences: array[int] = array("q")
        self.labels: Counter[bool] = Counter()
        self.rewards: array[float] = array("d")
        self.gaps: array[float] = array("d")
        self.probabilities: array[float] = array("d")
        self.annotators: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.prompt_characters: array[int] = array("q")
        self.benchmarks = Benchmarks()

    def run(self, advance: Progress = silent) -> None:
        for number, start, rows in self._chunks():
            one = self.opened[number]
            for row, value in zip(rows, one.source.read(rows), strict=True):
                self._row(one, row, start + row, value)
            advance(len(rows))

    def _chunks(self) -> Iterator[tuple[int, int, list[int]]]:
        """(number of the source, index of its first row, rows of it)."""
        start, place = 0, 0
        for number, one in enumerate(self.opened):
            end = start + len(one.source)
            while place < len(self.indices) and self.indices[place] < end:
                stop = min(place + _CHUNK, len(self.indices))
                rows = [index - start for index in self.indices[place:stop] if index < end]
                place += len(rows)
                yield number, start, rows
            start = end

    def _row(self, one: Opened, row: int, index: int, value: Row | BadRow) -> None:
        self.read += 1
        row_id = one.source.row_id(row)
        if isinstance(value, BadRow):
            self.reasons.add(row_id, value, None)
            return
        self.benchmarks.row(value, row_id)
        try:
            whole = one.reader(value, row_id)
            wanted = self.wanted
            chosen = select(whole, wanted.view, wanted.pairs, "ties" in wanted.needs, "reward" in wanted.needs)
        except RowError as error:
            self.ties += error.dropped and error.reason == "a tie"
            self.reasons.add(row_id, error, value)
            return
        self._kept(whole, chosen, index)

    def _kept(self, group: Group, chosen: Selection, index: int) -> None:
        self.kept += 1
        prompt = texts.prompt_text(group.prompt)
        answers = [completion.text for completion in chosen.completions]
        marks = [hash(answer.strip()) for answer in answers]
        self.prompt_characters.append(len(prompt))
        key = hash(texts.normal(prompt))
        self.prompts.add(key, index)
        question = key if isinstance(group.prompt, str) else hash(texts.normal(texts.question(group.prompt)))
        self.questions.setdefault(question, index)
        judged: list[Any] = [key]
        for role, place in roles_of(chosen):
            if role not in self.answers:
                self.answers[role] = Answers()
            self.answers[role].add(answers[place])
            judged += (role, marks[place])
        self.rows.add(hash(tuple(judged)), index)
        if group.annotator:
            self.annotators[group.annotator] += 1
        self._pairs(chosen, answers, marks, key, index)
        self._absolute(chosen, answers, marks, key, index)
        if index in self._sampled:
            # To select from it again changes nothing.
            self.sample.append(replace(group, completions=chosen.completions, preferences=chosen.preferences))
            self.languages[texts.language(max([prompt, *answers], key=len))] += 1

    def _pairs(self, chosen: Selection, answers: list[str], marks: list[int], prompt: int, index: int) -> None:
        for pair in chosen.preferences:
            self.differences.append(len(answers[pair.winner]) - len(answers[pair.loser]))
            self.kept_ties += pair.tie
            if pair.margin is not None:
                self.gaps.append(pair.margin)
            if pair.probability is not None:
                self.probabilities.append(pair.probability)
            if not pair.tie:
                self._verdict(hash((prompt, marks[pair.winner] ^ marks[pair.loser])), marks[pair.winner], index)

    def _absolute(self, chosen: Selection, answers: list[str], marks: list[int], prompt: int, index: int) -> None:
        """Rewards and labels."""
        rewards = [completion.reward for completion in chosen.completions if completion.reward is not None]
        self.rewards.extend(rewards)
        if not chosen.preferences and len(rewards) > 1:
            self.gaps.append(max(rewards) - min(rewards))
            best, worst = (rewards.index(pick(rewards)) for pick in (max, min))
            if best != worst:
                self.differences.append(len(answers[best]) - len(answers[worst]))
        for completion, mark in zip(chosen.completions, marks, strict=True):
            if completion.label is not None:
                self.labels[completion.label] += 1
                self._verdict(hash((prompt, mark)), int(completion.label), index)

    def _verdict(self, key: int, verdict: int, index: int) -> None:
        """Count a row that says the opposite of the first that judged the same."""
        before, first = self._verdicts.setdefault(key, (verdict, index))
        if before != verdict:
            self.contradictions.repeats += 1
            if len(self.contradictions.examples) < EXAMPLES:
                self.contradictions.examples.append((first, index))

    # -- the numbers ----------------------------------------------------------------------------------------------

    def name(self, index: int) -> str:
        """The id of a row by its index over all sources."""
        for one in self.opened:
            if index < len(one.source):
                return str(one.source.row_id(index))
            index -= len(one.source)
        raise IndexError(index)

    def report(self) -> dict[str, Any]:
        """The part of the report that all rows tell; `all_read` says whether they are all."""
        bad, dropped = self.reasons.total(False), self.reasons.total(True)
        return {
            "sources": [
                {"name": one.source.name, "rows": len(one.source), "read_as": one.reader.description}
                for one in self.opened
            ],
            "rows": {
                "total": self.total,
                "read": self.read,
                "all_read": self.read == self.total,
                "readable": self.kept,
                "kept": self.kept,
                "bad": bad,
                "dropped": dropped,
                "bad_share": bad / self.read if self.read else 0.0,
            },
            "reasons": self.reasons.report(),
            "duplicates": {
                "prompts": self._repeated(self.prompts),
                "rows": self._repeated(self.rows),
                "contradictions": self._repeated(self.contradictions) if self._verdicts else None,
            },
            "identical": share(self.reasons.matching("identical", "the same tokens"), self.read),
            "empty": share(self.reasons.matching("empty"), self.read),
            "ties": {"dropped": self.ties, "kept": self.kept_ties, "share": self._tie_share()},
            "refusals": {
                "rule": texts.REFUSAL_RULE,
                "roles": {role: share(one.refusals, one.count) for role, one in self.answers.items()},
            },
            "characters": {
                "prompt": quantiles(self.prompt_characters),
                **{role: quantiles(one.characters) for role, one in self.answers.items()},
            },
            "length_bias": longer(self.differences, "characters"),
            **self._optional(),
            "languages": {"rule": texts.LANGUAGE_RULE, "counts": dict(self.languages.most_common(_TOP))},
            "benchmarks": self.benchmarks.report(self.read),
        }

    def _optional(self) -> dict[str, Any]:
        """Feedback that not all data have; None where there is none."""
        labels = {role_of(label): share(self.labels[label], self.labels.total()) for label in (True, False)}
        annotators = {"count": len(self.annotators), "rows": dict(self.annotators.most_common(_TOP))}
        return {
            "labels": labels if self.labels else None,
            "rewards": quantiles(self.rewards) or None,
            "score_gap": quantiles(self.gaps) or None,
            "probabilities": quantiles(self.probabilities) or None,
            "annotators": annotators if self.annotators else None,
        }

    def _tie_share(self) -> float:
        pairs = len(self.differences) + self.ties
        return (self.ties + self.kept_ties) / pairs if pairs else 0.0

    def _repeated(self, seen: Seen) -> dict[str, Any]:
        examples = [[self.name(first), self.name(again)] for first, again in seen.examples]
        return {**share(seen.repeats, self.kept), "examples": examples}


def longer(differences: Sequence[int], unit: str) -> dict[str, Any] | None:
    """How often, and by how much, the winner is the longer one; of pairs of equal length none is."""
    if not len(differences):
        return None
    above = sum(difference > 0 for difference in differences)
    equal = sum(difference == 0 for difference in differences)
    return {
        "unit": unit,
        "winner_longer": share(above, len(differences)),
        "equal": equal,
        "difference": mean(differences),
    }


def overlap(train: RowPass, other: RowPass) -> dict[str, Any]:
    """Distinct prompts of `other` that are prompts of `train` too, white space and case aside."""
    return _shared(train, train.prompts.first, other, other.prompts.first)


def question_overlap(train: RowPass, benchmark: RowPass) -> dict[str, Any]:
    """Distinct questions of `benchmark` that are the last user turn of a prompt of `train`."""
    return _shared(train, train.questions, benchmark, benchmark.questions)


def _shared(train: RowPass, there: Mapping[int, int], other: RowPass, here: Mapping[int, int]) -> dict[str, Any]:
    both = [(there[key], index) for key, index in here.items() if key in there]
    examples = [[train.name(first), other.name(index)] for first, index in both[:EXAMPLES]]
    return {**share(len(both), len(here)), "examples": examples}
