"""Prompts that an answer fits better or worse: constraints that code can check, and MAPL's contrasts made of them.

A constraint is a sentence that a prompt may state ("Use at most 40 words.") and a check of an answer; nothing is
believed that was not checked. `contrasts_of` adds to a row of a pair

    intra, for the chosen and for the rejected answer y:  (x+, x-), y satisfies all of x+, and not all of x-
    inter:  (x_a, x_b): all of x_a are satisfied by the chosen and violated by the rejected answer; those of x_b the
            other way round, or, where there are none, satisfied by both or by neither

as many constraints in x+ as in x-, and in x_a as in x_b. Source: arXiv 2505.12845; how constraints are drawn is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from align.core.errors import ConfigError
from align.core.seeds import generator

_WORD = re.compile(r"[^\W\d_]{4,}")
_SENTENCE = re.compile(r"[.!?]+(?=\s|$)")


@dataclass(frozen=True)
class Constraint:
    """A sentence for a prompt, and whether an answer keeps to it."""

    kind: str
    text: str
    check: Callable[[str], bool]


def candidates(answers: Sequence[str]) -> list[Constraint]:
    """Constraints that tell answers like these apart: bounds near their lengths, words, openings and formats."""
    made = [*_bounds("words", answers, _words), *_bounds("sentences", answers, _sentences), *_FORMATS]
    for word in sorted({word.lower() for answer in answers for word in _WORD.findall(answer)}):
        made.append(Constraint("keyword", f'Use the word "{word}".', _has(word)))
        made.append(Constraint("no keyword", f'Do not use the word "{word}".', _lacks(word)))
    for first in sorted({answer.split()[0] for answer in answers if answer.split()}):
        made.append(Constraint("opening", f'Begin with "{first}".', _starts(first)))
    return made


def satisfied(answer: str, constraints: Sequence[Constraint]) -> bool:
    """Whether an answer keeps to all of them."""
    return all(one.check(answer) for one in constraints)


def contrasts_of(
    prompt: str, chosen: str, rejected: str, rng: np.random.Generator, most: int = 4
) -> list[dict[str, str]]:
    """The contrasts of one pair of plain texts: at most two intra, at most one inter; empty where nothing can be drawn.

    Args:
        most: constraints of a prompt at most; the number is drawn from 1 to `most`.
    """
    pool, found = candidates([chosen, rejected]), []
    for answer in (chosen, rejected):
        kept = [one for one in pool if one.check(answer)]
        broken = [one for one in pool if not one.check(answer)]
        if kept and broken:
            better, worse = _same_number(kept, broken, kept, rng, most)
            found.append({"kind": "intra", "completion": answer, **_asked(prompt, better, worse)})
    stronger = [one for one in pool if one.check(chosen) and not one.check(rejected)]
    weaker = [one for one in pool if one.check(rejected) and not one.check(chosen)]
    weaker = weaker or [one for one in pool if one.check(rejected) == one.check(chosen)]
    if stronger and weaker:
        better, worse = _same_number(stronger, weaker, [], rng, most)
        found.append({"kind": "inter", **_asked(prompt, better, worse)})
    return found


def with_contrasts(rows: Sequence[Mapping[str, Any]], seed: int = 0, most: int = 4) -> Iterator[dict[str, Any]]:
    """Rows of pairs (`prompt`, `chosen`, `rejected`, plain texts) with a column `contrasts`, as `mapl` reads it.

    What is drawn for a row is a function of the seed and of its texts. A row for which nothing can be drawn gets an
    empty list.

    Raises:
        ConfigError: `most` below 1, or a row whose columns are not texts.
    """
    if most < 1:
        raise ConfigError(f"`most` is {most}", mend="use a whole number >= 1")
    for number, row in enumerate(rows):
        prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
        if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
            raise ConfigError(f"row {number}: prompt, chosen and rejected must be plain texts here")
        rng = generator(seed, "contrasts", prompt, chosen, rejected)
        yield {**row, "contrasts": contrasts_of(prompt, chosen, rejected, rng, most)}


def as_pairs(row: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The inter contrasts of a row as plain pairs, for a method without contrasts: (x_a; y_w > y_l), and
    (x_b; y_l > y_w) where the rejected answer satisfies what the chosen one violates."""
    for contrast in row["contrasts"]:
        if contrast["kind"] != "inter":
            continue
        yield {"prompt": contrast["better"], "chosen": row["chosen"], "rejected": row["rejected"]}
        stated = contrast["worse"].removeprefix(row["prompt"])
        pool = [one for one in candidates([row["chosen"], row["rejected"]]) if f" {one.text}" in stated]
        if pool and all(one.check(row["rejected"]) and not one.check(row["chosen"]) for one in pool):
            yield {"prompt": contrast["worse"], "chosen": row["rejected"], "rejected": row["chosen"]}


def _same_number(
    better: Sequence[Constraint], worse: Sequence[Constraint], filler: Sequence[Constraint], rng: Any, most: int
) -> tuple[list[Constraint], list[Constraint]]:
    """Equally many of both; of `worse` at least one, the rest from `worse` and `filler` in a drawn order."""
    size = int(rng.integers(1, min(most, len(better), len(worse) + len(filler)) + 1))
    first = [better[i] for i in rng.permutation(len(better))[:size]]
    one = worse[int(rng.integers(len(worse)))]
    others = [other for other in (*worse, *filler) if other is not one]
    rest = [others[i] for i in rng.permutation(len(others))[: size - 1]]
    second = [one, *rest]
    return first, [second[i] for i in rng.permutation(len(second))]


def _asked(prompt: str, better: Sequence[Constraint], worse: Sequence[Constraint]) -> dict[str, str]:
    return {
        side: " ".join([prompt, *(one.text for one in own)]) for side, own in (("better", better), ("worse", worse))
    }


def _bounds(noun: str, answers: Sequence[str], measure: Callable[[str], int]) -> Iterator[Constraint]:
    """At most so many, and more than so many: at each answer's count, and midway between two."""
    counts = sorted({measure(answer) for answer in answers})
    edges = {*counts, *((low + high) // 2 for low, high in pairwise(counts))}
    for edge in sorted(edges - {0}):
        yield Constraint(f"at most {noun}", f"Use at most {edge} {noun}.", _within(measure, 0, edge))
        yield Constraint(f"at least {noun}", f"Use at least {edge + 1} {noun}.", _within(measure, edge + 1, None))


def _within(measure: Callable[[str], int], low: int, high: int | None) -> Callable[[str], bool]:
    return lambda answer: measure(answer) >= low and (high is None or measure(answer) <= high)


def _words(answer: str) -> int:
    return len(answer.split())


def _sentences(answer: str) -> int:
    return len(_SENTENCE.findall(answer.strip()))


def _has(word: str) -> Callable[[str], bool]:
    return lambda answer: word in (found.lower() for found in _WORD.findall(answer))


def _lacks(word: str) -> Callable[[str], bool]:
    return lambda answer: word not in (found.lower() for found in _WORD.findall(answer))


def _starts(first: str) -> Callable[[str], bool]:
    return lambda answer: answer.split()[:1] == [first]


_FORMATS = (
    Constraint("list", "Write a bulleted list.", lambda answer: bool(re.search(r"^\s*[-*•] ", answer, re.M))),
    Constraint("no list", "Do not use bullet points.", lambda answer: not re.search(r"^\s*[-*•] ", answer, re.M)),
    Constraint("one line", "Answer in a single line.", lambda answer: "\n" not in answer.strip()),
    Constraint("paragraphs", "Write several paragraphs.", lambda answer: "\n\n" in answer.strip()),
    Constraint("digits", "Include a number in digits.", lambda answer: bool(re.search(r"\d", answer))),
    Constraint("no digits", "Do not use digits.", lambda answer: not re.search(r"\d", answer)),
    Constraint("question", "End with a question.", lambda answer: answer.strip().endswith("?")),
    Constraint("no comma", "Do not use commas.", lambda answer: "," not in answer),
)
