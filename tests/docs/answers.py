"""What the symbols of a formula stand for in random rows of a view: the other half of `tests.docs.latex`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from align.core.options import declared
from align.methods.base import Method
from align.testing.rows import contrast_roles, map_completions, random_rows
from docs.hooks.formulas import symbol
from tests.docs.latex import Given, spelling

Row = Mapping[str, Any]

STATES: dict[str, dict[str, float]] = {"ps_kd": {"epoch": 1.0, "epochs": 3.0}}
"""Method -> the state in which its formula is evaluated, where that is not the first step's."""
TOGETHER = {"aot", "aot_unpaired", "beta_dpo", "cpo"}
"""Methods whose formula is that of the whole batch."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A completion's scored tokens."""

    row: Row

    def __abs__(self) -> int:
        return len(self.row["logp"])

    def token(self, place: int) -> Token:
        return Token(self, place)

    def column(self, name: str, place: int) -> float:
        """A number of the token at a place from 1; 0 beyond the end."""
        one = self.row["anchor"][name.removeprefix("anchor.")] if name.startswith("anchor.") else self.row[name]
        return float(one[place - 1]) if place <= abs(self) else 0.0

    def sum(self, name: str) -> float:
        return sum(self.column(name, place + 1) for place in range(abs(self)))

    def h(self, place: int = 0) -> float:
        if "ref_logp" not in self.row:
            return math.nan
        if place:
            return self.column("logp", place) - self.column("ref_logp", place)
        return self.sum("logp") - self.sum("ref_logp")


@dataclass(frozen=True)
class Token:
    answer: Answer
    place: int


def probability(name: str) -> Callable[..., float]:
    """pi(answer) or pi(token) of a column; after another prompt where its name is given."""

    def of(what: Answer | Token, context: str = "") -> float:
        column = f"anchor.{context}" if context else name
        return math.exp(what.answer.column(column, what.place) if isinstance(what, Token) else what.sum(column))

    return of


def column(name: str) -> Callable[[Answer, int], float]:
    return lambda y, t: y.column(name, t)


def rows_for(method: Method, seed: int, count: int = 4) -> list[dict[str, Any]]:
    """Random rows with every token scored, without weights; with states, of one length, so that they end together."""
    needs = method.requires()
    size = 4 if "value" in needs and method.view == "pairs" else 0

    def plain(one: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in one.items() if key not in ("mask", "weight")}
        for key in ("logp", "ref_logp", "token_reward", "value"):
            if size and key in kept:
                length = size + (key == "value")
                kept[key] = (kept[key] * length)[:length]
        return kept | ({"finished": True} if "logit" in needs else {})

    rows = [map_completions(row, plain) for row in random_rows(method, count, seed)]
    for row in rows:
        row.pop("weight", None)
    if "contrasts" in needs:
        drawn = _drawn(rows)
        for row in rows:
            row["contrasts"] = [{**next(drawn), "role": role} for role in contrast_roles(1, 1)]
    if "samples" in needs:
        drawn = _drawn(rows)
        of_baseline = getattr(method, "baseline", "") == "samples"
        for row in rows:
            row["samples"] = [next(drawn) for _ in range(1 if of_baseline else 3)]
    if method.id == "bco":
        for row, weight in zip(rows, (1.0, 0.1, 3.0, 40.0), strict=True):
            row["weight"] = 1.0 if row["label"] else weight
    return rows


def _drawn(rows: Sequence[Row]) -> Any:
    """Completions of other rows, over and over: samples, or answers after other prompts."""
    pool = [one for row in rows for key in ("samples", "contrasts") for one in row.get(key, ())]
    bare = [{key: value for key, value in one.items() if key != "role"} for one in pool]
    while True:
        yield from bare


def given_for(method: Method, rows: Sequence[Row], row: Row) -> Given:
    """The symbols of one row's loss; `rows` are the batch."""
    given = Given()
    labels = set()
    for name, option, _, hint in declared(type(method)):
        value = getattr(method, option.name)
        if get_args(hint) and isinstance(value, str | int) and not isinstance(value, bool):
            labels.add(str(value).replace("_", " "))
        latex = symbol(method.id, name)
        values = value if isinstance(value, tuple) else (value,)
        if latex and all(isinstance(one, int | float) for one in values):
            given.values |= dict(zip(map(spelling, latex.split(", ")), map(float, values), strict=True))
    given.functions |= {
        "h": lambda y, *rest: rest[0](y).h() if rest and callable(rest[0]) else y.h(*rest),
        r"\pi": probability("logp"),
        r"\pi_\mathrm{ref}": probability("ref_logp"),
        r"\pi_g": probability("anchor.guide"),
        r"\pi_\mathrm{prev}": probability("anchor.previous"),
        r"\pi_\mathrm{old}": probability("old_logp"),
    }
    given.ranges["t"] = range(1, max(len(one["logp"]) for one in completions(row)) + 1)
    given.labels = frozenset(labels)
    VIEWS[method.view](method, rows, row, given)
    EXTRAS.get(method.id, lambda method, rows, row, given: None)(method, rows, row, given)
    return given


def completions(row: Row) -> list[Row]:
    return [row[key] for key in ("chosen", "rejected") if key in row] or row.get("completions") or [row]


def _samples(given: Given, samples: Sequence[Row]) -> None:
    given.lists["y"] = [Answer(one) for one in samples]
    given.values["K"] = len(samples)
    given.ranges |= {"i": range(1, len(samples) + 1), "j": range(1, len(samples) + 1)}


def pairs(method: Method, rows: Sequence[Row], row: Row, given: Given) -> None:
    for side, key in (("w", "chosen"), ("l", "rejected")):
        given.values |= {f"y_{side}": Answer(row[key]), f"h_{side}": Answer(row[key]).h()}
        answers = [Answer(one[key]) for one in rows]
        given.lists |= {f"y_{side}": answers, f"h_{side}": [one.h() for one in answers]}
    given.lists[r"\Delta"] = [won - lost for won, lost in zip(given.lists["h_w"], given.lists["h_l"], strict=True)]
    given.values |= {"P": len(rows), "p": row["probability"], "c": row["probability"], **given.values}
    given.ranges |= {"i": range(1, len(rows) + 1), "B": range(1, len(rows) + 1)}
    if row.get("samples"):
        _samples(given, row["samples"])
    base = {"sft": row.get("baseline"), "samples": (row.get("samples") or [None])[0]}
    # demo_reg without mu reads no demonstration, and multiplies what stands there by 0.
    based = Answer(base.get(getattr(method, "baseline", "sft")) or row["chosen"])
    given.values |= {r"y_\mathrm{base}": based, r"y_\mathrm{demo}": based}


def singles(method: Method, rows: Sequence[Row], row: Row, given: Given) -> None:
    answer = Answer(row)
    given.values |= {"y": answer, "h": answer.h(), "y_l": answer, "x": None, "r": row.get("reward")}
    given.labels |= {"desirable" if row.get("label") else "undesirable"}
    if row.get("samples"):
        _samples(given, row["samples"])


def demonstrations(method: Method, rows: Sequence[Row], row: Row, given: Given) -> None:
    answer = Answer(row)
    given.values |= {"y": answer, "h": answer.h()}
    given.lists["h"] = [answer.h(place) for place in given.ranges["t"]]
    if "logit" in row:
        given.lists |= {"q": row["logit"], "v": [*row["logsumexp"], 0.0]}


def lists(method: Method, rows: Sequence[Row], row: Row, given: Given) -> None:
    _samples(given, row["completions"])
    h, scores = [one.h() for one in given.lists["y"]], row["scores"]
    given.lists |= {"h": h, "r": scores, r"\psi": scores, "t": [1 + sum(other > one for other in h) for one in h]}
    given.values[r"\bar{r}"] = sum(scores) / len(scores)


def groups(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    _samples(given, row["completions"])

    def advantage(y: Answer, place: int = 0) -> float:
        return y.column("advantage", place) if place else y.sum("advantage") / abs(y)

    given.functions |= {"A": advantage, r"\pi_\mathrm{old}": probability("old_logp")}
    if "ref_logp" not in method.requires():
        given.functions[r"\pi_\mathrm{ref}"] = lambda what: 1.0  # stands beside a weight of 0
    given.values.setdefault(r"\delta", math.inf)
    given.values.setdefault(r"\epsilon_\mathrm{high}", method.epsilon)


VIEWS = {
    "pairs": pairs,
    "singles": singles,
    "demonstrations": demonstrations,
    "lists": lists,
    "groups": groups,
}


def _bco(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    for side, label in (("D", True), ("U", False)):
        rewards = [method.beta * Answer(one).h() for one in rows if one["label"] is label]
        given.values[rf"\bar{{r}}_{side}"] = sum(rewards) / len(rewards)
    given.values["p"] = row["weight"] / (1 + row["weight"])


def _brain(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.functions["q'"] = given.functions[r"\pi_g" if method.proposal == "guide" else r"\pi_\mathrm{ref}"]


def _cpl(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    def turns(y: Answer, t: int) -> float:
        return t - 1 if method.discount == "token" else y.column("step", t) - y.column("step", 1)

    given.functions["k"] = turns


def _dro_v(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.functions["V"] = lambda x: row["value"][0]


def _elr(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values |= {"t_1": 0.0, "t_2": 0.0}


def _kto(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.lists |= {"x": [None for _ in rows], "y'": [Answer(one["mismatched"]) for one in rows]}
    given.functions["h"] = lambda x, y: y.h()
    given.ranges["i"] = range(1, len(rows) + 1)


def _beta_dpo(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values |= {"M_0": 0.0, "S": 0.0}


def _mapl(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    plus, minus, *inter = [Answer(one) for one in row["contrasts"]]
    chosen = given.values["y_w"]
    given.values |= {
        "y": None,
        "x_+": lambda y: plus,
        "x_-": lambda y: minus,
        "x_a": lambda y: inter[0] if y is chosen else inter[1],
        "x_b": lambda y: inter[2] if y is chosen else inter[3],
    }


def _ps_kd(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values |= {"e": STATES["ps_kd"]["epoch"], "E": STATES["ps_kd"]["epochs"]}
    given.lists["H"] = row["cross_entropy"]
    given.outside.add("H")


def _regret(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.functions["r"] = column("token_reward")
    given.functions["V"] = lambda y, t: 0.0 if t > abs(y) and y.row["finished"] else y.row["value"][t - 1]


def _label(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values |= {"P": row["probability"], "R": row.get("margin")}


def _nash_md(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.ranges["j"] = given.ranges["t"]


def _sppo(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values |= {"r_w": row["chosen"]["reward"], "r_l": row["rejected"]["reward"]}


def _xpo(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    explored = next(one for one in (row["chosen"], row["rejected"]) if one["role"] == "reference")
    given.values |= {r"y_\mathrm{ref}": Answer(explored), r"\phi": float(explored["finished"])}


def _kl(name: str) -> Any:
    def give(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
        each = column("kl_ref_policy")
        given.functions |= {"M": column("marked"), "D": each, "K": lambda y: y.sum("kl_ref_policy")}
        given.outside.add(name)

    return give


def _t_reg(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values |= {rf"x_\mathrm{{{name}}}": name for name in ("better", "worse")}


def _tgdpo(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values.setdefault(r"\beta_g", method.beta)


def _wpo(method: Any, rows: Sequence[Row], row: Row, given: Given) -> None:
    given.values.setdefault(r"W_\max", math.inf)
    if method.alignment != "none":
        given.functions["a"] = column({"sampled": "log_sum_sq", "greedy": "log_max"}[method.alignment])
        given.outside.add("a")


EXTRAS: dict[str, Callable[[Any, Sequence[Row], Row, Given], None]] = {
    "bco": _bco,
    "beta_dpo": _beta_dpo,
    "brain": _brain,
    "cpl": _cpl,
    "dno": _label,
    "dro_v": _dro_v,
    "elr": _elr,
    "kto": _kto,
    "mapl": _mapl,
    "nash_md": _nash_md,
    "online_dpo": _label,
    "online_ipo": _label,
    "ps_kd": _ps_kd,
    "rebel": _label,
    "regret_pref": _regret,
    "rrpo": _kl("D"),
    "smpo": _label,
    "soft_dpo": _label,
    "sppo": _sppo,
    "t_reg": _t_reg,
    "tdpo": _kl("K"),
    "tgdpo": _tgdpo,
    "wpo": _wpo,
    "xpo": _xpo,
}
"""What a method's formula speaks of beyond its view."""
