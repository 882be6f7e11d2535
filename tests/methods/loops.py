"""Every built-in method once more, written from its paper as plain loops over Python numbers; no tensors.

The families of `loops_*.py` beside this file are collected at the end: each has `LOOPS` and `STOPS`.

A loop takes the rows of `align.methods.terms`, the state, and the method's options with the paper's defaults. It
returns the weighted values of its units and the number that divides their sum.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Values = tuple[list[float], float]
State = Mapping[str, float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def scored(one: Row, name: str = "logp") -> list[float]:
    mask = one.get("mask", [True] * len(one["logp"]))
    return [number for number, keep in zip(one[name], mask, strict=True) if keep]


def total(one: Row, name: str = "logp") -> float:
    return math.fsum(scored(one, name))


def length(one: Row) -> int:
    return len(scored(one))


def mean(one: Row) -> float:
    return total(one) / length(one)


def h(one: Row) -> float:
    return total(one) - total(one, "ref_logp")


def sft(rows: Sequence[Row], state: State, reduction: str = "token") -> Values:
    values, tokens = [], 0
    for row in rows:
        own = [-row.get("weight", 1.0) * number for number in scored(row)]
        tokens += len(own)
        values += own if reduction == "token" else [sum(own) / len(own)]
    return values, tokens if reduction == "token" else len(rows)


def dpo(rows: Sequence[Row], state: State, beta: float = 0.1) -> Values:
    values = []
    for row in rows:
        z = beta * (h(row["chosen"]) - h(row["rejected"]))
        values.append(-row.get("weight", 1.0) * math.log(sigmoid(z)))
    return values, len(rows)


def ipo(rows: Sequence[Row], state: State, tau: float = 0.1, normalize: str = "token") -> Values:
    values = []
    for row in rows:
        if normalize == "token":
            delta = h(row["chosen"]) / length(row["chosen"]) - h(row["rejected"]) / length(row["rejected"])
        else:
            delta = h(row["chosen"]) - h(row["rejected"])
        values.append(row.get("weight", 1.0) * (delta - 1 / (2 * tau)) ** 2)
    return values, len(rows)


def simpo(
    rows: Sequence[Row],
    state: State,
    beta: float = 2.0,
    gamma_ratio: float = 0.5,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Values:
    values = []
    for row in rows:
        m = beta * mean(row["chosen"]) - beta * mean(row["rejected"]) - gamma_ratio * beta
        value = -(1 - label_smoothing) * math.log(sigmoid(m)) - label_smoothing * math.log(sigmoid(-m))
        value -= sft_weight * mean(row["chosen"])
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def orpo(rows: Sequence[Row], state: State, lambda_: float = 0.1) -> Values:
    values = []
    for row in rows:
        p = {name: math.exp(mean(row[name])) for name in ("chosen", "rejected")}
        odds = {name: p[name] / (1 - p[name]) for name in p}
        value = -math.log(p["chosen"]) - lambda_ * math.log(sigmoid(math.log(odds["chosen"] / odds["rejected"])))
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def rpo(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.01,
    eta: float = 0.005,
    baseline: str = "chosen",
    sft_reduction: str = "sum",
) -> Values:
    values = []
    for row in rows:
        z = beta * (h(row["chosen"]) - h(row["rejected"]))
        imitated = row["samples"] if baseline == "samples" else [row["chosen" if baseline == "chosen" else "baseline"]]
        if sft_reduction == "sum":
            extra = eta * beta * sum(-total(one) for one in imitated) / len(imitated)
        else:
            extra = eta * sum(-mean(one) for one in imitated) / len(imitated)
        values.append(row.get("weight", 1.0) * (softplus(-z) + extra))
    return values, len(rows)


def kto(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Values:
    z0 = max(0.0, sum(h(row["mismatched"]) for row in rows) / len(rows))
    values = []
    for row in rows:
        if row["label"]:
            value = desirable_weight * (1 - sigmoid(beta * (h(row) - z0)))
        else:
            value = undesirable_weight * (1 - sigmoid(beta * (z0 - h(row))))
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def bco(rows: Sequence[Row], state: State, beta: float = 0.01, clip: tuple[float, float] = (0.5, 10.0)) -> Values:
    means = []
    for kind, wanted in (("desirable", True), ("undesirable", False)):
        own = [beta * h(row) for row in rows if bool(row["label"]) == wanted]
        count = state.get(f"{kind}_count", 0) + len(own)
        if count:
            means.append((state.get(f"{kind}_sum", 0.0) + sum(own)) / count)
    delta = sum(means) / len(means)
    values = []
    for row in rows:
        r, weight = beta * h(row), row.get("weight", 1.0)
        if row["label"]:
            values.append(weight * softplus(-(r - delta)))
        else:
            w = min(max(weight, clip[0]), clip[1]) if weight else 0.0
            values.append(w * softplus(r - delta))
    return values, len(rows)


def lipo(rows: Sequence[Row], state: State, beta: float = 0.05, reduction: str = "sum") -> Values:
    values = []
    for row in rows:
        losses = []
        for i, better in enumerate(row["completions"]):
            for j, worse in enumerate(row["completions"]):
                if row["scores"][i] > row["scores"][j]:
                    losses.append(softplus(-beta * (h(better) - h(worse))))
        value = sum(losses) / (max(len(losses), 1) if reduction == "mean" else 1)
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def tdpo(rows: Sequence[Row], state: State, beta: float = 0.1, alpha: float = 0.5, variant: int = 2) -> Values:
    values = []
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        drift = total(rejected, "kl_ref_policy") - total(chosen, "kl_ref_policy")
        m = beta * (h(chosen) - h(rejected) - (drift if variant == 1 else alpha * drift))
        values.append(row.get("weight", 1.0) * softplus(-m))
    return values, len(rows)


def dro_v(rows: Sequence[Row], state: State, tau: float = 1.0, policy_grad_scale: float = 1.0) -> Values:
    values = []
    for row in rows:
        residual = row["reward"] - row["value"][0] - tau * h(row)
        values.append(row.get("weight", 1.0) * 0.5 * residual**2)
    return values, len(rows)


LOOPS: dict[str, Callable[..., Values]] = {
    "sft": sft,
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
    "rpo": rpo,
    "kto": kto,
    "bco": bco,
    "lipo": lipo,
    "tdpo": tdpo,
    "dro_v": dro_v,
}

STOPS: set[str] = {"kto", "bco"}
"""Methods that stop a gradient, so that the loop's differences are not the gradient: see the identities."""

for _file in sorted(Path(__file__).parent.glob("loops_*.py")):
    _family = importlib.import_module(f"tests.methods.{_file.stem}")
    LOOPS |= _family.LOOPS
    STOPS |= _family.STOPS
