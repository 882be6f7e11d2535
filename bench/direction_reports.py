"""Comparisons that papers make, on the worlds: measured and reported, whichever way they fall."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.evaluate.intervals import mean_interval

Metrics = Mapping[str, float]
BETAS = (0.3, 1.0, 3.0)
"""Strengths of the leash at which two divergences are compared: below the first both lose reward again (gold reward of
0.578 and 0.662 at 0.03 against 0.684 and 0.699 at 0.3), and equal rewards would be of two kinds."""
RATES = (7.5e-5, 1.5e-4, 2.5e-4)
"""Learning rates, by which two methods go different ways from the start, to be compared at equal ways."""


@dataclass(frozen=True)
class Job:
    """One training: a shipped recipe `demo/NAME` on a world, on its own data or those of another recipe.

    Attributes:
        overrides: on the recipe's options. data: the recipe whose files are read; empty: its own.
    """

    world: str
    recipe: str
    data: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return " ".join([self.world, self.recipe, *([f"data:{self.data}"] if self.data else []), *self.overrides])


@dataclass(frozen=True)
class Report:
    """What a paper says, and the jobs that can show it: ours first, then theirs.

    Attributes:
        metric: what is compared. at_equal: compare along a curve, at equal values of this metric.
    """

    says: str
    metric: str
    ours: tuple[Job, ...]
    theirs: tuple[Job, ...]
    at_equal: str = ""
    beside: tuple[str, ...] = field(default=("gold_reward", "kl", "length"))

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.ours, *self.theirs)


def _one(world: str, recipe: str, data: str = "", *overrides: str) -> tuple[Job, ...]:
    return (Job(world, recipe, data, overrides),)


def _betas(world: str, recipe: str, *overrides: str) -> tuple[Job, ...]:
    return tuple(Job(world, recipe, "", (f"method.beta={beta}", *overrides)) for beta in BETAS)


def _rates(world: str, recipe: str) -> tuple[Job, ...]:
    return tuple(Job(world, recipe, "", (f"train.learning_rate={rate:g}",)) for rate in RATES)


_LONG = _one("length_biased", "dpo")
REPORTS = {
    "flipped labels: rdpo": Report(
        "with 30 % flipped labels rdpo keeps more gold reward than dpo (2403.00409)",
        "gold_reward",
        _one("flipped", "rdpo"),
        _one("flipped", "dpo"),
    ),
    "likelihood: rpo": Report(
        "rpo keeps the chosen answer likelier than dpo does (2405.16436)",
        "chosen_logp",
        _one("style", "rpo"),
        _one("style", "dpo"),
    ),
    "likelihood: dpop": Report(
        "dpop keeps the chosen answer likelier than dpo does (2402.13228)",
        "chosen_logp",
        _one("style", "dpop"),
        _one("style", "dpo"),
    ),
    "length: simpo": Report(
        "simpo's answers are shorter than dpo's where labels favour length (2405.14734)",
        "length",
        _one("length_biased", "simpo"),
        _LONG,
    ),
    "length: dpo_norm": Report(
        "length-normalised dpo's answers are shorter than dpo's where labels favour length",
        "length",
        _one("length_biased", "dpo_norm"),
        _LONG,
    ),
    "length at equal KL: simpo": Report(
        "the same where both have moved as far from the starting model",
        "length",
        _rates("length_biased", "simpo"),
        _rates("length_biased", "dpo"),
        at_equal="kl",
    ),
    "length at equal KL: dpo_norm": Report(
        "the same where both have moved as far from the starting model",
        "length",
        _rates("length_biased", "dpo_norm"),
        _rates("length_biased", "dpo"),
        at_equal="kl",
    ),
    "unbalanced: kto": Report(
        "kto on few desirable and many undesirable answers beats imitation of the desirable ones (2402.01306)",
        "gold_reward",
        # The paper's rule for unbalanced labels, and for imitation as many steps as kto takes.
        _one("style", "kto", "bco", "method.desirable_weight=4", "train.global_batch_size=32"),
        _one("style", "sft", "bco", "train.num_train_epochs=10"),
    ),
    "diversity: f_dpo": Report(
        "at equal reward the Jensen-Shannon divergence leaves more entropy than the reverse KL (2309.16240)",
        "entropy",
        _betas("style", "f_dpo", "method.divergence=js"),
        _betas("style", "f_dpo", "method.divergence=reverse_kl"),
        at_equal="gold_reward",
    ),
}


def report(name: str, found: Mapping[int, Mapping[str, Metrics]]) -> dict[str, Any] | None:
    """The difference with its interval over seeds; None where runs are missing."""
    one = REPORTS[name]
    if any(job.key not in runs for runs in found.values() for job in one.jobs):
        return None
    if one.at_equal:
        differences = [_at_equal(one, runs) for runs in found.values()]
    else:
        differences = [
            runs[one.ours[0].key][one.metric] - runs[one.theirs[0].key][one.metric] for runs in found.values()
        ]
    estimate = mean_interval(differences)
    sides = {"ours": one.ours, "theirs": one.theirs}
    return {
        "says": one.says,
        "metric": one.metric,
        "difference": {"value": estimate.value, "low": estimate.low, "high": estimate.high},
        "by_seed": [None if math.isnan(one) else one for one in differences],
        "runs": {
            side: [
                {
                    "job": job.key,
                    **{
                        metric: float(np.mean([runs[job.key][metric] for runs in found.values()]))
                        for metric in (one.metric, *one.beside)
                    },
                }
                for job in jobs
            ]
            for side, jobs in sides.items()
        },
    }


def _at_equal(one: Report, runs: Mapping[str, Metrics]) -> float:
    """The mean difference of the metric between two curves, over the values of `at_equal` that both reach."""
    curves = []
    for jobs in (one.ours, one.theirs):
        points = sorted((runs[job.key][one.at_equal], runs[job.key][one.metric]) for job in jobs)
        curves.append(np.array(points))
    low = max(curve[0, 0] for curve in curves)
    high = min(curve[-1, 0] for curve in curves)
    if high <= low:
        return float("nan")  # they reach no value in common: missing, and left out of the mean
    places = np.linspace(low, high, 50)
    ours, theirs = (np.interp(places, curve[:, 0], curve[:, 1]) for curve in curves)
    return float(np.mean(ours - theirs))
