"""What the papers say of policy gradients on rollouts, on bare numbers: clips, averages, KLs, baselines, presets."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.methods import METHODS, terms
from align.methods._policy_gradient import clip_shares
from align.methods.base import Draw
from align.methods.evaluate import make_bare_view
from align.shaping import Batch, make, run
from align.testing.rows import random_rows, tracked

Rows = list[dict[str, Any]]

GRPO_LIKE = ("grpo", "dr_grpo", "dapo", "gspo")
IDS = (*GRPO_LIKE, "rloo", "reinforce_pp", "reinforce_pp_baseline")
PLAIN = {"beta": 0.0}


def leaf(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def answer(ratios: Sequence[float], advantage: float, **more: Any) -> dict[str, Any]:
    """A completion whose tokens have these ratios to the old policy, and one advantage."""
    logp = leaf([-1.0 - 0.1 * t for t in range(len(ratios))])
    old = (logp.detach() - torch.tensor(ratios, dtype=torch.float64).log()).tolist()
    return {"logp": logp, "old_logp": old, "advantage": [advantage] * len(ratios), **more}


def group(*answers: dict[str, Any]) -> Rows:
    return [{"completions": list(answers)}]


def slopes(name: str, rows: Rows, **options: Any) -> list[list[float]]:
    """d loss / d log pi of each token of each completion."""
    leaves = [one["logp"] for row in rows for one in row["completions"]]
    found = torch.autograd.grad(terms(name, options, groups=rows).total(), leaves, allow_unused=True)
    return [[0.0] * len(x) if g is None else g.tolist() for x, g in zip(leaves, found, strict=True)]


def loss(name: str, rows: Rows, **options: Any) -> float:
    return float(terms(name, options, groups=rows).total().detach())


def some_rows(seed: int = 0, length: int | None = None, on_policy: bool = False) -> Rows:
    """Three groups of three answers, of one length or of several; on the policy, the ratios are 1."""
    rng = random.Random(seed)

    def one() -> dict[str, Any]:
        count = length or rng.randint(1, 5)
        ratios = [1.0 if on_policy else math.exp(rng.gauss(0, 0.3)) for _ in range(count)]
        made = answer(ratios, rng.gauss(0, 1))
        near = [p + rng.gauss(0, 0.3) for p in made["logp"].tolist()]
        return {**made, "ref_logp": near, "sampler_logp": [p + rng.gauss(0, 0.3) for p in made["old_logp"]]}

    return [{"completions": [one() for _ in range(3)]} for _ in range(3)]


def batch_of(rewards: Sequence[Sequence[float]], lengths: Sequence[int], log_ratio: Any = None) -> Batch:
    flat = np.array([r for own in rewards for r in own])
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return Batch(
        group=np.array([g for g, own in enumerate(rewards) for _ in own]),
        reward=flat,
        length=mask.sum(1),
        finished=np.ones(len(flat), dtype=bool),
        mask=mask,
        advantage=np.zeros(mask.shape),
        train=np.ones(len(flat), dtype=bool),
        log_ratio=np.zeros(mask.shape) if log_ratio is None else log_ratio,
    )


def pipeline(name: str, rewards: Sequence[Sequence[float]], lengths: Sequence[int], **options: Any) -> Rows:
    """Rows whose advantages are what the method's own stages make of the rewards; on the policy."""
    asked = METHODS.get(name)(**options).rollouts()
    made = run([make(stage.id, stage.options) for stage in asked.shaping], batch_of(rewards, lengths))
    numbers = iter(range(len(lengths)))
    rows = []
    for own in rewards:
        places = [next(numbers) for _ in own]
        kept = [i for i in places if made.train[i]]
        answers = [{**answer([1.0] * lengths[i], 0.0), "advantage": made.advantage[i, : lengths[i]]} for i in kept]
        rows += [{"completions": answers}] if answers else []
    return rows


# The clip


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
def test_no_gradient_exactly_where_the_clip_binds(advantage: float, ratio: float) -> None:
    """A > 0 and rho > 1 + e_high, or A < 0 and rho < 1 - e_low; elsewhere -A rho."""
    rows = group(answer([ratio], advantage))
    bound = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    for name, options in (("grpo", {**PLAIN, "epsilon_high": 0.28}), ("dapo", {}), ("gspo", {"epsilon": 0.2})):
        options = {"epsilon_high": 0.28, **options}
        assert slopes(name, rows, **options)[0] == pytest.approx([0.0 if bound else -advantage * ratio])
        held = min(max(ratio, 0.8), 1.28)
        assert loss(name, rows, **options) == pytest.approx(-min(ratio * advantage, held * advantage))


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_without_a_bound_of_its_own_the_clip_is_symmetric(name: str) -> None:
    for ratio, bound in ((1.19, False), (1.21, True)):
        found = slopes(name, group(answer([ratio], 1.0)), **PLAIN)
        assert (found == [[0.0]]) is bound


def test_clip_higher_lets_rare_tokens_of_good_answers_grow() -> None:
    """Another gradient for A > 0 and rho between the bounds, another value from there on, and nothing else."""
    for advantage, ratio in itertools.product((1.0, -1.0), (0.5, 1.0, 1.1, 1.24, 1.5)):
        rows = group(answer([ratio], advantage))
        low, high = ({**PLAIN, "epsilon_high": bound} for bound in (0.2, 0.28))
        between = advantage > 0 and 1.2 < ratio < 1.28
        assert (slopes("grpo", rows, **low) != slopes("grpo", rows, **high)) is between
        assert (loss("grpo", rows, **low) != loss("grpo", rows, **high)) is (advantage > 0 and ratio > 1.2)


def test_delta_is_the_dual_clip() -> None:
    """max(C, delta A) for A < 0, and nothing for A > 0."""
    for advantage, ratio in itertools.product((1.0, -1.0), (0.5, 1.0, 1.5, 2.9, 3.1, 50.0)):
        rows = group(answer([ratio], advantage))
        plain, held = loss("grpo", rows, **PLAIN), loss("grpo", rows, **PLAIN, delta=3.0)
        assert held == pytest.approx(-max(-plain, 3.0 * advantage) if advantage < 0 else plain)
        free = slopes("grpo", rows, **PLAIN)
        assert slopes("grpo", rows, **PLAIN, delta=3.0) == ([[0.0]] if advantage < 0 and ratio > 3 else free)


def test_dapo_without_its_changes_is_grpo_over_tokens() -> None:
    rows = some_rows(1)
    found = terms("dapo", {"epsilon_high": None}, groups=rows)
    whole = float(found.total().detach())
    assert whole == pytest.approx(loss("grpo", rows, **PLAIN, aggregation="tok"))
    assert whole != pytest.approx(loss("dapo", rows), rel=1e-6)


def test_what_is_clipped_is_told() -> None:
    """Between one and two epsilons from 1, on both sides; a token that is not scored is not counted."""
    short = {**answer([0.7, 1.0, 1.3, 0.1], -1.0), "mask": [1, 1, 1, 0]}
    rows = group(short, answer([0.7, 1.3, 1.35, 1.0, 1.0, 9.0], 1.0, mask=[1, 1, 1, 1, 1, 0]))
    view = make_bare_view("groups", rows)
    found = METHODS.get("grpo")(beta=0.0).measure(view)
    numbers = {name: (float(total), count) for name, (total, count) in found.items()}
    assert numbers == {
        "clip_ratio/low_mean": (1.0, 8.0),
        "clip_ratio/high_mean": (2.0, 8.0),
        "clip_ratio/region_mean": (3.0, 8.0),
    }
    assert METHODS.get("reinforce_pp")().measure(view) == found
    assert told("rloo", view) == (0.0, 1.0, 2.0)
    assert METHODS.get("rloo")(ratio="none").measure(view) == {}
    assert told("gspo", view) == (3.0, 5.0, 8.0)
    answers = ([0.7], [1]), ([0.9, 0.9], [1, 1]), ([0.1], [0])
    lower = group(*({**answer(ratios, -1.0), "mask": mask} for ratios, mask in answers))
    assert told("rloo", make_bare_view("groups", lower)) == (1.0, 0.0, 2.0)


def told(name: str, view: Any) -> tuple[float, float, float]:
    """Clipped below, clipped above, out of."""
    below, above, both = METHODS.get(name)().measure(view).values()
    assert float(below[0] + above[0]) == float(both[0])
    return float(below[0]), float(above[0]), below[1]


def test_a_ratio_on_the_bound_and_an_advantage_of_zero_are_not_clipped() -> None:
    bounds = torch.tensor([[1 - 0.2, 1 + 0.2, 0.1, 9.0]], dtype=torch.float64)
    for advantage in (torch.tensor([[-1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, -1.0, 0.5, -0.5]])):
        shares = clip_shares(bounds, advantage, torch.ones(1, 4, dtype=torch.bool), 0.2, 0.2)
        assert [float(total) for total, _ in shares.values()] == [0.0, 0.0, 0.0]


def test_the_kl_is_told_a_token() -> None:
    rows = some_rows(1)
    total, count = METHODS.get("grpo")().measure(make_bare_view("groups", rows))["kl"]
    tokens = [one for row in rows for one in row["completions"]]
    gaps = [r - p for one in tokens for r, p in zip(one["ref_logp"], one["logp"].tolist(), strict=True)]
    assert float(total.detach()) == pytest.approx(sum(math.exp(d) - d - 1 for d in gaps)) and count == len(gaps)


def test_an_answer_without_a_scored_token_has_no_part_in_the_gradient() -> None:
    rows = group({**answer([1.0], 1.0), "mask": [0]}, {**answer([1.0, 1.0], -0.5), "mask": [1, 1]})
    for name in IDS:
        silent, other = slopes(name, rows, **PLAIN)
        assert silent == [0.0] and all(math.isfinite(x) and x > 0 for x in other), name
        assert math.isfinite(loss(name, rows, **PLAIN))


# Averages


def test_relations_of_the_averages_at_equal_lengths() -> None:
    rows = some_rows(2, length=4)
    averages = ("seq", "tok", "sum", "const")
    found = {how: loss("grpo", rows, aggregation=how, max_completion_length=50) for how in averages}
    assert found["tok"] == pytest.approx(found["seq"], rel=1e-12)
    assert found["sum"] == pytest.approx(4 * found["seq"], rel=1e-12)
    assert found["const"] == pytest.approx(found["sum"] / 50, rel=1e-12)
    ragged = some_rows(2)
    assert loss("grpo", ragged, aggregation="tok") != pytest.approx(loss("grpo", ragged), rel=1e-3)


def test_weight_of_a_token_in_a_long_and_a_short_answer() -> None:
    rows = group(answer([1.0] * 4, 1.0), answer([1.0], 1.0))
    wanted = {"seq": (1 / 8, 1 / 2), "tok": (1 / 5, 1 / 5), "sum": (1 / 2, 1 / 2), "const": (1 / 20, 1 / 20)}
    for how, (long, short) in wanted.items():
        found = slopes("grpo", rows, **PLAIN, aggregation=how, max_completion_length=10)
        assert found == [pytest.approx([-long] * 4), pytest.approx([-short])]


# On the policy


@pytest.mark.parametrize("name", IDS)
def test_on_the_policy_the_gradient_is_that_of_reinforce(name: str) -> None:
    """-A grad log pi, each token by its answer's share of the average."""
    rows = some_rows(3, on_policy=True)
    flat = [one for row in rows for one in row["completions"]]
    tokens = sum(len(one["logp"]) for one in flat)
    for one, found in zip(flat, slopes(name, rows, **PLAIN), strict=True):
        length = len(one["logp"])
        share = {"grpo": 1 / 9 / length, "gspo": 1 / 9 / length, "dr_grpo": 1 / 9 / 1024, "rloo": 1 / 9}
        assert found == pytest.approx([-one["advantage"][0] * share.get(name, 1 / tokens)] * length)


def test_rloos_two_forms_have_one_gradient_on_the_policy() -> None:
    rows = some_rows(4, on_policy=True)
    first, second = (slopes("rloo", rows, ratio=ratio) for ratio in ("sequence", "none"))
    assert first == [pytest.approx(own, rel=1e-12) for own in second]
    moved = some_rows(4)
    assert slopes("rloo", moved) != [pytest.approx(own) for own in slopes("rloo", moved, ratio="none")]


def test_gspo_of_one_token_is_the_clip_of_a_token() -> None:
    rows = some_rows(5, length=1)
    wide = {**PLAIN, "epsilon": 0.2, "epsilon_high": 0.3}
    assert loss("gspo", rows, **wide) == pytest.approx(loss("grpo", rows, **wide), rel=1e-12)
    assert slopes("gspo", rows, **wide) == [pytest.approx(own) for own in slopes("grpo", rows, **wide)]


def test_gspo_does_not_see_which_token_the_ratio_comes_from() -> None:
    one, other = answer([2.0, 1.0, 0.5], 1.0), answer([1.0, 0.5, 2.0], 1.0)
    wide = {"epsilon": 0.9, "epsilon_high": 5.0}
    assert loss("gspo", group(one), **wide) == pytest.approx(loss("gspo", group(other), **wide), rel=1e-12)
    for ratios in ([1.1, 1.3], [1.2, 0.9, 1.0]):
        s = math.prod(ratios) ** (1 / len(ratios))
        found = slopes("gspo", group(answer(ratios, 0.7)), **wide)
        assert found == [pytest.approx([-s * 0.7 / len(ratios)] * len(ratios))]


def test_gspo_is_grpo_where_the_ratio_is_one() -> None:
    rows = some_rows(6, on_policy=True)
    assert loss("gspo", rows) == pytest.approx(loss("grpo", rows, **PLAIN), rel=1e-12)
    assert slopes("gspo", rows) == [pytest.approx(own) for own in slopes("grpo", rows, **PLAIN)]


def test_reinforce_pp_is_grpo_over_tokens_without_a_kl() -> None:
    rows = some_rows(7)
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        assert loss(name, rows) == pytest.approx(loss("grpo", rows, **PLAIN, aggregation="tok"), rel=1e-12)


# The KL to the reference, exactly: every token of a small vocabulary once, weighted by its probability


def policies(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy, log-probs of it, and of the reference, over five tokens."""
    drawn = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, 5, generator=drawn, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.log_softmax(-1), reference.log_softmax(-1)


def population(logp: Tensor, reference: Tensor, advantage: Tensor | None = None) -> Rows:
    """Five answers of one token; the mean over them is the policy's expectation."""
    probability = logp.detach().exp()
    gains = torch.zeros(5, dtype=torch.float64) if advantage is None else advantage
    return group(
        *(
            {
                "logp": logp[v : v + 1],
                "old_logp": logp[v : v + 1].detach(),
                "ref_logp": reference[v : v + 1],
                "advantage": gains[v : v + 1],
                "weight": 5 * probability[v],
            }
            for v in range(5)
        )
    )


def exact(logp: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL(pi || pi_ref) and KL(pi_ref || pi)."""
    return (logp.exp() * (logp - reference)).sum(), (reference.exp() * (reference - logp)).sum()


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradients_of_the_kl_estimators(seed: int) -> None:
    logits, logp, reference = policies(seed)
    reverse, forward = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in exact(logp, reference))
    wanted = {"k1": torch.zeros(5), "k2": reverse, "k3": forward, "k3_ratio": reverse}
    assert (reverse - forward).norm() > 0.05
    for estimator, gradient in wanted.items():
        found = terms("grpo", {"beta": 1.0, "kl_estimator": estimator}, groups=population(logp, reference)).total()
        (slope,) = torch.autograd.grad(found, logits, retain_graph=True)
        torch.testing.assert_close(slope, gradient.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_values_of_the_kl_estimators(seed: int) -> None:
    """k1 and k3 are KL(pi || pi_ref) in the mean, k2 is not; k3 is never negative, k1 is."""
    _, logp, reference = policies(seed)
    rows, kl = population(logp, reference), float(exact(logp, reference)[0].detach())
    found = {
        estimator: terms("grpo", {"beta": 1.0, "kl_estimator": estimator}, groups=rows)["kl"].values.detach()
        for estimator in ("k1", "k2", "k3", "k3_ratio")
    }
    for estimator in ("k1", "k3", "k3_ratio"):
        assert float(found[estimator].mean()) == pytest.approx(kl, rel=1e-12)
    assert float(found["k2"].mean()) != pytest.approx(kl, rel=1e-2)
    assert (found["k3"] >= 0).all() and (found["k1"] < 0).any()


def test_the_log_ratio_charged_to_the_reward_has_the_right_gradient() -> None:
    logits, logp, reference = policies(4)
    rows = population(logp, reference, -(logp - reference).detach())
    (slope,) = torch.autograd.grad(terms("rloo", {"ratio": "none"}, groups=rows).total(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact(logp, reference)[0], logits)
    torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-12)


def test_beta_scales_the_kl_and_zero_needs_no_reference() -> None:
    rows = some_rows(8)
    for how in ("seq", "tok", "sum", "const"):
        none, one, two = (loss("grpo", rows, beta=beta, aggregation=how) for beta in (0.0, 1.0, 2.0))
        assert two - none == pytest.approx(2 * (one - none), rel=1e-9) and one > none
    for name in GRPO_LIKE:
        assert "ref_logp" not in METHODS.get(name)(beta=0.0).requires()
        assert "ref_logp" in METHODS.get(name)(beta=0.1).requires()


def test_a_ratio_of_any_size_stays_finite() -> None:
    rows = group(answer([1.0], -1.0))
    rows[0]["completions"][0] |= {"old_logp": [-1e4], "ref_logp": [1e4], "sampler_logp": [-3e4]}
    for options in ({}, {"kl_estimator": "k3_ratio"}, {"sampler_correction": "token_truncate"}):
        assert math.isfinite(loss("grpo", rows, **options))
    assert loss("grpo", rows, **PLAIN) == pytest.approx(math.exp(20))


# What the sampler says


def drawn(gaps: Sequence[float], advantage: float = 1.0) -> dict[str, Any]:
    """On the policy, with these log(pi_old / mu)."""
    made = answer([1.0] * len(gaps), advantage)
    return {
        **made,
        "sampler_logp": [p - gap for p, gap in zip(made["old_logp"], gaps, strict=True)],
        "ref_logp": [-1.3] * len(gaps),
    }


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ("off", [1, 1, 1]),
        ("token_truncate", [0.5, 2, 1.5]),
        ("token_mask", [0.5, 0, 1.5]),
        ("sequence_truncate", [2, 2, 2]),
        ("sequence_mask", [0, 0, 0]),
    ],
)
def test_weights_by_what_the_samplers_numbers_differ(correction: str, weights: list[float]) -> None:
    """w = pi_old / mu of a token or of the answer, held at the cap or dropped above it; never on the KL."""
    rows = group(drawn([math.log(0.5), math.log(4), math.log(1.5)]), drawn([0.0]))
    options = {"sampler_correction": correction, "sampler_cap": 2.0}
    for name in ("reinforce_pp", "reinforce_pp_baseline", "dapo"):
        found = slopes(name, rows, **options)
        assert found == [pytest.approx([-w / 4 for w in weights]), pytest.approx([-1 / 4])]
    found, plain = (terms("grpo", some, groups=rows) for some in (options, {}))
    assert torch.equal(found["kl"].values, plain["kl"].values)
    assert found["policy"].values.tolist() == pytest.approx([-sum(weights) / 3, -1.0])


def test_a_product_below_the_cap_is_kept_whole() -> None:
    rows = group(drawn([math.log(0.5), math.log(3)]))
    for correction in ("sequence_truncate", "sequence_mask"):
        assert slopes("grpo", rows, **PLAIN, sampler_correction=correction) == [pytest.approx([-0.75, -0.75])]


def test_a_weight_at_the_cap_is_kept() -> None:
    cap = float(torch.tensor(0.5, dtype=torch.float64).exp())
    made = answer([1.0], 1.0)
    made["sampler_logp"] = [made["old_logp"][0] - 0.5]
    rows = group(made)
    for level in ("token", "sequence"):
        found = slopes("grpo", rows, **PLAIN, sampler_correction=f"{level}_mask", sampler_cap=cap)
        assert found == [pytest.approx([-cap])]


def test_without_a_mismatch_the_weight_is_one() -> None:
    rows = some_rows(9)
    for row in rows:
        for one in row["completions"]:
            one["sampler_logp"] = one["old_logp"]
    for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        assert loss("grpo", rows, sampler_correction=correction) == pytest.approx(loss("grpo", rows), rel=1e-12)


def test_a_sampler_log_prob_that_is_missing_counts_as_equal() -> None:
    rows = group(drawn([math.nan, math.log(1.5)]))
    assert slopes("grpo", rows, **PLAIN, sampler_correction="token_mask") == [pytest.approx([-0.5, -0.75])]
    assert slopes("grpo", rows, **PLAIN, sampler_correction="sequence_mask") == [pytest.approx([-0.75, -0.75])]


@pytest.mark.parametrize("name", [*GRPO_LIKE, "reinforce_pp", "reinforce_pp_baseline"])
def test_the_samplers_log_probs_are_asked_for_with_a_correction_alone(name: str) -> None:
    cls = METHODS.get(name)
    assert "sampler_logp" not in cls().requires()
    assert "sampler_logp" in cls(sampler_correction="token_mask").requires()


# From rewards to gradients


REWARDS, LENGTHS = [[1.0, 0.0, 0.0, 1.0], [0.5, 2.0, -1.0, 0.1]], [3, 1, 4, 2, 2, 2, 5, 1]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "rloo", "reinforce_pp_baseline"])
def test_what_is_added_to_all_rewards_of_a_prompt_changes_nothing(name: str) -> None:
    shifted = [[r + 3.0 * (g + 1) for r in own] for g, own in enumerate(REWARDS)]
    ours, theirs = (slopes(name, pipeline(name, some, LENGTHS, **PLAIN), **PLAIN) for some in (REWARDS, shifted))
    assert ours == [pytest.approx(own, abs=1e-9) for own in theirs]


def test_it_changes_reinforce_pp_whose_baseline_is_the_batch() -> None:
    shifted = [[r + 3.0 * g for r in own] for g, own in enumerate(REWARDS)]
    ours, theirs = (
        slopes("reinforce_pp", pipeline("reinforce_pp", some, LENGTHS, **PLAIN), **PLAIN) for some in (REWARDS, shifted)
    )
    assert ours != [pytest.approx(own, abs=1e-2) for own in theirs]


def test_scale_of_the_rewards_matters_to_dr_grpo_and_not_to_grpo() -> None:
    tripled = [[3 * r for r in own] for own in REWARDS]
    for name, factor in (("grpo", 1.0), ("dr_grpo", 3.0), ("rloo", 3.0), ("reinforce_pp_baseline", 1.0)):
        more = {"std_eps": 1e-12} if name == "grpo" else {}
        ours, theirs = (
            slopes(name, pipeline(name, some, LENGTHS, **PLAIN, **more), **PLAIN) for some in (REWARDS, tripled)
        )
        assert [[factor * g for g in own] for own in ours] == [pytest.approx(own, rel=1e-6) for own in theirs]


def test_dr_grpos_gradient_is_rloos_times_g_minus_one_over_g_and_the_longest() -> None:
    theirs = slopes("rloo", pipeline("rloo", REWARDS, LENGTHS, **PLAIN), **PLAIN, ratio="none")
    ours = slopes("dr_grpo", pipeline("dr_grpo", REWARDS, LENGTHS), max_completion_length=64)
    assert ours == [pytest.approx([g * 3 / 4 / 64 for g in own]) for own in theirs]


def test_dapo_leaves_out_prompts_that_are_solved_or_hopeless() -> None:
    options = {"max_completion_length": 4, "overlong_cache": 2}
    rows = pipeline("dapo", [[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], [1, 4, 1, 4, 1, 1], **options)
    assert [len(row["completions"]) for row in rows] == [2]
    gains = [one["advantage"][0] for one in rows[0]["completions"]]
    # The wrong answer is of the full length: its reward is -2, and two answers have one deviation whatever their gap.
    spread = np.std([1.0, -2.0], ddof=1)
    assert gains == pytest.approx([1.5 / (spread + 1e-4), -1.5 / (spread + 1e-4)])
    kept = pipeline("dapo", [[1.0, 1.0]], [1, 4], dynamic_sampling=False, **options)
    assert len(kept[0]["completions"]) == 2


def test_a_baseline_of_the_others_is_unbiased_and_one_of_all_is_short_by_g_minus_one_over_g() -> None:
    """Two answers out of five, all draws with their probability: the mean gradient against that of E r."""
    logits, logp, _ = policies(5)
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.7, 0.0], dtype=torch.float64)
    (wanted,) = torch.autograd.grad(-(logp.exp() * rewards).sum(), logits, retain_graph=True)
    for name, factor in (("rloo", 1.0), ("dr_grpo", 0.5)):
        options = {**PLAIN, "ratio": "none"} if name == "rloo" else {"max_completion_length": 1}
        total = torch.zeros(5, dtype=torch.float64)
        for pair in itertools.product(range(5), repeat=2):
            own = [[float(rewards[v]) for v in pair]]
            advantages = [one["advantage"] for one in pipeline(name, own, [1, 1], **PLAIN)[0]["completions"]]
            answers = [
                {"logp": logp[v : v + 1], "old_logp": logp[v : v + 1].detach(), "advantage": a}
                for v, a in zip(pair, advantages, strict=True)
            ]
            found = terms(name, options, groups=group(*answers)).total()
            (slope,) = torch.autograd.grad(found, logits, retain_graph=True)
            total += slope * logp.detach()[list(pair)].sum().exp()
        torch.testing.assert_close(total, factor * wanted, rtol=0, atol=1e-12)


# Declarations


STAGES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "grpo": [("group_normalise", {"scale": "group", "ddof": 1, "eps": 1e-4})],
    "dr_grpo": [("group_normalise", {"scale": "none", "ddof": 1, "eps": 1e-4})],
    "gspo": [("group_normalise", {"scale": "group", "ddof": 1, "eps": 1e-4})],
    "dapo": [
        ("dynamic_sampling", {}),
        ("overlong", {"max_length": 20480, "cache": 4096}),
        ("group_normalise", {"scale": "group", "ddof": 1, "eps": 1e-4}),
    ],
    "rloo": [("kl_in_reward", {"beta": 0.03, "target": None, "horizon": 10000}), ("leave_one_out", {})],
    "reinforce_pp": [
        ("token_returns", {"beta": 0.01, "target": None, "horizon": 10000, "gamma": 1.0}),
        ("whiten", {"ddof": 0, "mean_only": False}),
    ],
}
STAGES["reinforce_pp_baseline"] = [("group_center", {"into": "reward"}), *STAGES["reinforce_pp"]]
COUNTS = {"grpo": 8, "dr_grpo": 8, "gspo": 8, "dapo": 16, "rloo": 4, "reinforce_pp": 1, "reinforce_pp_baseline": 8}


def stages_of(name: str, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(stage.id, dict(stage.options)) for stage in METHODS.get(name)(**options).rollouts().shaping]


@pytest.mark.parametrize("name", IDS)
def test_what_is_sampled_and_how_its_rewards_are_shaped(name: str) -> None:
    asked = METHODS.get(name)().rollouts()
    assert asked.draws == (Draw("policy", COUNTS[name]),)
    assert (asked.feedback, asked.select, asked.ratio) == ("reward", "group", True)
    assert stages_of(name) == STAGES[name]
    assert METHODS.get(name)(num_generations=5).rollouts().draws[0].count == 5


def test_options_that_are_stages() -> None:
    normalise = STAGES["grpo"]
    mask, lengths = ("mask_truncated", {}), ("overlong", {"max_length": 100, "cache": 10})
    more = {"mask_truncated": True, "overlong_cache": 10, "max_completion_length": 100, "dynamic_sampling": True}
    assert stages_of("grpo", **more) == [("dynamic_sampling", {}), lengths, mask, *normalise]
    assert stages_of("grpo", scale="batch", ddof=0, std_eps=0.5) == [
        ("group_normalise", {"scale": "batch", "ddof": 0, "eps": 0.5})
    ]
    clip, eos = ("clip_reward", {"low": -2.0, "high": 2.0}), ("missing_eos", {"penalty": 0.5})
    shared = {"reward_clip": 2.0, "missing_eos_penalty": 0.5, "kl_target": 3.0, "kl_horizon": 50}
    assert stages_of("rloo", **shared) == [
        clip,
        eos,
        ("kl_in_reward", {"beta": 0.03, "target": 3.0, "horizon": 50}),
        ("leave_one_out", {}),
    ]
    assert stages_of("rloo", beta=0) == [("leave_one_out", {})]
    returns = ("token_returns", {"beta": 0.01, "target": 3.0, "horizon": 50, "gamma": 0.9})
    whiten = ("whiten", {"ddof": 1, "mean_only": True})
    last = {"gamma": 0.9, "whiten_ddof": 1, "no_std_norm": True}
    assert stages_of("reinforce_pp", **shared, **last) == [clip, eos, returns, whiten]
    centre = ("group_center", {"into": "reward"})
    assert stages_of("reinforce_pp_baseline", **shared, **last) == [clip, eos, centre, returns, whiten]


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_reference_is_asked_for_where_something_reads_it(name: str, beta: float) -> None:
    """The loss, or a stage that charges the KL to the reward."""
    made = METHODS.get(name)(beta=beta)
    charged = [make(stage.id, stage.options).needs_reference for stage in made.rollouts().shaping]
    assert ("ref_logp" in made.requires()) is (beta > 0)
    assert any(charged) is (beta > 0 and name not in GRPO_LIKE)


@pytest.mark.parametrize("name", IDS)
def test_the_stages_of_every_method_run(name: str) -> None:
    rows = pipeline(name, REWARDS, LENGTHS)
    assert sum(len(row["completions"]) for row in rows) == 8
    assert max(abs(x) for own in slopes(name, rows, **PLAIN) for x in own) > (1e-4 if name == "dr_grpo" else 0.05)


def test_without_the_ratio_rloo_needs_no_old_policy() -> None:
    plain = METHODS.get("rloo")(ratio="none")
    assert plain.requires() == {"advantage", "ref_logp"} and not plain.rollouts().ratio
    rows = random_rows(plain, 4, seed=1)
    made, leaves = tracked(rows)
    gradients = torch.autograd.grad(terms(plain, groups=made).total(), leaves)
    assert all(g.any() for g in gradients)


def test_of_several_advantages_rloo_takes_the_mean() -> None:
    one = {**answer([1.0, 1.0], 0.0), "advantage": [1.0, 3.0]}
    assert loss("rloo", group(one), **PLAIN) == pytest.approx(-2.0)
