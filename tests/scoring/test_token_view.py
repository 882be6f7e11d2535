"""The token view on a token tree that is solved exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from align.methods import METHODS
from align.scoring.token_view import first_token_delta, first_token_log_ratio, token_rewards
from align.scoring.views import Completions
from align.testing.token_tree import TokenTree, pairs, random_policy
from align.trainers.metrics import measure

BETA = 0.5


@pytest.fixture(params=(0, 1, 2))
def tree(request: pytest.FixtureRequest) -> TokenTree:
    return TokenTree.random(request.param, beta=BETA)


def values(tree: TokenTree) -> Tensor:
    """V* before each token of each leaf and after the end (0), [L, D + 1]."""
    solved = tree.solve()
    return torch.cat([solved.value[tree.prefixes], tree.rewards.new_zeros(len(tree.rewards), 1)], -1)


def test_token_rewards_are_the_reward_plus_the_change_of_the_value(tree: TokenTree) -> None:
    solved, value = tree.solve(), values(tree)
    found = token_rewards(tree.completions(solved), BETA)
    reward = torch.zeros_like(found.reward)
    reward[:, -1] = tree.rewards
    torch.testing.assert_close(found.reward, reward + value[:, 1:] - value[:, :-1], atol=1e-12, rtol=0)


def test_prefix_sums_are_values_and_the_whole_is_the_reward_less_the_start(tree: TokenTree) -> None:
    value = values(tree)
    prefix = token_rewards(tree.completions(tree.solve()), BETA).prefix
    torch.testing.assert_close(prefix[:, :-1], value[:, 1:-1] - value[:, :1], atol=1e-12, rtol=0)
    torch.testing.assert_close(prefix[:, -1], tree.rewards - value[:, 0], atol=1e-12, rtol=0)


def test_the_solution_is_normalised(tree: TokenTree) -> None:
    solved = tree.solve()
    torch.testing.assert_close(solved.logits.logsumexp(-1), torch.zeros_like(solved.value), atol=1e-12, rtol=0)
    assert float(tree.leaf_logp(solved).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_the_mean_log_ratio_under_the_reference_is_minus_a_kl(tree: TokenTree) -> None:
    """Why chosen answers become less likely when the reference was trained on them."""
    policy = random_policy(tree, 5)
    completions = tree.completions(policy)
    weight = completions.sum_ref_logp.exp()
    mean = float((weight * token_rewards(completions, 1.0).prefix[:, -1]).sum())
    kl = float((weight * (completions.sum_ref_logp - completions.sum_logp)).sum())
    assert mean == pytest.approx(-kl, abs=1e-12)
    assert mean < -1e-3
    assert float(tree.completions(tree.reference).sum_log_ratio.abs().max()) < 1e-12


def test_against_a_reference_that_was_not_fitted_it_can_rise(tree: TokenTree) -> None:
    """Weighted by the solution's probabilities (its demonstrations), the mean is KL(pi* || pi_ref) > 0."""
    completions = tree.completions(tree.solve())
    assert float((completions.sum_logp.exp() * completions.sum_log_ratio).sum()) > 1e-3


def test_potential_shaping_leaves_the_solution(tree: TokenTree) -> None:
    """r + Phi(s') - Phi(s), Phi(end) = 0: along a leaf it sums to -Phi(s_0), the same for all leaves."""
    potential = torch.randn(len(tree.reference.value), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    at = torch.cat([potential[tree.prefixes], torch.zeros(len(tree.rewards), 1, dtype=torch.float64)], -1)
    shaped = replace(tree, rewards=tree.rewards + (at[:, 1:] - at[:, :-1]).sum(-1))
    torch.testing.assert_close(shaped.solve().logits, tree.solve().logits, atol=1e-12, rtol=0)


def completions(logp: list[list[float]], ref: list[list[float]], mask: list[list[int]]) -> Completions:
    columns = {"logp": torch.tensor(logp).double(), "ref_logp": torch.tensor(ref).double()}
    return Completions(mask=torch.tensor(mask).bool(), columns=columns)


def test_unscored_tokens_are_left_out() -> None:
    one = completions([[-9.0, -1.0, -9.0, -0.5, -9.0]], [[0.0, -1.5, 0.0, -0.25, 0.0]], [[0, 1, 0, 1, 0]])
    found = token_rewards(one, 2.0)
    assert found.reward.tolist() == [[0, 1.0, 0, -0.5, 0]]
    assert found.prefix.tolist() == [[0, 1.0, 0, 0.5, 0]]
    assert first_token_log_ratio(one).tolist() == [0.5]
    empty = completions([[-9.0]], [[0.0]], [[0]])
    assert first_token_log_ratio(empty).tolist() == [0.0]


def test_logged_parts_add_up(tree: TokenTree) -> None:
    view = pairs(tree, random_policy(tree, 2))
    logged = {name: float(total) / count for name, (total, count) in measure(METHODS.get("dpo")(), view).items()}
    margin = logged["log_ratio/chosen"] - logged["log_ratio/rejected"]
    parts = logged["log_ratio/first_token_margin"] + logged["log_ratio/later_tokens_margin"]
    assert parts == pytest.approx(margin, abs=1e-12)
    assert logged["log_ratio/first_token_margin"] == pytest.approx(float(first_token_delta(view).mean()), abs=1e-12)
    assert logged["log_ratio_per_token/chosen"] == pytest.approx(logged["log_ratio/chosen"] / tree.depth, abs=1e-12)
    first = view.chosen.log_ratio[:, 0] - view.rejected.log_ratio[:, 0]
    torch.testing.assert_close(first_token_delta(view), first, atol=1e-12, rtol=0)
