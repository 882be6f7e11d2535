"""Random rows for `align.methods.terms`: one row is one unit of a view, a completion in it a dict of numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from align.methods.base import Method

Row = dict[str, Any]

TRAINED = (
    "logp",
    "value",
    "kl_ref_policy",
    "kl_policy_ref",
    "cross_entropy",
    "entropy",
    "log_sum_sq",
    "log_max",
    "logit",
    "logsumexp",
)
"""Columns that carry a gradient: outputs of the trained roles."""

_DRAWS: dict[str, Callable[[random.Random, float], float]] = {
    **dict.fromkeys(("ref_logp", "old_logp", "sampler_logp"), lambda rng, p: min(-0.005, p + rng.gauss(0, 0.5))),
    **dict.fromkeys(
        ("kl_ref_policy", "kl_policy_ref", "cross_entropy", "entropy"), lambda rng, p: rng.expovariate(3.0)
    ),
    **dict.fromkeys(("log_sum_sq", "log_max"), lambda rng, p: -rng.expovariate(2.0)),
    **dict.fromkeys(("logit", "logsumexp", "token_reward", "advantage"), lambda rng, p: rng.gauss(0, 1)),
}

_PARTS = ("chosen", "rejected", "baseline", "mismatched")
_MANY = ("samples", "contrasts", "completions")


def random_completion(method: Method, rng: random.Random, longest: int = 6) -> Row:
    """A completion with `logp` and every column that the method requires; some tokens are unscored."""
    needs = method.requires()
    length = rng.randint(1, longest)
    logp = [-rng.expovariate(1.0) - 0.01 for _ in range(length)]
    one: Row = {"logp": logp, "weight": rng.choice((0.5, 1.0, 2.0))}
    one["mask"] = [rng.random() < 0.8 for _ in range(length - 1)] + [True]
    for name in sorted(needs & set(_DRAWS)):
        one[name] = [_DRAWS[name](rng, p) for p in logp]
    if "step" in needs:
        turn = rng.randint(0, 2)
        one["step"] = [turn := turn + (rng.random() < 0.4) for _ in logp]
    if "marked" in needs:
        one["marked"] = [rng.random() < 0.4 for _ in logp]
    anchors = sorted(name.removeprefix("anchor.") for name in needs if name.startswith("anchor."))
    if anchors:
        one["anchor"] = {name: [_DRAWS["ref_logp"](rng, p) for p in logp] for name in anchors}
    if "value" in needs:
        one["value"] = [rng.gauss(0, 1) for _ in range(length + 1)]
    if "reward" in needs:
        one["reward"] = rng.gauss(0, 1)
    if "finished" in needs:
        one["finished"] = rng.random() < 0.7
    if "label" in needs:
        one["label"] = rng.random() < 0.6
    if "key" in needs:
        one["key"] = rng.getrandbits(62)
    if "rewards" in needs:
        one["rewards"] = {"helpful": rng.gauss(0, 1), "harmless": rng.gauss(0, 1)}
    return one


def contrast_roles(intra: int, inter: int) -> list[str]:
    """Roles of the completions of so many contrasts of one pair."""
    signs = {"intra": "+-", "inter": "+--+"}
    return [
        f"{kind}:{number}:{sign}"
        for kind, count in (("intra", intra), ("inter", inter))
        for number in range(count)
        for sign in signs[kind]
    ]


ORIGINS = ("policy", "reference")
"""Who wrote the two answers of a pair, in a method that reads `role`; in either order."""


def random_rows(method: Method, n: int, seed: int = 0, longest: int = 6) -> list[Row]:
    """`n` rows of the method's view, ragged, with weights; labels of both kinds from n = 2 on."""
    rng = random.Random(seed)
    rows = [_random_row(method, rng, longest) for _ in range(n)]
    if n > 1 and "label" in method.requires():
        rows[0]["label"], rows[1]["label"] = True, False
    return rows


def _random_row(method: Method, rng: random.Random, longest: int) -> Row:
    needs = method.requires()

    def one() -> Row:
        return random_completion(method, rng, longest)

    if method.view == "pairs":
        row: Row = {"chosen": one(), "rejected": one(), "weight": rng.choice((0.5, 1.0, 2.0))}
        row["probability"] = rng.uniform(0.5, 1.0)
        if "role" in needs:
            row["chosen"]["role"], row["rejected"]["role"] = ORIGINS if rng.random() < 0.5 else ORIGINS[::-1]
        if "margin" in needs:
            row["margin"] = rng.uniform(0, 2)
        if "baseline" in needs:
            row["baseline"] = one()
        if "samples" in needs:
            row["samples"] = [one() for _ in range(rng.randint(1, 3))]
        if "contrasts" in needs:
            row["contrasts"] = [
                {**one(), "role": role} for role in contrast_roles(rng.randint(1, 2), rng.randint(1, 2))
            ]
        return row
    if method.view in ("lists", "groups"):
        size = rng.randint(1, 4)
        row = {"completions": [one() for _ in range(size)], "weight": rng.choice((0.5, 1.0, 2.0))}
        row["scores"] = [rng.choice((0.0, 0.25, 0.5, 1.0)) for _ in range(size)]
        row["ranks"] = [rng.randint(1, size) for _ in range(size)]
        return row
    row = one()
    if "mismatched" in needs:
        row["mismatched"] = {name: value for name, value in one().items() if name not in ("label", "reward")}
    if "samples" in needs:
        drawn = [one() for _ in range(rng.randint(1, 3))]
        row["samples"] = [{name: v for name, v in own.items() if name not in ("label", "reward")} for own in drawn]
    return row


def map_completions(row: Row, change: Callable[[Row], Row]) -> Row:
    """The row with `change` applied to each completion in it (a single is a completion itself)."""
    inner: Row = {name: change(row[name]) for name in _PARTS if name in row}
    inner |= {name: [change(one) for one in row[name]] for name in _MANY if name in row}
    return change({**row, **inner}) if "logp" in row else {**row, **inner}


def completions_of(row: Row) -> Iterator[Row]:
    """Every completion of a row, in a fixed order."""
    if "logp" in row:
        yield row
    for name in _PARTS:
        if name in row:
            yield row[name]
    for name in _MANY:
        yield from row.get(name, ())


def tracked(rows: Sequence[Row], dtype: torch.dtype = torch.float64) -> tuple[list[Row], list[Tensor]]:
    """The rows with their trained columns as leaf tensors that ask for a gradient, and these leaves."""

    def leaf(one: Row) -> Row:
        trained = [name for name in TRAINED if name in one]
        # A list must not pass through torch's default dtype.
        fresh = {name: torch.as_tensor(one[name], dtype=dtype).detach().requires_grad_() for name in trained}
        return {**one, **fresh}

    made = [map_completions(row, leaf) for row in rows]
    return made, outputs_in(made)


def outputs_in(rows: Sequence[Row]) -> list[Tensor]:
    """The trained columns of rows that hold tensors, in a fixed order."""
    return [one[name] for row in rows for one in completions_of(row) for name in TRAINED if name in one]
