"""Divergences and lists, as plain loops over Python numbers: see `loops.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.methods.loops import Row, State, Values, h, sigmoid, softplus, total


def link(divergence: str, ratio: float, alpha: float) -> float:
    """f'(u) of the book's table at u = e^ratio, without what is constant."""
    if divergence == "reverse_kl":
        return ratio
    if divergence == "forward_kl":
        return -math.exp(min(-ratio, 80.0))
    if divergence == "js":
        return math.log(2) - softplus(-ratio)
    if divergence == "alpha":
        return (1 - math.exp(min(-alpha * ratio, 80.0))) / alpha
    return math.exp(min(ratio, 80.0)) + ratio


def f_dpo(rows: Sequence[Row], state: State, beta: float = 0.1, divergence: str = "js", alpha: float = 0.5) -> Values:
    values = []
    for row in rows:
        m = link(divergence, h(row["chosen"]), alpha) - link(divergence, h(row["rejected"]), alpha)
        values.append(row.get("weight", 1.0) * softplus(-beta * m))
    return values, len(rows)


def chi_po(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.05,
    R_max: float = 1.0,
    gamma: float = 1.0,
    max_exponent: float = 20.0,
) -> Values:
    values = []
    for row in rows:
        phi = {k: math.exp(min(h(row[k]), max_exponent)) + gamma * h(row[k]) for k in ("chosen", "rejected")}
        m = beta * phi["chosen"] - beta * phi["rejected"]
        values.append(row.get("weight", 1.0) * softplus(-min(max(m, -2 * R_max), 2 * R_max)))
    return values, len(rows)


def exo_pref(rows: Sequence[Row], state: State, beta_pi: float = 0.5, eps: float = 1e-3) -> Values:
    values = []
    for row in rows:
        q = sigmoid(beta_pi * (h(row["chosen"]) - h(row["rejected"])))
        value = q * math.log(q / (1 - eps)) + (1 - q) * math.log((1 - q) / eps)
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def softmax(numbers: Sequence[float]) -> list[float]:
    highest = max(numbers)
    masses = [math.exp(number - highest) for number in numbers]
    return [mass / math.fsum(masses) for mass in masses]


def kl(first: Sequence[float], second: Sequence[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(first, second, strict=True) if a > 0)


def exo_rw(rows: Sequence[Row], state: State, beta_pi: float = 0.5, beta_r: float = 0.5) -> Values:
    values = []
    for row in rows:
        q = softmax([beta_pi * h(one) for one in row["completions"]])
        p = softmax([score / beta_r for score in row["scores"]])
        values.append(row.get("weight", 1.0) * kl(q, p))
    return values, len(rows)


def _pairs(row: Row, beta: float, loss: Callable[[int, int, float], float], reduction: str) -> float:
    """Over pairs with a higher score: `loss(i, j, s_i - s_j)`, summed or averaged, times the row's weight."""
    s = [beta * h(one) for one in row["completions"]]
    psi = row["scores"]
    found = [loss(i, j, s[i] - s[j]) for i in range(len(s)) for j in range(len(s)) if psi[i] > psi[j]]
    return row.get("weight", 1.0) * math.fsum(found) / (max(len(found), 1) if reduction == "mean" else 1)


def list_hinge(rows: Sequence[Row], state: State, beta: float = 0.05, reduction: str = "sum") -> Values:
    return [_pairs(row, beta, lambda i, j, m: max(0.0, 1 - m), reduction) for row in rows], len(rows)


def swap_gain(row: Mapping[str, Any], i: int, j: int) -> float:
    """|G_i - G_j| |1/D(t_i) - 1/D(t_j)|, averaged over all orders by descending h, which ties leave open."""
    ratios = [h(one) for one in row["completions"]]
    orders = [
        order
        for order in itertools.permutations(range(len(ratios)))
        if all(ratios[a] >= ratios[b] for a, b in itertools.pairwise(order))
    ]
    gaps = [abs(1 / math.log(2 + o.index(i)) - 1 / math.log(2 + o.index(j))) for o in orders]
    return abs(2 ** row["scores"][i] - 2 ** row["scores"][j]) * math.fsum(gaps) / len(gaps)


def lipo_lambda(rows: Sequence[Row], state: State, beta: float = 0.05, reduction: str = "sum") -> Values:
    def of(row: Row) -> float:
        return _pairs(row, beta, lambda i, j, m: swap_gain(row, i, j) * softplus(-m), reduction)

    return [of(row) for row in rows], len(rows)


def list_softmax(rows: Sequence[Row], state: State, beta: float = 0.05) -> Values:
    values = []
    for row in rows:
        share = softmax([beta * h(one) for one in row["completions"]])
        value = -math.fsum(psi * math.log(q) for psi, q in zip(row["scores"], share, strict=True))
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def pl_dpo(rows: Sequence[Row], state: State, beta: float = 0.05) -> Values:
    values = []
    for row in rows:
        s = [beta * h(one) for one in row["completions"]]
        psi, value = row["scores"], 0.0
        for k in range(len(s)):
            left = [s[k]] + [s[j] for j in range(len(s)) if psi[j] < psi[k]]
            value -= s[k] - math.log(math.fsum(math.exp(x) for x in left))
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def brain(
    rows: Sequence[Row], state: State, T: float = 1.0, goodness: str = "exponential", proposal: str = "reference"
) -> Values:
    values = []
    for row in rows:
        own, scores = row["completions"], row["scores"]
        centre = math.fsum(scores) / len(scores)
        drawn = [total({**one, "guide": one["anchor"]["guide"]}, "guide") for one in own if proposal == "guide"]
        drawn = drawn or [total(one, "ref_logp") for one in own]
        good = [math.exp(r / T) if goodness == "exponential" else sigmoid((r - centre) / T) for r in scores]
        a = softmax([total(y, "ref_logp") - q + math.log(g) for y, q, g in zip(own, drawn, good, strict=True)])
        b = softmax([total(y) - q for y, q in zip(own, drawn, strict=True)])
        values.append(row.get("weight", 1.0) * kl(a, b))
    return values, len(rows)


LOOPS: dict[str, Callable[..., Values]] = {
    "f_dpo": f_dpo,
    "chi_po": chi_po,
    "exo_pref": exo_pref,
    "exo_rw": exo_rw,
    "list_hinge": list_hinge,
    "lipo_lambda": lipo_lambda,
    "list_softmax": list_softmax,
    "pl_dpo": pl_dpo,
    "brain": brain,
}

STOPS: set[str] = set()
