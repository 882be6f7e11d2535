"""What watches over an online run, on series of metrics: each monitor on a series that must set it off, and on noisy
healthy ones that must not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.core.options import build
from align.data.groups import RowId
from align.data.rollouts import Answer, RolloutGroup
from align.trainers.health import LIMITS, Finding, Health, HealthOptions
from align.trainers.variety import distinct_share, no_spread_share, repeated_share

STEPS = 60
Row = dict[str, float]


def healthy(step: int, rng: np.random.Generator) -> Row:
    """A batch of a run that learns: all that is watched moves a little and shakes."""
    return {
        "rollout/length": 200 + step + 20 * rng.normal(),
        "rollout/truncated": 0.05 + 0.03 * rng.random(),
        "rollout/repeated": 0.1 + 0.0005 * step + 0.03 * rng.normal(),
        "rollout/distinct": 0.6 - 0.001 * step + 0.05 * rng.normal(),
        "rollout/entropy": 2.0 - 0.01 * step + 0.2 * rng.normal(),
        "rollout/no_spread": 0.3 + 0.1 * rng.normal(),
        "rollout/kl": 0.2 * step + abs(rng.normal()),
        "sampler/ess": 0.8 + 0.1 * rng.normal(),
        "sampler/kl": 1e-3 * (1 + rng.random()),
        "rollout/reward/proxy": 0.01 * step + 0.1 * rng.normal(),
    }


def evaluation(step: int, rng: np.random.Generator, gold: float) -> Row:
    return {
        "eval_reward": 0.01 * step + 0.01 * rng.normal(),
        "eval_reward/proxy": 0.01 * step,
        "eval_reward/gold": gold,
    }


def run(health: Health, change: Callable[[int], Mapping[str, float]] = lambda step: {}, seed: int = 0) -> list[Finding]:
    """All findings of a run whose metrics are the healthy ones but for `change`."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(STEPS):
        found += health.observe(step, {**healthy(step, rng), **change(step)})
        if step % 5 == 4:
            gold = 0.5 + 0.004 * step + 0.02 * rng.normal()
            shown = evaluation(step, rng, gold)
            found += health.observe(step, {**shown, **{k: v for k, v in change(step).items() if k in shown}})
    return found


def test_a_healthy_run_is_left_in_peace() -> None:
    assert [one for seed in range(20) for one in run(Health(), seed=seed)] == []


SICK: dict[str, tuple[str, Callable[[int], Row], tuple[str, ...]]] = {
    "longer": ("length", lambda t: {"rollout/length": 200 * 1.02**t}, ("grew from 2", "limit 2", "punish length")),
    "shorter": ("length", lambda t: {"rollout/length": 200 * 0.96**t}, ("shrank from 1", "escape")),
    "loops": ("repetition", lambda t: {"rollout/repeated": min(0.1 + 0.01 * t, 1)}, ("4-grams", "circles")),
    "alike": ("repetition", lambda t: {"rollout/distinct": 0.6 * 0.96**t}, ("2-grams", "each other")),
    "certain": ("entropy", lambda t: {"rollout/entropy": 2 * 0.95**t}, ("entropy", "0.25 of the start", "exploring")),
    "flat": ("spread", lambda t: {"rollout/no_spread": min(0.3 + 0.02 * t, 1)}, ("80%", "teach nothing")),
    "far": ("kl", lambda t: {"rollout/kl": 2.5 * t}, ("nats an answer", "budget 100")),
    "cut": ("truncation", lambda t: {"rollout/truncated": min(0.02 * t, 1)}, ("limit 50%", "max_new_tokens")),
    "few": ("ess", lambda t: {"sampler/ess": 0.8 * 0.96**t}, ("limit 30%", "carry the gradient")),
    "stale": ("mismatch", lambda t: {"sampler/kl": 0.001 * 1.1**t}, ("limit 0.01", "weights reach the sampler")),
    "hacked": (
        "over_optimisation",
        lambda t: {"eval_reward/gold": 0.5 + 0.01 * t if t < 30 else 0.8 - 0.01 * (t - 30)},
        ("`gold` fell from its best of 0.7", "exploiting"),
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_what_goes_wrong_is_said_once_with_its_numbers(name: str) -> None:
    kind, change, words = SICK[name]
    (found,) = run(Health(), change)
    assert (found.kind, found.severity) == (kind, "warn")
    assert [word for word in words if word not in found.sentence] == []
    step = int(found.sentence.removeprefix("step ").split(":")[0])
    assert 10 < step < STEPS


def test_every_monitor_is_tried_here() -> None:
    assert {kind for kind, _, _ in SICK.values()} == set(LIMITS)


@pytest.mark.parametrize("name", SICK)
def test_a_monitor_stops_or_is_off(name: str) -> None:
    kind, change, _ = SICK[name]
    (found,) = run(Health(HealthOptions(**{kind: "stop"})), change)
    assert (found.kind, found.severity) == (kind, "stop")
    assert run(Health(HealthOptions(**{kind: "off"})), change) == []


def test_a_new_episode_is_said_anew_and_a_trembling_reading_is_not() -> None:
    said = []
    health = Health(HealthOptions(window=4))
    trembling = [0.78] * 4 + [0.82] * 4
    for step, share in enumerate([0.9] * 6 + trembling * 3 + [0.2] * 4 + [0.9] * 4):
        said += [step for _ in health.observe(step, {"rollout/no_spread": share})]
    assert said == [3, 37]


def test_a_steepening_fall_is_said_once() -> None:
    """Also where its own noise hides it for a while."""
    entropies = [2.0] * 8 + [2 * 0.6**step for step in range(8)] + [0.02] * 4 + [0.02, 0.3] * 3 + [0.02] * 6
    health = Health(HealthOptions(window=4))
    said = [step for step, value in enumerate(entropies) for _ in health.observe(step, {"rollout/entropy": value})]
    assert len(said) == 1


def test_one_bad_batch_says_nothing() -> None:
    spike = {
        "rollout/length": 1000.0,
        "rollout/repeated": 0.9,
        "rollout/entropy": 0.01,
        "rollout/no_spread": 1.0,
        "rollout/truncated": 1.0,
    }
    assert run(Health(), lambda step: spike if step == 40 else {}) == []


def lengths_of(values: Iterable[float]) -> list[Finding]:
    health = Health()
    return [one for step, length in enumerate(values) for one in health.observe(step, {"rollout/length": length})]


def test_noise_does_not_make_a_drift() -> None:
    """Of lengths that spread over orders of magnitude, a mean of twice the start's is within its error."""
    beyond, found = 0, []
    for seed in range(20):
        lengths = np.exp(2.0 * np.random.default_rng(seed).normal(size=STEPS))
        means = np.convolve(lengths, np.ones(10) / 10, "valid")[2:] / lengths[:2].mean()
        beyond += bool(((means > 2) | (means < 0.5)).any())
        health = Health()
        found += [
            one for step, length in enumerate(lengths) for one in health.observe(step, {"rollout/length": length})
        ]
    assert beyond > 15
    assert found == []


def test_a_collapse_within_the_first_window_is_seen() -> None:
    """It is over before a window is full, and the start must not be a mean over it."""
    health = Health()
    lengths = [6.0, 5.5, 1.2] + [1.0] * 12
    found = [
        one.kind for step, length in enumerate(lengths) for one in health.observe(step, {"rollout/length": length})
    ]
    assert found == ["length"]


def test_a_judge_that_trembles_around_a_constant_is_not_a_fall() -> None:
    """Runs of 40 evaluations with a rising proxy and a judge of noise alone: fewer than one in thirty is wrong."""
    false = 0
    for seed in range(150):
        rng, health = np.random.default_rng(seed), Health()
        health.observe(0, {"rollout/reward/proxy": 0.0})
        for step in range(40):
            shown = {"eval_reward": 0.1 * step, "eval_reward/gold": 0.6 + 0.02 * rng.normal()}
            false += bool(health.observe(step, shown))
    assert false < 5


def test_a_judge_that_falls_with_the_proxy_is_not_exploited() -> None:
    health = Health()
    health.observe(0, {"rollout/reward/proxy": 0.0})
    falls = [{"eval_reward": 1 - 0.1 * step, "eval_reward/gold": 1 - 0.1 * step} for step in range(12)]
    assert [one for step, shown in enumerate(falls) for one in health.observe(step, shown)] == []


def test_what_is_trained_on_is_no_judge() -> None:
    """Not even where the first evaluation comes before the first batch."""
    health = Health()
    found = health.observe(0, {"eval_reward": 0.0, "eval_reward/brevity": 1.0})
    for step in range(1, 12):
        found += health.observe(step, {"rollout/reward/brevity": -float(step)})
        found += health.observe(step, {"eval_reward": 0.1 * step, "eval_reward/brevity": 1 - 0.1 * step})
    assert found == []
    other = Health()
    other.observe(0, {"rollout/reward/proxy": 0.0})
    seen = []
    for step in range(12):
        seen += other.observe(step, {"eval_reward": 0.1 * step, "eval_reward/brevity": 1 - 0.1 * step})
    assert [one.kind for one in seen] == ["over_optimisation"]


@pytest.mark.parametrize("cut", [3, 17, 29, 31, 45])
@pytest.mark.parametrize("name", ["certain", "hacked", "flat"])
def test_a_resumed_run_says_what_a_whole_one_says(name: str, cut: int) -> None:
    _, change, _ = SICK[name]
    expected = run(Health(), change)
    rng, health, found = np.random.default_rng(0), Health(), []
    for step in range(STEPS):
        if step == cut:
            state, health = json.loads(json.dumps(health.state_dict())), Health()
            health.load_state_dict(state)
        found += health.observe(step, {**healthy(step, rng), **change(step)})
        if step % 5 == 4:
            shown = evaluation(step, rng, 0.5 + 0.004 * step + 0.02 * rng.normal())
            found += health.observe(step, {**shown, **{k: v for k, v in change(step).items() if k in shown}})
    assert found == expected
    assert len(found) == 1


def test_a_stop_that_sees_nothing_says_so_once() -> None:
    levels = {"kl": "stop", "over_optimisation": "stop", "ess": "warn", "length": "stop"}
    health, found = Health(HealthOptions(**levels)), []
    for step in range(30):
        if step == 5:
            state, health = health.state_dict(), Health(HealthOptions(**levels))
            health.load_state_dict(state)
        found += health.observe(step, {"rollout/length": 10.0})
    assert [(one.kind, one.severity) for one in found] == [("over_optimisation", "warn"), ("kl", "warn")]
    assert all(one.sentence.startswith("step 9: ") and "seen nothing so far" in one.sentence for one in found)


def test_missing_numbers_are_not_zeros() -> None:
    health = Health(HealthOptions(window=4))
    for step in range(12):
        value = float("nan") if step % 2 else 0.9
        found = health.observe(step, {"rollout/truncated": value})
        assert bool(found) == (step == 6)


def test_no_entropy_at_all_is_less_than_any_share() -> None:
    health = Health()
    found = [health.observe(step, {"rollout/entropy": 2.0 if step < 2 else 0.0}) for step in range(12)]
    assert [one.kind for said in found for one in said] == ["entropy"]


def test_answers_that_were_always_alike_are_compared_with_the_start() -> None:
    health = Health()
    falls = np.linspace(0.45, 0.35, 40)
    assert [one for step, x in enumerate(falls) for one in health.observe(step, {"rollout/distinct": float(x)})] == []


def test_an_infinite_kl_is_over_any_budget() -> None:
    (found,) = Health().observe(3, {"eval_kl": float("inf")})
    assert found.kind == "kl"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"entropy": "maybe"}, "'off', 'warn', 'stop'"),
        ({"entropy_share": 1.5}, "outside its range"),
        ({"window": 1}, "outside its range"),
        ({"entropi": "warn"}, "entropy"),
        ({"kl": "off", "kl_budget": 3.0}, "`kl` is off"),
        ({"repetition": "off", "distinct_share": 0.4}, "`repetition` is off"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(given: dict[str, Any], says: str) -> None:
    def make() -> None:
        _, errors = build(HealthOptions, "health", given)
        if errors:
            raise errors[0]

    with pytest.raises(ConfigError) as error:
        make()
    assert says in str(error.value)


# -- numbers of rollouts ---------------------------------------------------------------------------------------------


def group(answers: list[list[int]], rewards: list[float] | None = None, wins: Any = None) -> RolloutGroup:
    made = tuple(
        Answer(np.array(ids), "", rewards={} if rewards is None else {"paid": rewards[place]})
        for place, ids in enumerate(answers)
    )
    return RolloutGroup(RowId("made", 0), "say", np.array([1]), made, None if wins is None else np.array(wins))


def test_repeated_grams_are_counted_within_an_answer() -> None:
    once, loop = list(range(20)), [5] * 20
    assert repeated_share([group([once, once])]) == 0.0
    assert repeated_share([group([loop])]) == pytest.approx(1 - 1 / 17)
    # a b a b a b: of five 2-grams two are distinct; of three 4-grams two are
    assert repeated_share([group([[1, 2] * 3])], n=2) == pytest.approx(3 / 5)
    assert repeated_share([group([[1, 2] * 3])]) == pytest.approx(1 / 3)
    assert repeated_share([group([[1, 2, 3], loop])]) == pytest.approx(1 - 1 / 17)  # too short for any 4-gram
    assert np.isnan(repeated_share([group([[1, 2, 3]])]))


def test_distinct_grams_are_counted_over_a_prompts_answers() -> None:
    once = list(range(20))
    assert distinct_share([group([once] * 4)]) == pytest.approx(1 / 4)
    assert distinct_share([group([once, [100 + i for i in once]])]) == 1.0
    # the mean of prompts: the same answers to two prompts are no repetition
    assert distinct_share([group([once]), group([once])]) == 1.0
    assert distinct_share([group([once] * 4), group([once])]) == pytest.approx((1 / 4 + 1) / 2)
    assert np.isnan(distinct_share([group([[1]])]))


def test_groups_without_spread_are_counted_among_those_that_could_have_one() -> None:
    nan = float("nan")
    ids = [[1], [2], [3]]
    flat, mixed, alone = group(ids, [0.3] * 3), group(ids, [0.3, 0.3, 0.4]), group(ids, [0.3, nan, nan])
    assert no_spread_share([flat, mixed]) == 0.5
    assert no_spread_share([flat, mixed, mixed, mixed, alone]) == 0.25
    assert no_spread_share([group(ids, [nan, 1.0, 1.0])]) == 1.0
    assert np.isnan(no_spread_share([alone]))
    assert no_spread_share([group(ids, [0.1 + 0.2, 0.3, 0.3])]) == 1.0  # equal but for rounding
    tie, beats = [[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.9], [0.1, 0.5]]
    assert no_spread_share([group(ids[:2], wins=tie), group(ids[:2], wins=beats)]) == 0.5
