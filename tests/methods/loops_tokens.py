"""The token-level family and the SFT side as plain loops; see `loops.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.methods.t_reg import BETTER, WORSE

Row = Mapping[str, Any]
Values = tuple[list[float], float]
State = Mapping[str, Any]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def places(one: Row) -> list[int]:
    """Positions of the scored tokens."""
    mask = one.get("mask", [True] * len(one["logp"]))
    return [t for t, keep in enumerate(mask) if keep]


def ratio(one: Row, t: int) -> float:
    return one["logp"][t] - one["ref_logp"][t]


def weight(row: Row) -> float:
    return row.get("weight", 1.0)


def tgdpo(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.1,
    alpha: float = 0.5,
    beta_guide: float | None = None,
    floor: float = 0.0,
) -> Values:
    values = []
    for row in rows:
        margin = 0.0
        for sign, one in ((1, row["chosen"]), (-1, row["rejected"])):
            for t in places(one):
                r = (beta_guide or beta) * (one["anchor"]["guide"][t] - one["ref_logp"][t])
                margin += sign * beta * max(floor, 1 + sign * alpha * r) * ratio(one, t)
        values.append(weight(row) * softplus(-margin))
    return values, len(rows)


def t_reg(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.01,
    alpha: float = 0.25,
    better_prompt: str = BETTER,
    worse_prompt: str = WORSE,
) -> Values:
    values = []
    for row in rows:
        margin, reg = 0.0, 0.0
        for sign, one in ((1, row["chosen"]), (-1, row["rejected"])):
            for t in places(one):
                margin += sign * beta * ratio(one, t)
                r = sigmoid(one["anchor"]["better"][t] - one["anchor"]["worse"][t]) - 0.5
                reg -= beta * r * one["logp"][t]
        values.append(weight(row) * (softplus(-margin) + alpha * sigmoid(-margin) * reg))
    return values, len(rows)


def rrpo(rows: Sequence[Row], state: State, beta: float = 0.1, alpha: float = 0.01) -> Values:
    values, kept = [], 0
    for row in rows:
        parts = {name: [t for t in places(row[name]) if row[name]["marked"][t]] for name in ("chosen", "rejected")}
        if not parts["chosen"] and not parts["rejected"]:
            values.append(0.0)
            continue
        u = sum(ratio(row["chosen"], t) for t in parts["chosen"])
        u -= sum(ratio(row["rejected"], t) for t in parts["rejected"])
        kl = sum(row["chosen"]["kl_ref_policy"][t] for t in places(row["chosen"]))
        values.append(weight(row) * (softplus(-beta * u) + alpha * kl))
        kept += 1
    return values, kept


def ld_dpo(rows: Sequence[Row], state: State, beta: float = 0.1, alpha: float = 0.5) -> Values:
    values = []
    for row in rows:
        shared = min(len(places(row["chosen"])), len(places(row["rejected"])))
        h = {}
        for name in ("chosen", "rejected"):
            own = [ratio(row[name], t) for t in places(row[name])]
            h[name] = sum(own[:shared]) + alpha * sum(own[shared:])
        values.append(weight(row) * softplus(-beta * (h["chosen"] - h["rejected"])))
    return values, len(rows)


def wpo(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.01,
    alignment: str = "sampled",
    clamp: float | None = 1.0,
) -> Values:
    values = []
    peak = {"sampled": "log_sum_sq", "greedy": "log_max"}.get(alignment)
    for row in rows:
        z, product = 0.0, 1.0
        for sign, one in ((1, row["chosen"]), (-1, row["rejected"])):
            own = places(one)
            z += sign * beta * sum(ratio(one, t) for t in own)
            product *= math.exp(sum(one["logp"][t] - (one[peak][t] if peak else 0) for t in own) / len(own))
        w = product if clamp is None else min(product, clamp)
        values.append(weight(row) * w * softplus(-z))
    return values, len(rows)


def cpl(
    rows: Sequence[Row],
    state: State,
    alpha: float = 0.1,
    lambda_: float = 0.5,
    gamma: float = 1.0,
    discount: str = "turn",
    form: str = "plain",
    normalize: str = "sum",
    bc_weight: float = 0.0,
    bc_on: str = "chosen",
    bc_steps: int = 0,
) -> Values:
    values = []
    for row in rows:
        sums, bc = {}, {}
        for name in ("chosen", "rejected"):
            one, own = row[name], places(row[name])
            sums[name] = 0.0
            for place, t in enumerate(own):
                k = place if discount == "token" else one["step"][t] - one["step"][own[0]]
                sums[name] += gamma**k * (one["logp"][t] if form == "plain" else ratio(one, t))
            sums[name] *= alpha / (len(own) if normalize == "token" else 1)
            bc[name] = -sum(one["logp"][t] for t in own) / len(own)
        p = row.get("probability", 1.0)
        loss = p * softplus(lambda_ * sums["rejected"] - sums["chosen"])
        loss += (1 - p) * softplus(lambda_ * sums["chosen"] - sums["rejected"])
        imitation = bc["chosen"] if bc_on == "chosen" else (bc["chosen"] + bc["rejected"]) / 2
        first = state.get("steps", 0) < bc_steps
        values.append(weight(row) * (imitation if first else loss + bc_weight * imitation))
    return values, len(rows)


def regret_pref(
    rows: Sequence[Row],
    state: State,
    kappa: float = 1.0,
    form: str = "policy",
    beta: float = 0.1,
    value_weight: float = 1.0,
) -> Values:
    values = []
    for row in rows:
        margin, error = 0.0, 0.0
        for sign, one in ((1, row["chosen"]), (-1, row["rejected"])):
            own = places(one)
            if form == "policy":
                margin += sign * sum(beta * ratio(one, t) for t in own)
                continue
            after = list(one["value"][1:])
            if one.get("finished", True):
                after[own[-1]] = 0.0
            for t in own:
                target = one["token_reward"][t] + after[t]
                margin += sign * (target - one["value"][t])
                error += (one["value"][t] - target) ** 2 / len(own) / 2
        values.append(weight(row) * (softplus(-kappa * margin) + value_weight * error))
    return values, len(rows)


def sft_fdiv(rows: Sequence[Row], state: State, beta: float = 1.0, kind: str = "chi2", level: str = "token") -> Values:
    floor = {"rkl": -20.0, "hellinger": -0.9, "js": -0.6}.get(kind, -math.inf)
    phi = {
        "tv": lambda r: r,
        "chi2": lambda r: r - r * r / 4,
        "rkl": lambda r: 1 - math.exp(-r),
        "hellinger": lambda r: r / (1 + r),
        "js": lambda r: math.log(2 - math.exp(-r)),
    }[kind]
    values = []
    for row in rows:
        ratios = [beta * ratio(row, t) for t in places(row)]
        if level == "sequence":
            ratios = [sum(ratios)]
        values += [-weight(row) * phi(max(r, floor)) for r in ratios]
    return values, len(values)


def iqlearn_sft(
    rows: Sequence[Row],
    state: State,
    lambda_: float = 0.1,
    gamma: float = 1.0,
    detach_next: bool = False,
    warmup_steps: int = 0,
) -> Values:
    values = []
    rise = min(1.0, (state.get("steps", 0) + 1) / warmup_steps) if warmup_steps else 1.0
    for row in rows:
        own = places(row)
        for place, t in enumerate(own):
            q, v = row["logit"][t], row["logsumexp"][t]
            if place + 1 < len(own):
                square = (q - gamma * row["logsumexp"][own[place + 1]]) ** 2
            else:
                square = q**2 if row.get("finished", True) else 0.0
            values.append(weight(row) * (v - q + rise * lambda_ * square))
    return values, len(values)


def ps_kd(rows: Sequence[Row], state: State, alpha_T: float = 0.8) -> Values:
    values = []
    a = alpha_T * (state["epoch"] + 1) / state["epochs"] if state.get("epoch") else 0.0
    for row in rows:
        values += [weight(row) * (a * row["cross_entropy"][t] - (1 - a) * row["logp"][t]) for t in places(row)]
    return values, len(values)


def elr(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.1,
    m: float = 0.7,
    lambda_: float = 3.0,
    update: str = "before",
    bias_correction: bool = False,
) -> Values:
    memory = dict(zip(state.get("key", ()), state.get("target", ()), strict=True))
    values = []
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        z = beta * (sum(ratio(chosen, t) for t in places(chosen)) - sum(ratio(rejected, t) for t in places(rejected)))
        p = min(max(sigmoid(z), 1e-4), 1 - 1e-4)
        t = memory.get((chosen["key"] * 0x5851F42D4C957F2D + rejected["key"]) % 2**63, [0.0, 0.0])
        if update == "before":
            t = [m * t[0] + (1 - m) * p, m * t[1] + (1 - m) * (1 - p)]
        if bias_correction and sum(t):
            t = [t[0] / sum(t), t[1] / sum(t)]
        values.append(weight(row) * (softplus(-z) + lambda_ * math.log(1 - t[0] * p - t[1] * (1 - p))))
    return values, len(rows)


LOOPS: dict[str, Callable[..., Values]] = {
    "tgdpo": tgdpo,
    "t_reg": t_reg,
    "rrpo": rrpo,
    "ld_dpo": ld_dpo,
    "wpo": wpo,
    "cpl": cpl,
    "regret_pref": regret_pref,
    "sft_fdiv": sft_fdiv,
    "iqlearn_sft": iqlearn_sft,
    "ps_kd": ps_kd,
    "elr": elr,
}
STOPS = {"t_reg", "wpo", "regret_pref", "elr"}
