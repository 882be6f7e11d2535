"""Every method on a problem that is solved exactly: its step goes down, its gradient is right, its optimum is where the
book says. A method that has the fact wrong is shown beside each check."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from align.methods import METHODS
from align.methods.base import Method, finish, method
from align.methods.stages import logistic
from align.scoring.views import Lists, Pairs
from align.testing.checks import variants
from align.testing.token_tree import (
    STEP,
    Tabular,
    TokenTree,
    differences_on_tree,
    gradient,
    gradient_of,
    norm,
    objective,
    pairs,
    random_policy,
    singles,
    step_lowers_objective,
)

BETA = 0.5
SEEDS = (0, 1)
ZERO = 1e-10
NAMES = list(METHODS.entries())
HELD = {"wpo", "nash_md"}
"""A weight without gradient grows more than the loss that it weighs falls; a surrogate's value means nothing."""
DOWN_FIRST = {"discopop"}
"""Methods whose first steps lower margins, as their papers say: the slope of discopop's loss at 0 is +0.784."""


def made(name: str, **options: Any) -> Method:
    return METHODS.get(name)(**options)


def slope_at(name: str, tree: TokenTree, policy: Tabular, **options: Any) -> float:
    """Length of the gradient of the population objective."""
    return norm(gradient(made(name, **options), tree, policy))


def optimum_is(name: str, tree: TokenTree, policy: Tabular, **options: Any) -> None:
    """The population gradient is 0 at `policy`, and neither at the reference nor a little beside `policy`."""
    assert slope_at(name, tree, policy, **options) < ZERO
    assert slope_at(name, tree, tree.reference, **options) > 1e-3
    beside = policy.moved([torch.eye(*policy.logits.shape, dtype=torch.float64), policy.value], 1e-3)
    assert slope_at(name, tree, beside, **options) > 1e4 * ZERO


@pytest.fixture(params=SEEDS)
def tree(request: pytest.FixtureRequest) -> TokenTree:
    return TokenTree.random(request.param, beta=BETA)


# Every registered method


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_exact_gradient_step_lowers_the_population_objective(name: str, seed: int) -> None:
    for label, instance in variants(METHODS.get(name)).items():
        assert step_lowers_objective(instance, seed, instance.id in HELD) == "", label


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_autograd_is_the_derivative_of_the_population_objective(name: str, seed: int) -> None:
    for label, instance in variants(METHODS.get(name)).items():
        assert differences_on_tree(instance, seed) == "", label


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_a_step_from_the_reference_raises_the_expected_reward(name: str, seed: int) -> None:
    """Descent on its own objective cannot see a loss of the wrong sign; this does."""
    gained = reward_gained(made(name), seed)
    assert -gained > 1e-2 * STEP if name in DOWN_FIRST else gained > 1e-2 * STEP


def reward_gained(instance: Method, seed: int) -> float:
    tree = TokenTree.random(seed, beta=BETA)
    if instance.view == "singles":
        # They are sampled uniformly, and a step on samples of another policy than the reference may cost reward.
        tree = replace(tree, reference=Tabular(*(torch.zeros_like(p) for p in tree.reference.parameters())))
    slope = gradient(instance, tree, tree.reference)
    stepped = tree.reference.moved(slope, -STEP / norm(slope))
    return float(tree.expected_reward(stepped) - tree.expected_reward(tree.reference))


@method("uphill", view="pairs", needs={"ref_logp"})
class Uphill(Method):
    """dpo's value with the gradient turned round."""

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(2 * pairs.delta.detach() - pairs.delta)


@method("impure", view="pairs", needs={"ref_logp"})
class Impure(Method):
    """A gradient 1 % too long, which the value does not tell."""

    def loss(self, pairs: Pairs) -> Tensor:
        values = logistic(pairs.delta)
        if values.requires_grad:
            values.register_hook(lambda slope: 1.01 * slope)
        return values


@method("worse_first", view="pairs", needs={"ref_logp"})
class WorseFirst(Method):
    """dpo with chosen and rejected exchanged."""

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(-pairs.delta)


@method("constant", view="pairs")
class Constant(Method):
    def loss(self, pairs: Pairs) -> Tensor:
        return 0.0 * pairs.chosen.sum_logp


@pytest.mark.parametrize("seed", SEEDS)
def test_the_checks_find_what_is_wrong(seed: int) -> None:
    assert "takes the population objective from" in step_lowers_objective(Uphill(), seed)
    assert "no gradient" in step_lowers_objective(Constant(), seed)
    assert "finite differences" in differences_on_tree(Impure(), seed)
    assert step_lowers_objective(WorseFirst(), seed) == ""
    assert reward_gained(WorseFirst(), seed) < 0


# The tree itself


def test_the_solution_is_the_tilted_reference(tree: TokenTree) -> None:
    """Backward induction agrees with the sum over all leaves: pi* = pi_ref exp((r - V*) / beta)."""
    solved, reference = tree.solve(), tree.leaf_logp(tree.reference)
    leaves = zip(reference.tolist(), tree.rewards.tolist(), strict=True)
    value = BETA * math.log(sum(math.exp(p + r / BETA) for p, r in leaves))
    assert float(solved.value[0]) == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(tree.leaf_logp(solved), reference + (tree.rewards - value) / BETA, rtol=0, atol=1e-12)
    torch.testing.assert_close(solved.logits.exp().sum(-1), torch.ones(13, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.tilted(tree.rewards / BETA).logp, solved.logp, rtol=0, atol=1e-12)


def test_soft_bellman_residual_at_every_edge(tree: TokenTree) -> None:
    """beta log(pi*/pi_ref)(a|s) = r(s, a) + V*(s a) - V*(s), the children being found by walking the tree."""
    solved = tree.solve()
    index = {p: i for i, p in enumerate(p for n in range(3) for p in product(range(3), repeat=n))}
    rewards = dict(zip(product(range(3), repeat=3), tree.rewards.tolist(), strict=True))
    log_ratio = BETA * (solved.logp - tree.reference.logp)
    for prefix, s in index.items():
        for a in range(3):
            after = (*prefix, a)
            right = rewards[after] if len(after) == 3 else float(solved.value[index[after]])
            assert float(log_ratio[s, a]) == pytest.approx(right - float(solved.value[s]), abs=1e-12)


def test_prefix_sums_of_the_implicit_reward_are_value_differences(tree: TokenTree) -> None:
    """sum_{i <= t} beta h_i = V*(s_{t+1}) - V*(s_0), and in all r(y) - V*(s_0): h is Q - V, not Q."""
    solved = tree.solve()
    leaves = tree.completions(solved)
    reached = torch.cat([leaves.value[:, 1:-1], tree.rewards[:, None]], -1)
    sums = BETA * leaves.log_ratio.cumsum(-1)
    torch.testing.assert_close(sums, reached - leaves.value[:, :1], rtol=0, atol=1e-12)


def test_mean_log_ratio_under_the_reference_is_minus_the_kl(tree: TokenTree) -> None:
    """E_ref h = -KL(ref || pi) <= 0, and that KL is the expected sum of the positions' own; the other KL likewise."""
    policy = random_policy(tree, 3)
    leaves, log_pi, log_ref = tree.completions(policy), tree.leaf_logp(policy), tree.leaf_logp(tree.reference)
    sampler = log_ref.exp()
    mean = float((sampler * leaves.sum_log_ratio).sum())
    assert mean < -0.01
    assert mean == pytest.approx(-float((sampler * leaves.sum(leaves.kl_ref_policy)).sum()), abs=1e-12)
    other = float((log_pi.exp() * (log_pi - log_ref)).sum())
    assert other == pytest.approx(float((log_pi.exp() * leaves.sum(leaves.kl_policy_ref)).sum()), abs=1e-12)
    entropy = -float((log_pi.exp() * log_pi).sum())
    assert entropy == pytest.approx(float((log_pi.exp() * leaves.sum(leaves.entropy)).sum()), abs=1e-12)
    torch.testing.assert_close(leaves.logit - leaves.logsumexp, leaves.logp, rtol=0, atol=1e-12)


def test_the_population_of_pairs_is_exact(tree: TokenTree) -> None:
    """dpo's objective once more, as a double sum over leaves of Python numbers; equal leaves are no pair."""
    policy = random_policy(tree, 5)
    reference, rewards = tree.leaf_logp(tree.reference).tolist(), tree.rewards.tolist()
    h = [p - q for p, q in zip(tree.leaf_logp(policy).tolist(), reference, strict=True)]
    total = mass = 0.0
    for i, j in product(range(27), repeat=2):
        if i != j:
            weight = math.exp(reference[i] + reference[j]) / (1 + math.exp(rewards[j] - rewards[i]))
            mass += weight
            total += weight * math.log1p(math.exp(-BETA * (h[i] - h[j])))
    assert float(objective(made("dpo", beta=BETA), tree, policy)) == pytest.approx(total / mass, abs=1e-12)


# Where the optimum is known


@pytest.mark.parametrize(
    ("name", "options"),
    [("dpo", {}), ("rpo", {"eta": 0.0}), ("tdpo", {"alpha": 0.0})],
)
def test_the_optimum_of_dpo_is_the_solution(name: str, options: dict[str, Any], tree: TokenTree) -> None:
    optimum_is(name, tree, tree.solve(), beta=BETA, **options)
    assert slope_at(name, tree, tree.solve(), beta=2 * BETA, **options) > 1e-3


@pytest.mark.parametrize(("name", "options"), [("rpo", {"eta": 0.1}), ("tdpo", {}), ("tdpo", {"variant": 1})])
def test_the_regularised_ones_leave_the_solution(name: str, options: dict[str, Any], tree: TokenTree) -> None:
    assert slope_at(name, tree, tree.solve(), beta=BETA, **options) > 1e-3


def test_lists_of_two_have_dpos_optimum(tree: TokenTree) -> None:
    def slope(policy: Tabular, best: float = 1.0) -> float:
        at = policy.tracked()
        two, n = pairs(tree, at), len(tree.rewards)
        chosen, rejected = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
        view = Lists(
            completions=tree.completions(at).select(torch.stack([chosen, rejected], 1).reshape(-1)),
            group=torch.arange(len(two)).repeat_interleave(2),
            weight=two.weight,
            scores=torch.tensor([best, 0.5]).repeat(len(two)),
        )
        return norm(gradient_of(finish(made("lipo", beta=BETA).loss(view), view).total(), at))

    assert slope(tree.solve()) < ZERO
    assert slope(tree.solve(), best=0.0) > 1e-3
    assert slope(tree.reference) > 1e-3


@pytest.mark.parametrize(("normalize", "length"), [("sum", 1), ("token", 3)])
def test_the_optimum_of_ipo_is_tilted_by_the_win_probability(normalize: str, length: int, tree: TokenTree) -> None:
    """pi proportional to pi_ref exp(p(y) / tau), p(y) the probability of beating a draw of the reference.

    arXiv 2310.12036, Eq. 10 with the identity. Per token the target is met by log-ratios as many times as large.
    """
    tau = 0.8
    wins = torch.sigmoid(tree.rewards[:, None] - tree.rewards) @ tree.leaf_logp(tree.reference).exp()
    optimum_is("ipo", tree, tree.tilted(length * wins / tau), tau=tau, normalize=normalize)
    assert slope_at("ipo", tree, tree.tilted(length * tree.rewards / tau), tau=tau, normalize=normalize) > 1e-3


def test_the_optimum_of_simpo_without_a_margin_forgets_the_reference(tree: TokenTree) -> None:
    """gamma 0 and leaves of one length: pi proportional to exp(|y| r / beta)."""
    base = torch.zeros_like(tree.rewards)
    optimum_is("simpo", tree, tree.tilted(3 * tree.rewards / 2.0, base), beta=2.0, gamma_ratio=0.0)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_optimum_of_sft_is_the_expert(reduction: str, tree: TokenTree) -> None:
    """And its value there is the expert's entropy per token."""
    solved = tree.solve()
    optimum_is("sft", tree, solved, reduction=reduction)
    logp = tree.leaf_logp(solved)
    entropy = -float((logp.exp() * logp).sum()) / 3
    assert float(objective(made("sft", reduction=reduction), tree, solved)) == pytest.approx(entropy, abs=1e-12)


def test_dro_v_is_zero_at_the_solution_and_its_value(tree: TokenTree) -> None:
    """At (pi*, V*) only, though nobody sampled from either; one method option moves no zero."""
    solved, instance = tree.solve(), made("dro_v", tau=BETA)
    assert float(objective(instance, tree, solved)) < 1e-20
    optimum_is("dro_v", tree, solved, tau=BETA)
    optimum_is("dro_v", tree, solved, tau=BETA, policy_grad_scale=1 / BETA)
    for wrong in (Tabular(solved.logits, solved.value + 0.1), Tabular(tree.reference.logits, solved.value)):
        assert float(objective(instance, tree, wrong)) > 1e-3


def test_the_optimum_of_bco_is_the_solution_where_the_centre_is_minus_the_value(tree: TokenTree) -> None:
    """Labels drawn with probability sigmoid(r): beta h - delta = r there, so delta = -V*. The state carries delta."""
    solved, seen = tree.solve(), 1e15
    count = torch.tensor(seen, dtype=torch.float64)
    bco = made("bco", beta=BETA, clip=(1e-9, 1e9))

    def slope(centre: float) -> float:
        total = torch.tensor(seen * centre, dtype=torch.float64)
        state = dict(zip(bco.initial_state(), (total, count, total, count), strict=True))
        return norm(gradient(bco, tree, solved, state))

    value = float(solved.value[0])
    assert slope(-value) < ZERO
    assert slope(0.1 - value) > 1e-3


def test_kto_pushes_each_leaf_by_how_far_its_label_is_from_a_coin(tree: TokenTree) -> None:
    """At the reference dL/dh(y) = -(beta / 4) (P(desirable) - P(undesirable)), under the sampler."""
    kto, at = made("kto", beta=BETA), tree.reference.tracked()
    view = singles(tree, at)
    h = view.completions.sum_log_ratio
    leaf_weight = view.completions.weight * torch.where(view.completions.label, 1.0, -1.0) / len(view)
    expected = gradient_of(-(BETA / 4) * (leaf_weight * h).sum(), at)
    found = gradient(kto, tree, tree.reference)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert norm(found) > 1e-3


def test_the_anchor_of_kto_moves_with_the_mismatched_leaves(tree: TokenTree) -> None:
    """z0 is the mean of h over leaves drawn uniformly, or 0 where that is negative."""
    policy = tree.tilted(-tree.leaf_logp(tree.reference))
    z0 = float((-math.log(27) - tree.leaf_logp(tree.reference)).mean())
    view = singles(tree, policy)
    shifted = BETA * (view.completions.sum_log_ratio - z0)
    values = torch.sigmoid(torch.where(view.completions.label, -shifted, shifted)) * view.completions.weight
    assert z0 > 0.1
    assert float(objective(made("kto", beta=BETA), tree, policy)) == pytest.approx(float(values.mean()), abs=1e-12)
