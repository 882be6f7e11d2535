"""The online methods on pairs, and those of rounds, as plain loops; see `loops.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Values = tuple[list[float], float]
State = Mapping[str, Any]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def nats(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def column(one: Row, name: str) -> list[float]:
    """Numbers of the scored tokens; `previous` is an anchor."""
    numbers = one["anchor"][name] if name == "previous" else one[name]
    return [x for x, keep in zip(numbers, one.get("mask", [True] * len(numbers)), strict=True) if keep]


def total(one: Row, name: str = "logp") -> float:
    return math.fsum(column(one, name))


def ratio(one: Row, anchor: Mapping[str, float] | str = "ref_logp") -> float:
    """log pi minus a weighted sum of frozen log-probs."""
    weights = {anchor: 1.0} if isinstance(anchor, str) else anchor
    return total(one) - math.fsum(w * total(one, name) for name, w in weights.items() if w)


def per_pair(rows: Sequence[Row], value: Callable[[Row, Row, Row], float]) -> Values:
    return [row.get("weight", 1.0) * value(row["chosen"], row["rejected"], row) for row in rows], len(rows)


def online_dpo(
    rows: Sequence[Row], state: State, beta: float = 0.1, loss_: str = "sigmoid", label: str = "hard"
) -> Values:
    heads: dict[str, Callable[[float], float]] = {
        "sigmoid": lambda d: nats(beta * d),
        "ipo": lambda d: (d - 1 / (2 * beta)) ** 2,
        "hinge": lambda d: max(1 - beta * d, 0.0),
    }

    def value(won: Row, lost: Row, row: Row) -> float:
        delta = ratio(won) - ratio(lost)
        p = row["probability"] if label == "prob" else 1.0
        return p * heads[loss_](delta) + (1 - p) * heads[loss_](-delta)

    return per_pair(rows, value)


def online_ipo(rows: Sequence[Row], state: State, tau: float = 1.0, mix: float = 0.0, label: str = "sampled") -> Values:
    def value(won: Row, lost: Row, row: Row) -> float:
        delta, p = ratio(won) - ratio(lost), row["probability"] if label == "prob" else 1.0
        return p * (delta - 0.5 / tau) ** 2 + (1 - p) * (delta + 0.5 / tau) ** 2

    return per_pair(rows, value)


def xpo(rows: Sequence[Row], state: State, beta: float = 0.1, alpha: float = 1e-5) -> Values:
    def value(won: Row, lost: Row, row: Row) -> float:
        bonus = [total(one) for one in (won, lost) if one["role"] == "reference" and one["finished"]]
        return nats(beta * (ratio(won) - ratio(lost))) + alpha * sum(bonus)

    return per_pair(rows, value)


def nash_md(rows: Sequence[Row], state: State, tau: float = 0.008, mix: float = 0.125) -> Values:
    values = []
    for row in rows:
        logp, ref = column(row, "logp"), column(row, "ref_logp")
        ratios = [a - b for a, b in zip(logp, ref, strict=True)]
        each = [(0.5 - row["reward"] + tau * sum(ratios[t:])) * x for t, x in enumerate(logp)]
        values.append(row.get("weight", 1.0) * sum(each))
    return values, len(rows)


def rebel(rows: Sequence[Row], state: State, eta: float = 1.0, anchor: str = "old") -> Values:
    name = {"old": "old_logp", "reference": "ref_logp"}[anchor]

    def value(won: Row, lost: Row, row: Row) -> float:
        return (ratio(won, name) - ratio(lost, name) - eta * row["margin"]) ** 2

    return per_pair(rows, value)


def sppo(rows: Sequence[Row], state: State, eta: float = 1000.0) -> Values:
    def value(won: Row, lost: Row, row: Row) -> float:
        return sum((ratio(one) - eta * (one["reward"] - 0.5)) ** 2 / 2 for one in (won, lost))

    return per_pair(rows, value)


def inpo(rows: Sequence[Row], state: State, eta: float = 0.005, tau: float = 0.00167) -> Values:
    anchor = {"ref_logp": tau / eta, "previous": (eta - tau) / eta}
    return per_pair(rows, lambda won, lost, row: (ratio(won, anchor) - ratio(lost, anchor) - 0.5 / eta) ** 2)


def dno(rows: Sequence[Row], state: State, eta: float = 0.1) -> Values:
    def value(won: Row, lost: Row, row: Row) -> float:
        s, z = sigmoid(row["margin"]), eta * (ratio(won) - ratio(lost))
        return s * nats(z) + (1 - s) * nats(-z)

    return per_pair(rows, value)


def dno_prct(rows: Sequence[Row], state: State, eta: float = 0.1, sft_weight: float = 0.005) -> Values:
    def value(won: Row, lost: Row, row: Row) -> float:
        nll = -total(won) / len(column(won, "logp"))
        return nats(eta * (ratio(won) - ratio(lost))) + sft_weight * nll

    return per_pair(rows, value)


def alpha_spin(rows: Sequence[Row], state: State, beta: float = 0.1, alpha: float = 0.5) -> Values:
    anchor = {"ref_logp": alpha, "previous": 1 - alpha}
    return per_pair(rows, lambda won, lost, row: nats(beta * (ratio(won, anchor) - ratio(lost, anchor))))


LOOPS: dict[str, Callable[..., Any]] = {
    "online_dpo": online_dpo,
    "online_ipo": online_ipo,
    "xpo": xpo,
    "nash_md": nash_md,
    "rebel": rebel,
    "sppo": sppo,
    "inpo": inpo,
    "dno": dno,
    "dno_prct": dno_prct,
    "alpha_spin": alpha_spin,
}
STOPS: set[str] = {"nash_md"}
