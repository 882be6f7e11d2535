"""Stages of shaping: each equals its loop, keeps what its paper says, and leaves out what is missing."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.shaping import SHAPING, Batch, make, run
from tests.shaping.batches import (
    NAN,
    advantages,
    batch,
    centred,
    left_out,
    members,
    normalised,
    random_batch,
    returns,
    whitened,
)

SEEDS = range(6)
BASELINES = ("group_center", "group_normalise", "leave_one_out")
IDS = {
    *BASELINES,
    *("clip_reward", "dynamic_sampling", "kl_in_reward", "mask_truncated", "missing_eos", "overlong"),
    *("token_returns", "whiten"),
}


def shaped(made: Batch, id_: str, **options: Any) -> Batch:
    return make(id_, options)(made)


def each(made: Batch) -> np.ndarray:
    """The advantage of each completion, which is the same at all of its tokens; [N]."""
    last = [np.flatnonzero(own)[-1] for own in made.mask]
    found = made.advantage[np.arange(len(last)), last]
    np.testing.assert_array_equal(made.advantage, np.where(made.mask, found[:, None], 0.0))
    return found


def near(found: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance)


# Loops


@pytest.mark.parametrize("seed", SEEDS)
def test_baselines_equal_their_loops(seed: int) -> None:
    made = random_batch(seed)
    near(each(shaped(made, "group_center")), advantages(made, centred))
    near(each(shaped(made, "leave_one_out")), advantages(made, left_out))
    for scale in ("group", "batch", "none"):
        for ddof in (0, 1):
            found = each(shaped(made, "group_normalise", scale=scale, ddof=ddof, eps=0.01))
            near(found, normalised(made, scale, ddof, 0.01))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("beta", "gamma"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.9), (0.0, 0.5)])
def test_returns_of_tokens_equal_their_sums(seed: int, beta: float, gamma: float) -> None:
    made = random_batch(seed)
    near(shaped(made, "token_returns", beta=beta, gamma=gamma).advantage, returns(made, beta, gamma))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ddof", [0, 1])
def test_whitening_equals_its_loop_over_tokens(seed: int, ddof: int) -> None:
    made = shaped(random_batch(seed), "token_returns", beta=0.3)
    near(shaped(made, "whiten", ddof=ddof, eps=0.1).advantage, whitened(made, ddof, 0.1))


# Facts of the papers


@pytest.mark.parametrize("name", BASELINES)
def test_advantages_of_a_group_sum_to_zero(name: str) -> None:
    made = random_batch(1)
    found = each(shaped(made, name))
    near([found[own].sum() for own in members(made)], 0.0)
    assert np.abs(found).max() > 0.1


def test_leave_one_out_is_the_centred_reward_times_k_over_k_minus_one() -> None:
    made = batch([[1.0, 2.0, 6.0], [0.5, -1.0]])
    out, centre = (each(shaped(made, name)) for name in ("leave_one_out", "group_center"))
    near(out, centre * np.array([1.5, 1.5, 1.5, 2.0, 2.0]))
    near(out[3:], [1.5, -1.5])
    near(out[:3], [1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5])


def test_binary_rewards() -> None:
    """With success rate p and ddof 0: (r - p) / sqrt(p (1 - p))."""
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0]
    found = each(shaped(batch([rewards]), "group_normalise", ddof=0, eps=1e-12))
    near(found, [(r - 0.4) / math.sqrt(0.4 * 0.6) for r in rewards], 1e-9)


def test_shifts_and_scales_of_a_prompts_rewards() -> None:
    made = random_batch(2, missing=0.0)
    shifted = replace(made, reward=made.reward + 10.0 * made.group)
    scaled = replace(made, reward=made.reward * (1.0 + made.group))
    for name in BASELINES:
        near(each(shaped(shifted, name)), each(shaped(made, name)), 1e-10)
    near(*(each(shaped(one, "group_normalise", eps=1e-12)) for one in (scaled, made)), 1e-9)
    for name in ("group_center", "leave_one_out"):
        near(each(shaped(scaled, name)), each(shaped(made, name)) * (1.0 + made.group))


def test_a_group_of_equal_rewards_has_no_advantage() -> None:
    made = batch([[0.1, 0.1, 0.1], [1.0, 2.0]])
    for name in BASELINES:
        found = each(shaped(made, name))
        near(found[:3], 0.0)
        assert abs(found[3]) > 0.4


def test_scale_by_the_batch_takes_one_deviation_for_all_groups() -> None:
    made = batch([[0.0, 10.0], [0.0, 1.0]])
    found = each(shaped(made, "group_normalise", scale="batch", ddof=0, eps=1e-9))
    near(found[:2] / found[2:], 10.0, 1e-6)
    near(found[1], 5.0 / np.std([0.0, 10.0, 0.0, 1.0]), 1e-6)
    near(each(shaped(made, "group_normalise", scale="none")), each(shaped(made, "group_center")))


def test_ddof() -> None:
    made = batch([[1.0, 2.0, 6.0]])
    zero, one = (each(shaped(made, "group_normalise", ddof=ddof, eps=1e-12)) for ddof in (0, 1))
    near(one / zero, math.sqrt(2 / 3), 1e-9)


def test_overlong() -> None:
    lengths = [0, 6, 7, 8, 9, 10, 40]
    made = replace(batch([[1.0] * 7]), length=np.array(lengths))
    found = shaped(made, "overlong", max_length=10, cache=4)
    near(found.reward - 1.0, [0, 0, -0.25, -0.5, -0.75, -1, -1])
    assert found.metrics["overlong_share"] == pytest.approx(5 / 7)


def test_an_answer_that_was_cut_pays() -> None:
    made = batch([[1.0, 2.0, NAN]], finished=[True, False, False])
    near(shaped(made, "missing_eos", penalty=0.7).reward, [1.0, 1.3, NAN])
    near(shaped(made, "missing_eos", penalty=0.7, kind="replace").reward, [1.0, -0.7, NAN])
    assert shaped(made, "missing_eos").metrics["missing_eos_share"] == pytest.approx(2 / 3)


def test_rewards_are_clipped() -> None:
    found = shaped(batch([[-3.0, -1.0, 2.0, 3.0, NAN]]), "clip_reward", low=-1, high=2)
    near(found.reward, [-1, -1, 2, 2, NAN])
    assert found.metrics["reward_clipped_share"] == pytest.approx(1 / 2)


def test_the_kl_of_an_answer_is_the_sum_over_its_scored_tokens() -> None:
    ratios, masks = [[0.5, 9.0, 0.25], [-1.0, 0.0, 0.5]], [[True, False, True], [True, True, True]]
    made = batch([[1.0, 2.0]], log_ratio=ratios, masks=masks)
    found = shaped(made, "kl_in_reward", beta=0.2)
    near(found.reward, [1.0 - 0.2 * 0.75, 2.0 + 0.2 * 0.5])
    assert found.metrics["kl"] == pytest.approx(0.125) and found.metrics["kl_beta"] == 0.2


def test_the_baseline_holds_the_kl_where_it_comes_after() -> None:
    made = random_batch(3, missing=0.0)
    stages = [make("kl_in_reward", {"beta": 0.5}), make("leave_one_out", {})]
    before, after = run(stages, made), run(stages[::-1], made)
    assert made.log_ratio is not None
    kl = np.where(made.mask, made.log_ratio, 0.0).sum(1)
    near(each(before), advantages(replace(made, reward=made.reward - 0.5 * kl), left_out))
    near(each(after), advantages(made, left_out))


def test_without_kl_and_discount_a_return_is_the_reward_at_every_token() -> None:
    made = random_batch(4, missing=0.0)
    near(each(shaped(made, "token_returns", beta=0)), made.reward)
    flat = replace(made, log_ratio=np.zeros_like(made.mask, dtype=np.float64))
    near(each(shaped(flat, "token_returns", beta=0.7)), made.reward)


def test_a_tokens_kl_counts_for_it_and_those_before() -> None:
    made = batch([[1.0]], log_ratio=[[0.0, 0.3, 0.0]])
    near(shaped(made, "token_returns", beta=1.0).advantage, [[0.7, 0.7, 1.0]])
    near(shaped(made, "token_returns", beta=1.0, gamma=0.5).advantage, [[0.25 - 0.15, 0.5 - 0.3, 1.0]])


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_tokens_have_mean_zero_and_deviation_one(ddof: int) -> None:
    made = shaped(shaped(random_batch(5), "token_returns", beta=0.3), "whiten", ddof=ddof, eps=1e-12)
    tokens = made.advantage[made.mask & made.present[:, None]]
    near(tokens.mean(), 0.0)
    near(tokens.std(ddof=ddof), 1.0, 1e-9)
    near(made.advantage[~made.mask], 0.0)


def test_a_long_answer_counts_as_much_as_its_tokens() -> None:
    made = shaped(batch([[1.0, 0.0]], [3, 1]), "token_returns", beta=0)
    near(shaped(made, "whiten", mean_only=True).advantage, [[0.25] * 3, [-0.75, 0, 0]])


def test_whitening_of_equal_numbers_and_of_one_token() -> None:
    for rewards, lengths in (([[2.0, 2.0]], [3, 2]), ([[2.0]], [1])):
        made = shaped(batch(rewards, lengths), "token_returns", beta=0)
        for ddof in (0, 1):
            near(shaped(made, "whiten", ddof=ddof).advantage, 0.0)


def test_whitening_is_of_the_whole_step_and_not_of_a_ranks_share() -> None:
    made = shaped(batch([[1.0, 0.0], [5.0, 4.0]]), "token_returns", beta=0)
    whole = each(shaped(made, "whiten"))
    parts = [each(shaped(shaped(batch([own]), "token_returns", beta=0), "whiten")) for own in ([1.0, 0.0], [5.0, 4.0])]
    assert np.abs(whole - np.concatenate(parts)).max() > 0.5


def reinforce(made: Batch, **options: Any) -> Batch:
    stages = [("group_center", {"into": "reward"}), ("token_returns", {"beta": 0.0}), ("whiten", options)]
    return run([make(name, some) for name, some in stages], made)


def test_the_baseline_variant_of_reinforce_pp_is_grpo_on_one_group_of_equal_lengths() -> None:
    rewards = [0.3, -1.0, 2.0, 0.9]
    found = each(reinforce(batch([rewards], [5] * 4), ddof=0, eps=1e-12))
    near(found, each(shaped(batch([rewards], [5] * 4), "group_normalise", ddof=0, eps=1e-12)), 1e-9)
    unequal = each(reinforce(batch([rewards], [5, 1, 2, 5]), ddof=0, eps=1e-12))
    assert np.abs(unequal - found).max() > 0.1
    plain = batch([rewards, [r + 7.0 for r in rewards]])
    near(each(reinforce(plain)), np.tile(each(reinforce(batch([rewards]))), 2))


# Filters


def test_groups_without_spread_are_left_out() -> None:
    made = batch([[1.0, 1.0], [1.0, 0.0], [NAN, NAN], [2.0, NAN], [0.0, 0.0, 0.0]])
    found = shaped(made, "dynamic_sampling")
    assert found.train.tolist() == [False, False, True, True, *[False] * 7]
    assert found.metrics["groups_kept"] == pytest.approx(0.2)
    after = run([make("dynamic_sampling", {}), make("group_normalise", {})], made)
    assert np.abs(each(after)[after.train]).min() > 0.1


def test_a_penalty_for_length_before_the_filter_keeps_groups_of_equal_correctness() -> None:
    made = batch([[1.0, 1.0]], [3, 9])
    stages = [make("dynamic_sampling", {}), make("overlong", {"max_length": 9, "cache": 4})]
    assert not run(stages, made).train.any()
    assert run(stages[::-1], made).train.all()


def test_answers_that_were_cut_keep_their_place_in_the_statistics() -> None:
    made = batch([[1.0, 2.0, 6.0]], finished=[True, False, True])
    found = run([make("mask_truncated", {}), make("group_center", {})], made)
    assert found.train.tolist() == [True, False, True]
    near(each(found), [-2, -1, 3])
    assert found.metrics["truncated_share"] == pytest.approx(1 / 3)


# What is missing


@pytest.mark.parametrize("name", [*BASELINES, "token_returns"])
def test_a_missing_reward_changes_nothing_for_the_others(name: str) -> None:
    made = batch([[1.0, NAN, 4.0, 2.0], [0.0, 1.0]])
    found = shaped(made, name, **({"beta": 0} if name == "token_returns" else {}))
    without = shaped(batch([[1.0, 4.0, 2.0], [0.0, 1.0]]), name, **({"beta": 0} if name == "token_returns" else {}))
    assert found.train.tolist() == [True, False, True, True, True, True]
    near(np.delete(each(found), 1), each(without))
    near(each(found)[1], 0.0)
    near(*(np.delete(shaped(one, "whiten").advantage, cut, 0) for one, cut in ((found, [1]), (without, []))))


@pytest.mark.parametrize("name", BASELINES)
def test_an_answer_left_alone_is_not_trained_on(name: str) -> None:
    found = shaped(batch([[1.0, NAN], [0.0, 1.0], [NAN, NAN]]), name)
    assert found.train.tolist() == [False, False, True, True, False, False]
    near(each(found)[[0, 1, 4, 5]], 0.0)
    assert np.isfinite(found.advantage).all()


@pytest.mark.parametrize("name", BASELINES)
def test_a_group_of_one_has_no_baseline(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`: 2 of 3 groups have fewer than 2 completions") as caught:
        shaped(batch([[1.0], [1.0, 2.0], [3.0]]), name)
    assert "num_generations" in caught.value.mend


# All stages


@pytest.fixture(params=sorted(IDS))
def stage(request: pytest.FixtureRequest) -> Any:
    return make(
        request.param, {"beta": 0.2, "target": 1.0} if request.param in ("kl_in_reward", "token_returns") else {}
    )


def test_every_stage_is_found_and_named_here() -> None:
    assert set(SHAPING.entries()) == IDS
    for name, entry in SHAPING.entries().items():
        assert entry.summary and SHAPING.get(name).id == name and SHAPING.get(name).paper == entry.paper


def test_importing_the_stages_imports_no_torch() -> None:
    code = "import sys; from align.shaping import SHAPING; [SHAPING.get(n) for n in SHAPING.entries()]; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_stage_leaves_its_input_as_it_was(stage: Any) -> None:
    made = replace(random_batch(0), state={"kl_in_reward.beta": np.array(0.3)})
    before = {one.name: np.copy(getattr(made, one.name)) for one in fields(made)[:8]}
    stage(made)
    assert made.state == {"kl_in_reward.beta": np.array(0.3)} and made.metrics == {}
    for name, array in before.items():
        np.testing.assert_array_equal(getattr(made, name), array)


def test_order_does_not_matter(stage: Any) -> None:
    """The groups the other way round, and the completions of each."""
    made = shaped(random_batch(3), "token_returns", beta=0.1)
    turned = _turned(made)
    for name in ("reward", "advantage", "train"):
        near(getattr(stage(turned), name)[::-1].astype(float), getattr(stage(made), name).astype(float))


def _turned(made: Batch) -> Batch:
    arrays = {one.name: getattr(made, one.name)[::-1] for one in fields(made)[:8]}
    return replace(made, **{**arrays, "group": (made.groups - 1 - made.group)[::-1]})


def test_no_rollouts_at_all(stage: Any) -> None:
    made = batch([], log_ratio=[])
    made = replace(made, log_ratio=np.zeros((0, 0)))
    assert stage(made).advantage.shape == (0, 0)
    assert run([stage], made).groups == 0


def test_numbers_stay_float64(stage: Any) -> None:
    found = stage(random_batch(1))
    assert found.reward.dtype == found.advantage.dtype == np.float64
    assert found.train.dtype == bool


def test_a_run_tells_of_rewards_and_advantages() -> None:
    made = batch([[1.0, 3.0], [2.0, 2.0], [NAN, 7.0]], [1, 2, 3, 3, 3, 3])
    found = run([make("overlong", {"max_length": 3, "cache": 1}), make("group_center", {})], made)
    rewards = [1.0, 3.0, 2.0, 2.0, 7.0]
    assert found.metrics == pytest.approx(
        {
            "reward": np.mean(rewards),
            "reward_std": np.std(rewards, ddof=1),
            "reward_missing": 1 / 6,
            "frac_reward_zero_std": 2 / 3,
            "overlong_share": 4 / 6,
            "trained_share": 4 / 6,
            "advantage_abs_mean": 3 / 9,
        }
    )


def test_one_reward_has_no_deviation() -> None:
    assert set(run([], batch([[1.0, NAN]])).metrics) == {
        *("reward", "reward_missing", "frac_reward_zero_std", "trained_share", "advantage_abs_mean")
    }
    assert set(run([], batch([[NAN]])).metrics) == {"reward_missing", "trained_share"}


def test_a_missing_reward_is_not_trained_on_without_any_stage() -> None:
    assert run([], batch([[1.0, NAN]])).train.tolist() == [True, False]


@pytest.mark.parametrize("id_", ["kl_in_reward", "token_returns"])
def test_a_kl_without_a_reference_is_refused(id_: str) -> None:
    with pytest.raises(ConfigError, match=f"`{id_}` compares with a reference"):
        run([make(id_, {"beta": 0.1})], batch([[1.0, 2.0]]))
    assert not make("token_returns", {"beta": 0}).needs_reference
    near(each(run([make("token_returns", {"beta": 0})], batch([[1.0, 2.0]]))), [1.0, 2.0])


@pytest.mark.parametrize(
    ("id_", "options", "said"),
    [
        ("clip_reward", {"low": 2, "high": 2}, "low < high"),
        ("clip_reward", {"low": math.inf}, "low"),
        ("group_center", {"into": "loss"}, "into"),
        ("group_normalise", {"scale": "global"}, "scale"),
        ("group_normalise", {"ddof": 2}, "ddof"),
        ("group_normalise", {"eps": 0}, "eps"),
        ("kl_in_reward", {"beta": 0}, "beta"),
        ("kl_in_reward", {"target": 0}, "target"),
        ("kl_in_reward", {"horizon": 0}, "horizon"),
        ("missing_eos", {"penalty": -1}, "penalty"),
        ("missing_eos", {"kind": "drop"}, "kind"),
        ("overlong", {"max_length": 10, "cache": 11}, "cache"),
        ("overlong", {"cache": 0}, "cache"),
        ("overlong", {"max_length": 0}, "max_length"),
        ("token_returns", {"beta": -1}, "beta"),
        ("token_returns", {"gamma": 0}, "gamma"),
        ("token_returns", {"gamma": 1.1}, "gamma"),
        ("whiten", {"ddof": 2}, "ddof"),
        ("whiten", {"eps": 0}, "eps"),
        ("whiten", {"mean": True}, "mean_only"),
        ("whitten", {}, "whiten"),
    ],
)
def test_options_outside_the_range_are_refused(id_: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(id_, options)


def test_bounds_that_belong_to_the_range() -> None:
    near(shaped(replace(batch([[1.0]]), length=np.array([5])), "overlong", max_length=10, cache=10).reward, [0.5])
    near(shaped(batch([[1.0]], finished=[False]), "missing_eos", penalty=0).reward, [1.0])
