"""The loops of the one-sided and regularised methods: bad answers and samples, DPO with a term more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.methods.loops import Row, State, Values, h, mean, softplus, total


def d2o(rows: Sequence[Row], state: State, alpha: float = 0.1, beta: float = 0.1) -> Values:
    values, negatives = [], 0
    for row in rows:
        if row["label"]:
            values.append(0.0)
            continue
        negatives += 1
        k = len(row["samples"])
        m = beta / k * sum(h(one) for one in row["samples"]) - alpha * h(row)
        values.append(row.get("weight", 1.0) * softplus(-m))
    return values, negatives


def spin(rows: Sequence[Row], state: State, lambda_: float = 0.1) -> Values:
    values = []
    for row in rows:
        human, model = row["chosen"], row["rejected"]
        m = lambda_ * ((total(human) - total(human, "ref_logp")) - (total(model) - total(model, "ref_logp")))
        values.append(row.get("weight", 1.0) * softplus(-m))
    return values, len(rows)


def seppo(rows: Sequence[Row], state: State, beta: float = 0.1) -> Values:
    values = []
    for row in rows:
        anchor, drawn = h(row["chosen"]), h(row["rejected"])
        sign = 1 if anchor >= 0 else -1
        values.append(row.get("weight", 1.0) * softplus(-beta * (anchor - sign * drawn)))
    return values, len(rows)


def vpo(
    rows: Sequence[Row],
    state: State,
    alpha: float = 0.01,
    beta: float = 0.1,
    sign: int = -1,
    baseline: str = "chosen",
) -> Values:
    values = []
    for row in rows:
        z = beta * (h(row["chosen"]) - h(row["rejected"]))
        if baseline == "samples":
            calibration = sum(h(one) for one in row["samples"]) / len(row["samples"])
        else:
            calibration = h(row["chosen" if baseline == "chosen" else "baseline"])
        values.append(row.get("weight", 1.0) * (softplus(-z) + sign * alpha * beta * calibration))
    return values, len(rows)


def flex_dpo(
    rows: Sequence[Row],
    state: State,
    beta_w: float = 0.1,
    beta_l: float = 0.08,
    gamma: float = 0.0,
    sft_reduction: str = "token_mean",
) -> Values:
    values = []
    for row in rows:
        m = beta_w * h(row["chosen"]) - beta_l * h(row["rejected"])
        extra = -mean(row["chosen"]) if sft_reduction == "token_mean" else -total(row["chosen"])
        values.append(row.get("weight", 1.0) * (softplus(-m) + gamma * extra))
    return values, len(rows)


def hypo(
    rows: Sequence[Row],
    state: State,
    lambda_: float = 1e-4,
    beta: float = 0.05,
    baseline: str = "rloo",
    live: int = 0,
    max_new_tokens: int = 256,
) -> Values:
    """`live` and `max_new_tokens` say where the samples come from, not what is done with them."""
    values = []
    for row in rows:
        ratios = [h(one) for one in row["samples"]]
        surrogate = 0.0
        for i, one in enumerate(row["samples"]):
            others = ratios[:i] + ratios[i + 1 :]
            b = sum(others) / len(others) if others and baseline == "rloo" else 0.0
            surrogate += total(one) * (ratios[i] - b) / len(ratios)
        z = beta * (h(row["chosen"]) - h(row["rejected"]))
        values.append(row.get("weight", 1.0) * (softplus(-z) + lambda_ * surrogate))
    return values, len(rows)


def spac(rows: Sequence[Row], state: State, eta: float = 10.0, rho: float = 0.1, kind: str = "logistic") -> Values:
    values = []
    for row in rows:
        w, bad = h(row["chosen"]), h(row["rejected"])
        terms = []
        for one in row["samples"]:
            terms.append(softplus(-(w - h(one)) / eta) if kind == "logistic" else (h(one) - (w + bad) / 2) / eta)
        values.append(row.get("weight", 1.0) * (softplus(-(w - bad) / eta) + rho * sum(terms) / len(terms)))
    return values, len(rows)


def demo_reg(
    rows: Sequence[Row], state: State, beta: float = 0.1, mu: float = 0.0, sft_reduction: str = "sum"
) -> Values:
    values = []
    for row in rows:
        value = softplus(-beta * (h(row["chosen"]) - h(row["rejected"])))
        if mu:
            value -= mu * (total(row["baseline"]) if sft_reduction == "sum" else mean(row["baseline"]))
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


def mapl(
    rows: Sequence[Row],
    state: State,
    beta: float = 0.1,
    lambda_1: float = 1.0,
    lambda_2: float = 1.0,
    score_prompt_tokens: bool = False,
) -> Values:
    """`score_prompt_tokens` says which tokens are scored, which the rows' masks hold."""
    values = []
    for row in rows:
        value = softplus(-beta * (h(row["chosen"]) - h(row["rejected"])))
        for kind, weight in (("intra", lambda_1), ("inter", lambda_2)):
            margins: dict[str, float] = {}
            for one in row["contrasts"]:
                own, number, sign = one["role"].split(":")
                if own == kind:
                    margins[number] = margins.get(number, 0.0) + (h(one) if sign == "+" else -h(one))
            value += weight * sum(softplus(-beta * m) for m in margins.values()) / len(margins)
        values.append(row.get("weight", 1.0) * value)
    return values, len(rows)


LOOPS: dict[str, Callable[..., Values]] = {
    "d2o": d2o,
    "spin": spin,
    "seppo": seppo,
    "vpo": vpo,
    "flex_dpo": flex_dpo,
    "hypo": hypo,
    "spac": spac,
    "demo_reg": demo_reg,
    "mapl": mapl,
}
STOPS: set[str] = {"hypo"}
