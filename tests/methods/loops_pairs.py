"""The pairwise methods once more, as plain loops over Python numbers; see `loops.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.core.seeds import derive

Row = Mapping[str, Any]
Values = tuple[list[float], float]
State = Mapping[str, float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def tokens(one: Row, name: str = "logp") -> list[float]:
    return [x for x, keep in zip(one[name], one.get("mask", [True] * len(one[name])), strict=True) if keep]


def lp(one: Row) -> float:
    return sum(tokens(one))


def ref(one: Row) -> float:
    return sum(tokens(one, "ref_logp"))


def ratio(one: Row) -> float:
    return lp(one) - ref(one)


def size(one: Row) -> int:
    return len(tokens(one))


def each(rows: Sequence[Row], value: Callable[[Row, Row, Row], float]) -> Values:
    return [row.get("weight", 1.0) * value(row["chosen"], row["rejected"], row) for row in rows], len(rows)


def cross_entropy(p: float, z: float) -> float:
    return -p * math.log(sigmoid(z)) - (1 - p) * math.log(sigmoid(-z))


def cdpo(rows: Sequence[Row], state: State, beta: float = 0.1, eps: float = 0.1) -> Values:
    return each(rows, lambda w, lose, row: cross_entropy(1 - eps, beta * (ratio(w) - ratio(lose))))


def rdpo(rows: Sequence[Row], state: State, beta: float = 0.1, eps: float = 0.1) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        z = beta * (ratio(w) - ratio(lose))
        return (-(1 - eps) * math.log(sigmoid(z)) + eps * math.log(sigmoid(-z))) / (1 - 2 * eps)

    return each(rows, value)


def dpo_hinge(rows: Sequence[Row], state: State, beta: float = 0.05) -> Values:
    return each(rows, lambda w, lose, row: max(0.0, 1 - beta * (ratio(w) - ratio(lose))))


def slic(
    rows: Sequence[Row], state: State, delta: float = 1.0, lambda_: float = 0.1, baseline: str = "chosen"
) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        return max(0.0, delta - lp(w) + lp(lose)) - lambda_ * lp(w if baseline == "chosen" else row["baseline"])

    return each(rows, value)


def cpo(rows: Sequence[Row], state: State, beta: float = 0.1, lambda_: float = 1.0) -> dict[str, Values]:
    preference = each(rows, lambda w, lose, row: -math.log(sigmoid(beta * (lp(w) - lp(lose)))))
    nll = [-lambda_ * row.get("weight", 1.0) * x for row in rows for x in tokens(row["chosen"])]
    return {"preference": preference, "sft": (nll, len(nll))}


def dpo_norm(rows: Sequence[Row], state: State, beta: float = 5.0) -> Values:
    return each(rows, lambda w, lose, row: -math.log(sigmoid(beta * (ratio(w) / size(w) - ratio(lose) / size(lose)))))


def r_dpo(rows: Sequence[Row], state: State, beta: float = 0.1, alpha: float = 0.01) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        return -math.log(sigmoid(beta * (ratio(w) - ratio(lose)) + alpha * (size(w) - size(lose))))

    return each(rows, value)


def dpop(rows: Sequence[Row], state: State, beta: float = 0.3, lambda_: float = 50.0) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        z = beta * (ratio(w) - ratio(lose) - lambda_ * max(0.0, ref(w) - lp(w)))
        return math.log1p(math.exp(-abs(z))) + max(-z, 0.0)

    return each(rows, value)


def cal_dpo(rows: Sequence[Row], state: State, beta: float = 0.01, c: float = 1.0) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        squares = (ratio(w) - 1 / (2 * beta)) ** 2 + (ratio(lose) + 1 / (2 * beta)) ** 2
        return -math.log(sigmoid(ratio(w) - ratio(lose))) + c * squares

    return each(rows, value)


def split_mix(seed: int, *keys: int) -> float:
    state = seed
    for key in keys:
        state = ((state ^ key) + 0x9E3779B97F4A7C15) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = ((state ^ (state >> shift)) * factor) % 2**64
        state ^= state >> 31
    return (state // 4096 + 0.5) / 2**52


def beta_dpo(
    rows: Sequence[Row], state: State, beta0: float = 0.1, a: float = 0.6, rho: float = 0.8, m: float = 0.9
) -> Values:
    margins = [ratio(row["chosen"]) - ratio(row["rejected"]) for row in rows]
    mean = sum(margins) / len(margins)
    centre = m * state.get("M0", 0.0) + (1 - m) * mean
    spread = state.get("S", 0.0)
    if len(rows) > 1:
        spread = m * spread + (1 - m) * math.sqrt(sum((x - mean) ** 2 for x in margins) / (len(rows) - 1))
    order = []
    for i, (x, row) in enumerate(zip(margins, rows, strict=True)):
        uniform = split_mix(derive(0, "beta_dpo"), row["chosen"]["key"], row["rejected"]["key"])
        order.append((-0.5 * ((x - centre) / spread) ** 2 - math.log(-math.log(uniform)), i))
    kept = {i for _, i in sorted(order, reverse=True)[: max(1, int(rho * len(rows) + 1e-9))]}
    beta = max(1e-3, beta0 * (1 + a * (sum(margins[i] for i in kept) / len(kept) - centre)))
    values = [
        -row.get("weight", 1.0) * math.log(sigmoid(beta * x)) if i in kept else 0.0
        for i, (x, row) in enumerate(zip(margins, rows, strict=True))
    ]
    return values, len(kept)


def transported(
    first: list[float], second: list[float], rows: Sequence[Row], value: Callable[[float], float]
) -> Values:
    """Both sides in order, the mass in hand handed on until it is used up; what has gone is booked on the first."""
    masses = [row.get("weight", 1.0) for row in rows]
    here, there = (sorted(range(len(rows)), key=side.__getitem__) for side in (first, second))
    left, right = masses[here[0]], masses[there[0]]
    values, i, j = [0.0] * len(rows), 0, 0
    while True:
        moved = min(left, right)
        values[here[i]] += moved * value(first[here[i]] - second[there[j]])
        left, right = left - moved, right - moved
        if left <= right:
            i += 1
            if i == len(rows):
                return values, len(rows)
            left = masses[here[i]]
        else:
            j += 1
            right = masses[there[j]]


def aot(rows: Sequence[Row], state: State, beta: float = 0.01, eps: float = 0.0) -> Values:
    policy = [lp(row["chosen"]) - lp(row["rejected"]) for row in rows]
    reference = [ref(row["chosen"]) - ref(row["rejected"]) for row in rows]
    return transported(policy, reference, rows, lambda m: cross_entropy(1 - eps, beta * m))


def aot_unpaired(rows: Sequence[Row], state: State, beta: float = 0.01, eps: float = 0.0) -> Values:
    chosen, rejected = ([ratio(row[name]) for row in rows] for name in ("chosen", "rejected"))
    return transported(chosen, rejected, rows, lambda m: cross_entropy(1 - eps, beta * m))


def apo_zero(rows: Sequence[Row], state: State, beta: float = 0.1) -> Values:
    return each(rows, lambda w, lose, row: 1 - sigmoid(beta * ratio(w)) + sigmoid(beta * ratio(lose)))


def apo_down(rows: Sequence[Row], state: State, beta: float = 0.1) -> Values:
    return each(rows, lambda w, lose, row: sigmoid(beta * ratio(w)) + 1 - sigmoid(beta * (ratio(w) - ratio(lose))))


def discopop(rows: Sequence[Row], state: State, beta: float = 0.05, tau: float = 0.05) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        z = beta * (ratio(w) - ratio(lose))
        m = sigmoid(z / tau)
        return (1 - m) * math.log1p(math.exp(-z)) + m * math.exp(-z)

    return each(rows, value)


def softmax(values: Sequence[float]) -> list[float]:
    exps = [math.exp(x - max(values)) for x in values]
    return [x / sum(exps) for x in exps]


def infonca(rows: Sequence[Row], state: State, beta: float = 0.01, alpha: float = 1.0) -> Values:
    values = []
    for row in rows:
        target = softmax([r / alpha for r in row["scores"]])
        share = softmax([beta * ratio(one) for one in row["completions"]])
        values.append(-row.get("weight", 1.0) * sum(p * math.log(q) for p, q in zip(target, share, strict=True)))
    return values, len(rows)


def nca(rows: Sequence[Row], state: State, beta: float = 0.01, alpha: float = 1.0) -> Values:
    values = []
    for row in rows:
        target = softmax([r / alpha for r in row["scores"]])
        rewards = [beta * ratio(one) for one in row["completions"]]
        value = -sum(p * math.log(sigmoid(s)) for p, s in zip(target, rewards, strict=True))
        value -= sum(math.log(sigmoid(-s)) for s in rewards) / len(rewards)
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def probability(row: Row, label: str, temperature: float) -> float:
    if label == "margin":
        return sigmoid(row["margin"] / temperature)
    odds = row["probability"] / (1 - row["probability"])
    return odds ** (1 / temperature) / (1 + odds ** (1 / temperature))


def soft_dpo(
    rows: Sequence[Row], state: State, beta: float = 0.1, T: float = 1.0, label: str = "probability"
) -> Values:
    return each(rows, lambda w, lose, row: cross_entropy(probability(row, label, T), beta * (ratio(w) - ratio(lose))))


def smpo(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.1,
    T: float = 1.0,
    c: float = 1.0,
    label: str = "probability",
) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        return -math.log(sigmoid(c * (2 * probability(row, label, T) - 1) * beta * (ratio(w) - ratio(lose))))

    return each(rows, value)


def robust_bt(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.1,
    kind: str = "mixture",
    floor: float = 0.05,
    ceiling: float = 1.0,
) -> Values:
    def value(w: Row, lose: Row, row: Row) -> float:
        z, c = beta * (ratio(w) - ratio(lose)), row["probability"]
        if kind == "soft":
            return cross_entropy(c, z)
        if kind == "debias":
            return (-c * math.log(sigmoid(z)) + (1 - c) * math.log(sigmoid(-z))) / (2 * c - 1)
        c = min(max(c, floor), ceiling)
        return -math.log(c * sigmoid(z) + (1 - c) * sigmoid(-z))

    return each(rows, value)


LOOPS: dict[str, Callable[..., Any]] = {
    "cdpo": cdpo,
    "rdpo": rdpo,
    "dpo_hinge": dpo_hinge,
    "slic": slic,
    "cpo": cpo,
    "dpo_norm": dpo_norm,
    "r_dpo": r_dpo,
    "dpop": dpop,
    "cal_dpo": cal_dpo,
    "beta_dpo": beta_dpo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "infonca": infonca,
    "nca": nca,
    "soft_dpo": soft_dpo,
    "smpo": smpo,
    "robust_bt": robust_bt,
}

STOPS: set[str] = {"beta_dpo"}
