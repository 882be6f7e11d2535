"""What the table of methods says of each, found out rather than told: by its declaration, and by evaluating its loss.

Losses are evaluated with the default options on random rows: with the same text twice (sums grow, means do not), with
the same number added to the log-probabilities of all answers to a prompt (differences do not see it), and with
likelihoods that go to zero (bounds).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from align.core.options import declared
from align.methods.base import Method
from align.methods.evaluate import terms
from align.testing.rows import TRAINED, map_completions, random_rows, tracked

Row = dict[str, Any]

FEEDBACK = {"label", "reward", "scores", "probability", "margin", "ties"}
"""Needs that say what the rows tell of the answers, and are no cost to anyone."""
_OF_REFERENCE = {"ref_logp", "kl_ref_policy", "kl_policy_ref", "cross_entropy"}
_MADE = {"key", "finished", "advantage", "old_logp", "sampler_logp"}
"""Needs that the trainer meets by itself."""
_SIZES = (1e4, 1e6)
_EQUAL = 1e-9


@dataclasses.dataclass(frozen=True)
class Facts:
    """One row of the table; words as they stand there."""

    reference: str
    tokens: str
    difference: str
    bounded: str
    coupled: str
    state: str
    extra: tuple[str, ...]
    samples: str
    option: str


@cache
def facts(cls: type[Method]) -> Facts:
    method = cls()
    needs = method.requires()
    rows = _rows(method)
    return Facts(
        reference=_reference(method),
        tokens=_tokens(method, rows),
        difference="yes" if only_differences(method, rows) else "no",
        bounded=bounds(method, rows),
        coupled="batch" if method.coupling == "batch" else "list" if method.view == "lists" else "no",
        state="yes" if method.initial_state() else "no",
        extra=tuple(sorted(needs - FEEDBACK - _MADE - {"ref_logp", "samples"})),
        samples="yes" if "samples" in needs else "by option" if "samples" in cls.needs else "no",
        option=_first_option(cls),
    )


def _reference(method: Method) -> str:
    if not method.requires() & _OF_REFERENCE:
        return "by option" if method.needs & _OF_REFERENCE else "none"
    return method.teacher.replace("_", " ") or "frozen"


def _first_option(cls: type[Method]) -> str:
    """The scale of the reward where there is one, else the first number; with its default."""
    numbers = {name: field.default for name, field, *_ in declared(cls) if isinstance(field.default, float)}
    first = next((name for name in numbers if name.startswith("beta")), next(iter(numbers), ""))
    return f"`{first}` {numbers[first]:g}" if first else ""


def _rows(method: Method) -> list[Row]:
    """Rows without weights and masks, and lists of at least two answers."""

    def plain(one: Row) -> Row:
        return {key: value for key, value in one.items() if key not in ("mask", "weight")}

    rows = [map_completions(row, plain) for row in random_rows(method, 16, seed=3)]
    rows = [row for row in rows if len(row.get("completions", "ab")) > 1][:4]
    for row in rows:
        row.pop("weight", None)
    if "label" in method.requires():
        rows[0]["label"], rows[1]["label"] = True, False
    return rows


def _terms(method: Method, rows: Sequence[Row]) -> dict[str, float]:
    found = terms(method, **{method.view: rows})
    return {name: float(term.scale * term.values.sum() / found.counts[name]) for name, term in found.items()}


def _tokens(method: Method, rows: Sequence[Row]) -> str:
    """`sum` or `mean` over tokens; `both` where one term is a sum and another a mean."""
    once, twice = _terms(method, rows), _terms(method, [_twice(row) for row in rows])
    units = {name: term.kind.name for name, term in terms(method, **{method.view: rows}).items()}
    told = {
        "mean" if units[name] == "token" or abs(value - twice[name]) <= _EQUAL * max(1, abs(value)) else "sum"
        for name, value in once.items()
    }
    return "both" if len(told) > 1 else told.pop()


def _twice(row: Row) -> Row:
    """Each answer written twice, one copy behind the other."""

    def longer(one: Row) -> Row:
        length = len(one["logp"])
        double = {key: value * 2 for key, value in one.items() if isinstance(value, list) and len(value) == length}
        double = {key: value for key, value in double.items() if key not in ("samples", "contrasts")}
        if "value" in one:
            double["value"] = one["value"][:-1] * 2 + one["value"][-1:]
        if "anchor" in one:
            double["anchor"] = {name: values * 2 for name, values in one["anchor"].items()}
        return {**one, **double}

    return map_completions(row, longer)


def only_differences(method: Method, rows: Sequence[Row]) -> bool:
    """Whether the loss sees no more of the policy than differences of log-probabilities of answers to one prompt."""
    if method.view not in ("pairs", "lists"):
        return False
    before = sum(_terms(method, rows).values())
    for number, shift, place in itertools.product(range(2), (-7.0, 7.0), (0, -1)):
        moved = [_shifted(row, shift, place) if i == number else row for i, row in enumerate(rows)]
        if abs(sum(_terms(method, moved).values()) - before) > _EQUAL * max(1, abs(before)):
            return False
    traced, leaves = tracked(rows)
    loss = terms(method, **{method.view: traced}).total()
    places = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
    names = [name for row in traced for one in _answers(row) for name in TRAINED if name in one]
    return all(g is None or name == "logp" or not g.any() for name, g in zip(names, places, strict=True))


def _answers(row: Row) -> list[Row]:
    found: list[Row] = []
    map_completions(row, lambda one: found.append(one) or one)  # type: ignore[func-returns-value]
    return found


def _shifted(row: Row, shift: float, place: int) -> Row:
    """A number added, at a place, to log pi of every answer after the row's own prompt; of contrasts, after x+."""

    def move(one: Row) -> Row:
        kind, _, sign = role.split(":") if ":" in (role := one.get("role", "")) else ("", "", "+")
        if kind == "inter" or sign == "-":
            return one
        logp = list(one["logp"])
        logp[place] += shift
        return {**one, "logp": logp}

    return map_completions(row, move)


def bounds(method: Method, rows: Sequence[Row]) -> str:
    """`both`, `below`, `above` or `no`: whether the loss stays finite however the policy's likelihoods go to 0 or 1."""
    low, high = [], []
    alone = method.view in ("singles", "demonstrations")
    for size in _SIZES:
        levels = itertools.product((-1e-3, -size), repeat=2)
        ends = [
            _extremes(method, [_likelihoods(row, chosen, i * alone) for i, row in enumerate(rows)]) for chosen in levels
        ]
        low.append(min(least for least, _ in ends))
        high.append(max(most for _, most in ends))
    below, above = low[1] > low[0] - 1, high[1] < high[0] + 1
    return {(True, True): "both", (True, False): "below", (False, True): "above", (False, False): "no"}[below, above]


def _extremes(method: Method, rows: Sequence[Row]) -> tuple[float, float]:
    """The least and the greatest loss of a unit; of terms in different units, the sums of theirs."""
    together: dict[tuple[int, ...], torch.Tensor] = {}
    for term in terms(method, **{method.view: rows}).values():
        values = term.scale * term.values.detach()
        together[values.shape] = together.get(values.shape, torch.zeros(())) + values
    return sum(float(x.min()) for x in together.values()), sum(float(x.max()) for x in together.values())


def _likelihoods(row: Row, levels: Sequence[float], first: int) -> Row:
    """The row's answers at the two levels of log-probability in turn, the rows of singles in turn (`first`).

    A level is spread over an answer's tokens, so that two may fall with their difference unchanged.
    """
    turn = itertools.count(first)

    def level(one: Row) -> Row:
        own = levels[next(turn) % 2]
        made = {**one, "logp": [own / len(one["logp"]) for _ in one["logp"]]}
        if "logit" in one:
            made |= {"logit": made["logp"], "logsumexp": [0.0 for _ in one["logp"]]}
        return made

    return map_completions(row, level)
