"""Watches over an online run: what goes wrong slowly, told in words, once an episode, as a warning or a stop.

Every monitor reads means over a window of batches, so that one unlucky batch says nothing; what is compared with the
start of the run must also be further from it than four standard errors. An episode begins where a reading passes its
limit and ends where it is a tenth inside it again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from align.core.errors import ConfigError
from align.core.options import check_all, option

Level = Literal["off", "warn", "stop"]
Kind = Literal["over_optimisation", "length", "repetition", "entropy", "spread", "kl", "truncation", "ess", "mismatch"]

PROXY, JUDGES, TRAINED = "eval_reward", "eval_reward/", "rollout/reward/"
SIGMAS = 4.0
"""Standard errors that a change since the start must exceed."""
START = 2
"""Batches that are the start: few, so that a collapse within the first window does not hide in what it is compared
with."""
CLEARED = 0.9
"""An episode is over at this share of the limit."""
ESS_AT_LEAST = 3
"""Batches before the effective sample size is judged: of one batch it is a draw itself."""
EVALUATIONS_AT_LEAST = 5


@dataclass(frozen=True, kw_only=True)
class HealthOptions:
    """What is watched, and how. Each monitor is `off`, `warn` or `stop` (the run ends after the step, with a
    checkpoint); what follows a monitor's name belongs to it and is refused where it is off."""

    over_optimisation: Level = option("warn", doc="the trained reward rises while a held-out judge or gold falls")
    judge_fall: float = option(5.0, above=0, doc="standard errors that a held-out judge may fall from its best")
    length: Level = option("warn", doc="answers grow or shrink")
    length_factor: float = option(2.0, above=1, doc="times longer or shorter than at the start")
    repetition: Level = option("warn", doc="answers repeat themselves, or each other")
    repetition_rise: float = option(0.2, above=0, below=1, doc="rise of the share of repeated 4-grams of an answer")
    distinct_share: float = option(0.5, above=0, below=1, doc="distinct 2-grams of a prompt's answers, of the start's")
    entropy: Level = option("warn", doc="the policy becomes deterministic")
    entropy_share: float = option(0.25, above=0, below=1, doc="entropy of a token, of the start's")
    spread: Level = option("warn", doc="groups of equal rewards, which teach nothing")
    no_spread_share: float = option(0.8, above=0, below=1, doc="share of such groups")
    kl: Level = option("warn", doc="distance to the reference")
    kl_budget: float = option(100.0, above=0, doc="KL to the reference in nats an answer")
    truncation: Level = option("warn", doc="answers that are cut before they end")
    truncated_share: float = option(0.5, above=0, below=1, doc="share of such answers")
    ess: Level = option("warn", doc="effective sample size of the ratios of trainer to sampler")
    least_ess: float = option(0.3, above=0, below=1, doc="as a share of the answers")
    mismatch: Level = option("warn", doc="sampler and trainer disagree about the same tokens")
    mismatch_limit: float = option(0.01, above=0, doc="KL of the two in nats a token")
    window: int = option(10, at_least=4, doc="batches of rollouts in a mean")
    eval_window: int = option(2, at_least=1, doc="evaluations in a mean")

    def __post_init__(self) -> None:
        check_all(self, "health")
        default = {one.name: one.default for one in dataclasses.fields(self)}
        for kind, limits in LIMITS.items():
            for name in limits:
                if self.level(kind) == "off" and getattr(self, name) != default[name]:
                    raise ConfigError(
                        f"health: `{name}` is unused",
                        why=f"`{kind}` is off",
                        mend=f"remove it, or write {kind}: warn",
                    )

    def level(self, kind: Kind) -> Level:
        found: Level = getattr(self, kind)
        return found


LIMITS: Mapping[Kind, tuple[str, ...]] = {
    "over_optimisation": ("judge_fall",),
    "length": ("length_factor",),
    "repetition": ("repetition_rise", "distinct_share"),
    "entropy": ("entropy_share",),
    "spread": ("no_spread_share",),
    "kl": ("kl_budget",),
    "truncation": ("truncated_share",),
    "ess": ("least_ess",),
    "mismatch": ("mismatch_limit",),
}
"""Monitor -> the options that are its own."""

_READS: Mapping[str, tuple[str, ...]] = {
    "length": ("rollout/length",),
    "repeated": ("rollout/repeated",),
    "distinct": ("rollout/distinct",),
    "entropy": ("rollout/entropy",),
    "spread": ("rollout/no_spread",),
    "kl": ("rollout/kl", "eval_kl"),
    "truncation": ("rollout/truncated",),
    "ess": ("sampler/ess",),
    "mismatch": ("sampler/kl",),
}
"""Series -> the metrics that feed it."""

_BLIND: Mapping[Kind, str] = {
    "over_optimisation": "evaluations with a judge that training does not see (`eval_feedback`)",
    "kl": "a reference, and evaluations or a method that reads it at every step",
    "ess": "the sampler's log-probs, and more than one step for each batch of rollouts",
    "mismatch": "the sampler's log-probs",
    "entropy": "the sampler's log-probs",
    "spread": "rewards",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a monitor says, with its numbers and what to do."""

    kind: Kind
    severity: Literal["warn", "stop"]
    sentence: str


@dataclass(frozen=True, slots=True)
class Reading:
    """How near a limit is: above 1 it is passed. `sentence` tells so. `sure`: whether it is beyond noise."""

    excess: float
    sentence: str
    sure: bool = True


@dataclass(eq=False)
class Series:
    """The first `START` and the last `window` values of a metric."""

    window: int
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        if len(self.first) < START:
            self.first.append(value)
        self.last = [*self.last, value][-self.window :]

    @property
    def mean(self) -> float:
        return float(np.mean(self.last))

    @property
    def start(self) -> float:
        return float(np.mean(self.first))

    @property
    def full(self) -> bool:
        """Whether the last window lies behind the start."""
        return self.count >= START + self.window

    @property
    def moved(self) -> bool:
        """Whether its mean is apart from the start beyond noise.

        The noise is that of the last window around its trend, for the start at least the same in relation to its size.
        """
        steps = np.arange(self.window)
        line = np.polynomial.Polynomial.fit(steps, self.last, 1)
        spread = float(np.sqrt(np.square(line(steps) - self.last).sum() / (self.window - 2)))
        relative = spread / abs(self.mean) if self.mean else 0.0
        error = math.hypot(spread / math.sqrt(self.window), max(spread, relative * self.start) / math.sqrt(START))
        return abs(self.mean - self.start) > SIGMAS * error

    def state(self) -> dict[str, Any]:
        return {"first": list(self.first), "last": list(self.last), "count": self.count}


class Health:
    """Takes the metrics of a run as they come and says what is wrong.

    Metrics that it reads: `rollout/length`, `rollout/truncated`, `rollout/repeated`, `rollout/distinct`,
    `rollout/entropy`, `rollout/no_spread`, `rollout/kl`, `sampler/ess`, `sampler/kl`, and of evaluations `eval_kl`,
    `eval_reward` (what is trained on) and `eval_reward/NAME` of judges that training does not see: those whose
    `rollout/reward/NAME` has never come. What does not come is not watched; a monitor set to `stop` says so.
    """

    def __init__(self, options: HealthOptions | None = None) -> None:
        self.options = options or HealthOptions()
        self.series = {name: Series(self.options.window) for name in _READS}
        self.judged: dict[str, list[list[float]]] = {}
        self.trained: set[str] = set()
        self.alarms: set[str] = set()
        self.batches = 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """What became wrong with these metrics; nothing of what was said already and still holds.

        Args:
            step: optimiser steps done, for the sentence.
            metrics: of one batch of rollouts, or of one evaluation. NaN counts as missing.
        """
        known = {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
        fresh = self._take(known)
        found = []
        for name, kind, reading in self._readings(fresh):
            level = self.options.level(kind)
            if reading.excess > 1 and reading.sure and name not in self.alarms:
                self.alarms.add(name)
                if level != "off":
                    found.append(Finding(kind, level, f"step {step}: {reading.sentence}"))
            elif reading.excess < CLEARED:
                self.alarms.discard(name)
        return found + list(self._blind(step, known))

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "series": {name: one.state() for name, one in self.series.items()},
            "judged": {name: [list(pair) for pair in pairs] for name, pairs in self.judged.items()},
            "trained": sorted(self.trained),
            "alarms": sorted(self.alarms),
            "batches": self.batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        window = self.options.window
        for name, one in state["series"].items():
            self.series[name] = Series(window, list(one["first"]), list(one["last"][-window:]), int(one["count"]))
        self.judged = {name: [list(pair) for pair in pairs] for name, pairs in state["judged"].items()}
        self.trained, self.alarms = set(state["trained"]), set(state["alarms"])
        self.batches = int(state["batches"])

    # -- what came ----------------------------------------------------------------------------------------------------

    def _take(self, metrics: Mapping[str, float]) -> set[str]:
        """Put the metrics where they belong; the series, and the judges, that have a new value."""
        fresh = set()
        for name, sources in _READS.items():
            value = next((metrics[source] for source in sources if source in metrics), None)
            if value is not None:
                self.series[name].add(value)
                fresh.add(name)
        self.batches += "rollout/length" in metrics
        self.trained |= {name.removeprefix(TRAINED) for name in metrics if name.startswith(TRAINED)}
        if PROXY in metrics:
            for name in metrics:
                if name.startswith(JUDGES):
                    self.judged.setdefault(name.removeprefix(JUDGES), []).append([metrics[PROXY], metrics[name]])
                    fresh.add(name)
        return fresh

    def _blind(self, step: int, metrics: Mapping[str, float]) -> Iterator[Finding]:
        if self.batches != self.options.window or "rollout/length" not in metrics:
            return
        for kind, needs in _BLIND.items():
            seen = bool(self._judges()) if kind == "over_optimisation" else bool(self.series[kind].count)
            if self.options.level(kind) == "stop" and not seen:
                sentence = f"step {step}: `{kind}` is set to stop and has seen nothing so far: it needs {needs}"
                yield Finding(kind, "warn", sentence)

    def _judges(self) -> list[str]:
        """Names that evaluations have and training has not. Before the first batch nobody knows which these are."""
        return sorted(set(self.judged) - self.trained) if self.trained else []

    # -- what it says -------------------------------------------------------------------------------------------------

    def _readings(self, fresh: set[str]) -> Iterator[tuple[str, Kind, Reading]]:
        for name, (kind, read) in _MONITORS.items():
            if name in fresh:
                yield name, kind, read(self.series[name], self.options)
        for name in self._judges():
            if JUDGES + name in fresh:
                reading = over_optimisation(name, self.judged[name], self.options)
                yield JUDGES + name, "over_optimisation", reading


_QUIET = Reading(0.0, "")


def over_optimisation(judge: str, pairs: list[list[float]], options: HealthOptions) -> Reading:
    """The held-out judge's fall from its best mean of `eval_window` evaluations, in standard errors of that fall.

    Nothing where the trained reward has not risen since that best. The noise of an evaluation is estimated by second
    differences, which no trend enters; at least a two-hundredth of the judge's range, so that a judge without noise
    may tremble.

    Args:
        pairs: (trained reward, judge) of each evaluation so far.
    """
    table, window = np.array(pairs), options.eval_window
    if len(table) < max(EVALUATIONS_AT_LEAST, 2 * window):
        return _QUIET
    means = np.stack([np.convolve(column, np.ones(window) / window, "valid") for column in table.T], axis=1)
    best = int(means[:, 1].argmax())
    error = [_noise(column) * math.sqrt(2 / window) for column in table.T]
    rise, fall = means[-1, 0] - means[best, 0], means[best, 1] - means[-1, 1]
    if rise <= error[0] or not error[1]:
        return _QUIET
    return Reading(
        float(fall / (options.judge_fall * error[1])),
        f"the trained reward rose from {means[best, 0]:.4g} to {means[-1, 0]:.4g} while the held-out `{judge}` fell "
        f"from its best of {means[best, 1]:.4g} to {means[-1, 1]:.4g}: the policy is exploiting the reward. Take the "
        "checkpoint of the best evaluation; raise beta, or mend the reward",
    )


def _noise(values: np.ndarray) -> float:
    """The standard deviation of one evaluation."""
    second = np.abs(np.diff(values, 2))
    # A mean over few is often too small, and the best of several means is high by luck: 1 + 4 / n holds the false
    # alarms of 40 evaluations of a constant judge at about one run in a hundred.
    error = float(second.mean()) * math.sqrt(math.pi / 12) * (1 + 4 / len(second))
    return max(error, float(np.ptp(values)) / 200)


def _length(series: Series, options: HealthOptions) -> Reading:
    if not series.full or not series.mean or not series.start:
        return _QUIET
    grown = series.mean > series.start
    factor = max(series.mean / series.start, series.start / series.mean)
    mend = (
        "if nothing asks for longer answers, punish length (`shaping: overlong`) or average over tokens"
        if grown
        else "look at the answers: short ones may be an escape; a minimum length or another reward mends it"
    )
    return Reading(
        factor / options.length_factor,
        f"answers {'grew' if grown else 'shrank'} from {series.start:.4g} to {series.mean:.4g} tokens, a factor of "
        f"{factor:.3g} (limit {options.length_factor:g}): {mend}",
        series.moved,
    )


def _repeated(series: Series, options: HealthOptions) -> Reading:
    if not series.full:
        return _QUIET
    return Reading(
        (series.mean - series.start) / options.repetition_rise,
        f"the share of repeated 4-grams within an answer rose from {series.start:.3f} to {series.mean:.3f} (limit: "
        f"{options.repetition_rise:g} more): answers run in circles. Look at them; lower the learning rate or raise "
        "beta",
        series.moved,
    )


def _distinct(series: Series, options: HealthOptions) -> Reading:
    if not series.full:
        return _QUIET
    return Reading(
        _ratio(options.distinct_share * series.start, series.mean),
        f"the share of distinct 2-grams among a prompt's answers fell from {series.start:.3f} to {series.mean:.3f} "
        f"(limit: {options.distinct_share:g} of the start): answers repeat each other. Raise the temperature or beta; "
        "lower the learning rate",
        series.moved,
    )


def _entropy(series: Series, options: HealthOptions) -> Reading:
    if not series.full:
        return _QUIET
    return Reading(
        _ratio(options.entropy_share * series.start, series.mean),
        f"the entropy of a token fell from {series.start:.3g} to {series.mean:.3g} nats (limit: "
        f"{options.entropy_share:g} of the start): the policy stops exploring. Raise beta, the temperature or "
        "epsilon_high; lower the learning rate",
        series.moved,
    )


def _spread(series: Series, options: HealthOptions) -> Reading:
    return _above(
        series,
        series.window,
        options.no_spread_share,
        f"in {series.mean:.0%} of the groups all rewards are equal (limit {options.no_spread_share:.0%}), and such "
        "groups teach nothing: take harder or easier prompts, more answers a prompt, or a finer reward",
    )


def _kl(series: Series, options: HealthOptions) -> Reading:
    return _above(
        series,
        1,
        options.kl_budget,
        f"the KL to the reference is {series.mean:.4g} nats an answer (budget {options.kl_budget:g}): stop here and "
        "take the best evaluation, or raise beta",
    )


def _truncation(series: Series, options: HealthOptions) -> Reading:
    return _above(
        series,
        series.window,
        options.truncated_share,
        f"{series.mean:.0%} of the answers are cut before they end (limit {options.truncated_share:.0%}), so rewards "
        "judge halves: raise `max_new_tokens`, mask cut answers, or punish length",
    )


def _ess(series: Series, options: HealthOptions) -> Reading:
    if series.count < min(ESS_AT_LEAST, series.window):
        return _QUIET
    return Reading(
        _ratio(options.least_ess, series.mean),
        f"the effective sample size of the ratios of trainer to sampler is {series.mean:.1%} of the answers (limit "
        f"{options.least_ess:.0%}): a few answers carry the gradient. Take fewer steps for each batch of rollouts, "
        "push weights more often, or use a sampler correction",
    )


def _mismatch(series: Series, options: HealthOptions) -> Reading:
    return _above(
        series,
        1,
        options.mismatch_limit,
        f"sampler and trainer differ by {series.mean:.3g} nats a token (KL, limit {options.mismatch_limit:g}) on the "
        "same tokens: check that weights reach the sampler, that temperatures agree, and the sampler's dtype; a "
        "sampler correction bounds the harm",
    )


def _above(series: Series, at_least: int, limit: float, sentence: str) -> Reading:
    return _QUIET if series.count < at_least else Reading(series.mean / limit, sentence)


def _ratio(limit: float, value: float) -> float:
    return limit / value if value > 0 else math.inf


_MONITORS: Mapping[str, tuple[Kind, Callable[[Series, HealthOptions], Reading]]] = {
    "length": ("length", _length),
    "repeated": ("repetition", _repeated),
    "distinct": ("repetition", _distinct),
    "entropy": ("entropy", _entropy),
    "spread": ("spread", _spread),
    "kl": ("kl", _kl),
    "truncation": ("truncation", _truncation),
    "ess": ("ess", _ess),
    "mismatch": ("mismatch", _mismatch),
}
"""Series -> its monitor, and how it is read."""
