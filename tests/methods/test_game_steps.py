"""Our losses on all pairs of the twisted game: exact steps, expected gradients and where the loops of methods end up.

Closed forms and long loops of them are tested in `tests/evaluate/test_games.py`; here each is met by the loss itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.core.errors import ConfigError, TrainingError
from align.evaluate import games
from align.methods.evaluate import make_method
from align.scoring.views import Pairs
from align.testing.game import (
    answers,
    as_logits,
    as_policy,
    demonstrations_of,
    descend,
    expected_gradient,
    expected_loss,
    firsts_of,
    live,
    minimiser,
    pairs_of,
    stationary,
)
from align.testing.token_tree import mean_one

GAME = games.twist()
P, REF = GAME.P, GAME.ref
TAU = 0.1
STAR = games.regularised_nash(P, REF, TAU)
PI = np.array([0.1, 0.5, 0.15, 0.25])
"""Some policy, neither the reference nor an equilibrium."""

View = Callable[[Tensor], Any]


def own_pairs(pi: np.ndarray, rewards: np.ndarray | None = None, label: str = "sampled", **frozen: np.ndarray) -> View:
    """Both answers drawn from the fixed policy `pi`."""
    return lambda logits: pairs_of(answers(logits, frozen, rewards), P, np.outer(pi, pi), label)


def solved(name: str, options: Mapping[str, Any], view: View, start: np.ndarray = PI) -> np.ndarray:
    """The policy at which the method's loss of fixed draws is least."""
    return as_policy(minimiser(make_method(name, options), view, as_logits(start)))


def gradient(name: str, options: Mapping[str, Any], view: View, at: np.ndarray) -> np.ndarray:
    return expected_gradient(make_method(name, options), view, as_logits(at)).numpy()


def softmax_gradient(pi: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """d/dlogits of a function of pi whose derivative in pi is `slope`."""
    return pi * (slope - pi @ slope)


def nash_ascent(pi: np.ndarray, opponent: np.ndarray, tau: float) -> np.ndarray:
    """d/dlogits of P(pi > opponent) - tau KL(pi || ref), the opponent held."""
    return softmax_gradient(pi, P @ opponent - tau * np.log(pi / REF))


# Rounds: one exact step is the least loss of pairs of the policy before


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_dpo_on_own_pairs_is_bradley_terry_on_its_anchor(beta: float) -> None:
    previous = solved("dpo", {"beta": beta}, own_pairs(PI, ref=PI))
    assert np.allclose(previous, games.preference_step(PI, P, PI, beta), atol=1e-8)
    frozen = solved("dpo", {"beta": beta}, own_pairs(PI, ref=REF))
    assert np.allclose(frozen, games.preference_step(PI, P, REF, beta), atol=1e-8)
    assert not np.allclose(frozen, previous, atol=1e-2)


def test_rounds_of_our_dpo_cycle_on_the_previous_iterate_and_settle_on_a_frozen_reference() -> None:
    pi = closed = REF
    seen = []
    for _ in range(31):
        pi = solved("dpo", {"beta": 1.0}, own_pairs(pi, ref=pi), pi)
        closed = games.preference_step(closed, P, closed, 1.0)
        seen.append(int(pi.argmax()))
        assert np.allclose(pi, closed, atol=1e-4)
    assert [action for action, _ in itertools.groupby(seen)] == [0, 1, 2, 0, 1]
    settled = REF
    for _ in range(200):
        settled = games.preference_step(settled, P, REF, 1.0)
    assert np.allclose(settled, [0.348, 0.348, 0.181, 0.123], atol=5e-4)
    assert np.allclose(solved("dpo", {"beta": 1.0}, own_pairs(settled, ref=REF), REF), settled, atol=1e-8)


def test_offline_dpo_is_exploited() -> None:
    found = solved("dpo", {"beta": 0.1}, own_pairs(REF, ref=REF), REF)
    assert found[0] == pytest.approx(0.996, abs=5e-4) and games.duality_gap(found, P) == pytest.approx(0.4, abs=5e-3)


@pytest.mark.parametrize("eta", [0.2, 1.0, 2.0])
def test_an_inpo_round_is_its_closed_form_and_keeps_the_regularised_equilibrium(eta: float) -> None:
    options = {"eta": eta, "tau": TAU}
    found = solved("inpo", options, own_pairs(PI, ref=REF, previous=PI))
    assert np.allclose(found, games.inpo_step(PI, P, REF, TAU, eta), atol=1e-9)
    at_star = own_pairs(STAR, ref=REF, previous=STAR)
    assert np.allclose(gradient("inpo", options, at_star, STAR), 0, atol=1e-12)
    assert np.abs(gradient("inpo", options, own_pairs(PI, ref=REF, previous=PI), PI)).max() > 1e-2


def test_rounds_of_our_inpo_reach_the_regularised_equilibrium() -> None:
    pi = REF
    for _ in range(60):
        pi = solved("inpo", {"eta": 1.0, "tau": TAU}, own_pairs(pi, ref=REF, previous=pi), pi)
    assert np.allclose(pi, [0.2920, 0.4866, 0.1613, 0.0601], atol=1e-3)
    assert games.duality_gap(pi, P) == pytest.approx(0.0906, abs=1e-3)


def test_inpo_facts_of_one_loss() -> None:
    eta = 0.5
    inpo = make_method("inpo", {"eta": eta, "tau": TAU})
    start = own_pairs(REF, ref=REF, previous=REF)
    assert float(expected_loss(inpo, start(as_logits(REF)))) == pytest.approx(1 / (4 * eta**2))
    at, view = as_logits(random_policy(4)), own_pairs(PI, ref=REF, previous=PI)
    plain = solved("inpo", {"eta": eta, "tau": 0.0}, view)
    assert np.allclose(plain, solved("ipo", {"tau": eta, "normalize": "sum"}, own_pairs(PI, ref=PI)), atol=1e-9)
    # The loss of drawn labels is the regression on win rates, a constant apart: what is left at its end.
    best = minimiser(inpo, view, as_logits(PI))
    assert float(expected_loss(inpo, view(at)) - expected_loss(inpo, view(best))) == pytest.approx(
        regression(at, PI, eta), abs=1e-9
    )
    assert regression(best, PI, eta) == pytest.approx(0, abs=1e-12)


def regression(logits: Tensor, pi: np.ndarray, eta: float) -> float:
    """E over pairs of pi of (h(y, y') - (P(y > pi) - P(y' > pi)) / eta)^2, h the margin from inpo's anchor."""
    logp = np.log(as_policy(logits))
    h = logp - TAU / eta * np.log(REF) - (1 - TAU / eta) * np.log(pi)
    wins = P @ pi
    return sum(pi[i] * pi[j] * (h[i] - h[j] - (wins[i] - wins[j]) / eta) ** 2 for i in range(4) for j in range(4))


def random_policy(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(4, 1.5))


def test_inpo_on_likelier_winners_plays_the_thresholded_game() -> None:
    hard = games.thresholded(P)
    view = own_pairs(PI, label="hard", ref=REF, previous=PI)
    found = solved("inpo", {"eta": 1.0, "tau": TAU}, view)
    # Two equal answers are a tie that is left out: it has no gradient, so only the scale of the loss differs.
    assert np.allclose(found, games.inpo_step(PI, hard, REF, TAU, 1.0), atol=1e-9)
    assert not np.allclose(found, games.inpo_step(PI, P, REF, TAU, 1.0), atol=1e-2)


def test_inpo_on_two_thousand_drawn_labels_a_round() -> None:
    inpo = make_method("inpo", {"eta": 1.0, "tau": TAU})
    for seed in range(3):
        rng, pi = np.random.default_rng(seed), REF
        for _ in range(60):
            counts = rng.multinomial(2000, np.outer(pi, pi).reshape(-1)).reshape(4, 4)
            wins = rng.binomial(counts, P)
            # Pairs as they were labelled: the winner stands first, and "wins" with certainty.
            won = (wins + (counts - wins).T) / 2000

            def view(logits: Tensor, won: np.ndarray = won, pi: np.ndarray = pi) -> Any:
                frozen = {"ref": REF, "previous": pi}
                return pairs_of(answers(logits, frozen), np.ones((4, 4)), won, "hard")

            pi = as_policy(minimiser(inpo, view, as_logits(pi)))
        assert games.kl(STAR, pi) < 0.01
        assert games.duality_gap(pi, P) == pytest.approx(0.09, abs=0.02)


@pytest.mark.parametrize("eta", [2.0, 4.0])
def test_an_sppo_round_is_regression_on_win_rates(eta: float) -> None:
    wins = P @ PI
    found = solved("sppo", {"eta": eta}, own_pairs(PI, wins, ref=PI))
    log_ratio = np.log(found / PI)
    # Weighted least squares in a softmax: the residual of every answer is the same multiple of the policy's slope.
    residual = PI * (log_ratio - eta * (wins - 0.5))
    assert np.allclose(softmax_of(residual, found), 0, atol=1e-9)
    exact = games.mwu_step(PI, P, eta)
    assert np.abs(found - exact).max() < np.abs(PI - exact).max() / 20
    # At the exact step shifted by its normaliser the square is zero: the paper puts eta / 2 in place of log Z.
    assert np.log(PI @ np.exp(eta * (wins - 0.5))) >= 0


def softmax_of(residual: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """d/dlogits of sum_y r_y log pi(y), up to a sign."""
    return residual - pi * residual.sum()


def test_sppo_sees_a_constant_that_dpo_does_not() -> None:
    wins = P @ PI
    for name, options, moves in (("sppo", {"eta": 1.0}, True), ("dpo", {"beta": 1.0}, False)):
        method = make_method(name, options)
        losses = []
        for scale in (1.0, 0.7):
            view = pairs_of(answers(as_logits(PI), {"ref": PI * scale}, wins), P, np.outer(PI, PI))
            losses.append(float(expected_loss(method, view)))
        assert (abs(losses[0] - losses[1]) > 1e-3) == moves


@pytest.mark.parametrize("eta", [0.5, 2.0])
def test_a_dno_round_is_soft_policy_iteration(eta: float) -> None:
    wins = P @ PI
    found = solved("dno", {"eta": eta}, own_pairs(PI, wins, ref=PI))
    assert np.allclose(found, games.dno_step(PI, P, eta), atol=1e-9)
    gain = found @ P @ PI
    assert gain == pytest.approx(0.5 + eta * (games.kl(found, PI) + games.kl(PI, found)), abs=1e-9)
    shifted = solved("dno", {"eta": eta}, own_pairs(PI, wins + 3.0, ref=PI))
    assert np.allclose(shifted, found, atol=1e-9)


def test_rounds_of_our_dno_are_multiplicative_weights() -> None:
    """Which cycle, while their average converges: `tests/evaluate/test_games.py`."""
    ours = closed = REF
    for _ in range(25):
        ours = solved("dno", {"eta": 2.0}, own_pairs(ours, P @ ours, ref=ours), ours)
        closed = games.mwu_step(closed, P, 0.5)
    assert np.allclose(ours, closed, atol=1e-8) and games.duality_gap(ours, P) > 0.1


def test_dno_in_practice_has_no_finite_minimiser_on_certain_labels() -> None:
    certain = np.array([[0.5, 1.0], [0.0, 0.5]])
    half = np.full((2, 2), 0.25)

    def view(logits: Tensor) -> Any:
        return pairs_of(answers(logits, {"ref": np.full(2, 0.5)}), certain, half, "hard")

    start = as_logits(np.full(2, 0.5))
    with pytest.raises(TrainingError, match="no minimum"):
        minimiser(make_method("dno_prct", {"eta": 1.0, "sft_weight": 0.0}), view, start)
    # With a margin the exact loss has one: sigmoid(r1 - r2).
    margin = np.array([1.5, 0.0])

    def exact(logits: Tensor) -> Any:
        return pairs_of(answers(logits, {"ref": np.full(2, 0.5)}, margin), certain, half, "hard")

    found = as_policy(minimiser(make_method("dno", {"eta": 1.0}), exact, start))
    assert np.log(found[0] / found[1]) == pytest.approx(1.5, abs=1e-8)


@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_a_rebel_step_is_exact_natural_policy_gradient(eta: float) -> None:
    rewards = np.array([0.3, -1.0, 0.8, 0.1])
    found = solved("rebel", {"eta": eta}, own_pairs(PI, rewards, label="prob", old=PI))
    assert np.allclose(found, games.exponential_step(PI, rewards, eta), atol=1e-9)
    shifted = solved("rebel", {"eta": eta}, own_pairs(PI, rewards + 2, label="prob", old=PI))
    assert np.allclose(shifted, found, atol=1e-9)
    wins = solved("rebel", {"eta": eta}, own_pairs(PI, P @ PI, label="prob", old=PI))
    assert np.allclose(wins, games.mwu_step(PI, P, eta), atol=1e-9)
    # The first step is natural policy gradient: the loss has no gradient at the end, and eta * r as its direction.
    slope = gradient("rebel", {"eta": eta}, own_pairs(PI, rewards, label="prob", old=PI), PI)
    assert np.allclose(slope, -4 * eta * softmax_gradient(PI, rewards), atol=1e-12)


# Demonstrations


@pytest.mark.parametrize("beta", [0.8, 1.0, 2.0])
def test_a_spin_round_is_its_closed_form(beta: float) -> None:
    data = random_policy(11)
    found = solved("spin", {"lambda": beta}, shown(data, PI, ref=PI))
    assert np.allclose(found, games.spin_step(PI, data, beta), atol=1e-8)
    assert np.allclose(gradient("spin", {"lambda": beta}, shown(data, data, ref=data), data), 0, atol=1e-12)
    assert np.allclose(solved("spin", {"lambda": 1.0}, shown(data, PI, ref=PI)), data, atol=1e-8)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 2.0), (0.4, 1.0), (1.0, 1.5)])
def test_an_alpha_spin_round_is_its_closed_form(alpha: float, beta: float) -> None:
    data, base = random_policy(11), random_policy(12)
    found = solved("alpha_spin", {"alpha": alpha, "beta": beta}, shown(data, PI, ref=base, previous=PI))
    assert np.allclose(found, games.alpha_spin_step(PI, base, data, alpha, beta), atol=1e-8)
    fixed = (data * base ** (alpha * beta)) ** (1 / (1 + alpha * beta))
    fixed /= fixed.sum()
    view = shown(data, fixed, ref=base, previous=fixed)
    assert np.allclose(solved("alpha_spin", {"alpha": alpha, "beta": beta}, view, fixed), fixed, atol=1e-8)


def shown(data: np.ndarray, pi: np.ndarray, **frozen: np.ndarray) -> View:
    """A demonstration of `data`, chosen, against an answer of `pi`."""
    certain = np.ones((4, 4))
    return lambda logits: pairs_of(answers(logits, frozen), certain, np.outer(data, pi), "hard")


def test_sft_on_the_best_of_k_is_raft() -> None:
    rewards = np.array([0.2, 0.9, 0.2, 0.5])
    for k in (1, 2, 8):
        best = games.best_of(PI, rewards, k)
        found = solved("sft", {}, lambda logits, best=best: demonstrations_of(answers(logits, {}), best))
        assert np.allclose(found, best, atol=1e-9)


# Steps: expected gradients of live pairs


@pytest.mark.parametrize("label", ["sampled", "prob"])
def test_online_ipo_is_self_play_nash_md(label: str) -> None:
    view = live(make_method("online_ipo", {"tau": TAU, "label": label}), P, {"ref": REF})
    found = gradient("online_ipo", {"tau": TAU, "label": label}, view, PI)
    assert np.allclose(found, -4 / TAU * nash_ascent(PI, PI, TAU), atol=1e-11)
    assert np.allclose(gradient("online_ipo", {"tau": TAU, "label": label}, view, STAR), 0, atol=1e-11)


def test_online_ipo_and_nash_md_walk_to_the_regularised_equilibrium() -> None:
    for name, options, rate in (("online_ipo", {"tau": TAU}, 0.1), ("nash_md", {"tau": TAU, "mix": 0.0}, 2.0)):
        method = make_method(name, options)
        found = as_policy(descend(method, live(method, P, {"ref": REF}), as_logits(REF), rate, 700))
        assert np.allclose(found, [0.2920, 0.4866, 0.1613, 0.0601], atol=1e-4), name
        assert games.duality_gap(found, P) == pytest.approx(0.0906, abs=1e-4)


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_nash_md_follows_the_gradient_of_its_objective(mix: float) -> None:
    method = make_method("nash_md", {"tau": TAU, "mix": mix})
    opponent = games.geometric_mixture(PI, REF, mix)
    found = gradient("nash_md", {"tau": TAU, "mix": mix}, live(method, P, {"ref": REF}), PI)
    assert np.allclose(found, -nash_ascent(PI, opponent, TAU), atol=1e-12)
    # The baseline of a half is free: without it the expected gradient is the same.
    shifted = firsts_of(answers(at := as_logits(PI).requires_grad_(), {"ref": REF}), P - 0.4, np.outer(PI, opponent))
    (slope,) = torch.autograd.grad(expected_loss(method, shifted), at)
    assert np.allclose(slope.numpy(), found, atol=1e-12)


def test_nash_md_against_the_reference_is_the_best_response_to_it() -> None:
    method = make_method("nash_md", {"tau": TAU, "mix": 1.0})
    found = as_policy(descend(method, live(method, P, {"ref": REF}), as_logits(REF), 10.0, 500))
    assert np.allclose(found, games.best_response(REF, P, REF, TAU), atol=1e-5)
    assert games.duality_gap(found, P) > 2 * games.duality_gap(STAR, P)


@pytest.mark.parametrize("mix", [0.125, 0.5])
def test_where_ipo_md_stops_the_mixture_is_the_equilibrium_of_a_higher_temperature(mix: float) -> None:
    mixture = games.regularised_nash(P, REF, TAU / (1 - mix))
    policy = games.normalised((np.log(mixture) - mix * np.log(REF)) / (1 - mix))
    assert np.allclose(games.geometric_mixture(policy, REF, mix), mixture)
    options = {"tau": TAU, "mix": mix}
    view = live(make_method("online_ipo", options), P, {"ref": REF})
    assert np.allclose(gradient("online_ipo", options, view, policy), 0, atol=1e-10)
    assert np.abs(gradient("online_ipo", options, view, STAR)).max() > 1e-2


def test_online_dpo_stops_near_the_equilibrium_of_a_quarter_of_its_beta() -> None:
    beta = 0.1
    method = make_method("online_dpo", {"beta": beta, "label": "sampled"})
    view = live(method, P, {"ref": REF})
    walked = descend(method, view, as_logits(REF), 20.0, 800)
    found = as_policy(stationary(method, view, walked))
    assert np.allclose(found, [0.174, 0.583, 0.240, 0.003], atol=5e-4) and np.allclose(
        found, as_policy(walked), atol=0.02
    )
    assert games.duality_gap(found, P) == pytest.approx(0.022, abs=5e-4)
    assert np.abs(found - games.regularised_nash(P, REF, beta / 4)).max() < 0.02
    assert np.abs(found - games.regularised_nash(P, REF, beta)).max() > 0.09


def test_online_dpo_takes_its_labels_as_it_says() -> None:
    beta, chance = 0.5, P
    h = np.log(PI / REF)
    margin = h[:, None] - h
    for label in ("sampled", "prob"):
        options = {"beta": beta, "label": label}
        found = gradient("online_dpo", options, live(make_method("online_dpo", options), P, {"ref": REF}), PI)
        slope = np.outer(PI, PI) * (1 / (1 + np.exp(-beta * margin)) - chance) * beta
        assert np.allclose(found, 2 * slope.sum(1), atol=1e-12)
    hard = {"beta": beta, "label": "hard"}
    found = gradient("online_dpo", hard, live(make_method("online_dpo", hard), P, {"ref": REF}), PI)
    slope = np.outer(PI, PI) * (1 / (1 + np.exp(-beta * margin)) - games.thresholded(P)) * beta
    assert np.allclose(found, 2 * slope.sum(1) / (1 - PI @ PI), atol=1e-12)


def test_online_dpo_with_the_ipo_loss_is_online_ipo() -> None:
    ours, theirs = {"beta": TAU, "loss": "ipo", "label": "sampled"}, {"tau": TAU}
    first = gradient("online_dpo", ours, live(make_method("online_dpo", ours), P, {"ref": REF}), PI)
    second = gradient("online_ipo", theirs, live(make_method("online_ipo", theirs), P, {"ref": REF}), PI)
    assert np.allclose(first, second, atol=1e-12)


def test_xpo_lowers_what_the_reference_writes_by_the_forward_kl() -> None:
    alpha, base = 0.3, random_policy(5)
    with_bonus, without = ({"beta": 0.5, "alpha": a} for a in (alpha, 0.0))
    slopes = [
        gradient("xpo", options, live(make_method("xpo", options), P, {"ref": base}), PI)
        for options in (with_bonus, without)
    ]
    # Ties are left out, and a pair of two different actions is one: condition on that.
    drawn = np.outer(PI, base) * (1 - np.eye(4))
    written = drawn.sum(0) / drawn.sum()
    assert np.allclose(slopes[0] - slopes[1], alpha * (written - PI), atol=1e-12)


def test_a_method_that_samples_nothing_has_no_live_view() -> None:
    with pytest.raises(ConfigError, match="samples nothing"):
        live(make_method("dpo", {}), P, {"ref": REF})


# Groups: rewards, and win rates among peers

REWARDS = np.array([0.3, -1.0, 0.8, 0.1])


@pytest.mark.parametrize("ratio", ["none", "sequence"])
def test_rloo_is_the_gradient_of_reward_less_kl(ratio: str) -> None:
    options = {"num_generations": 3, "beta": 0.2, "ratio": ratio}
    base = random_policy(7)
    found = gradient("rloo", options, live(make_method("rloo", options), P, {"ref": base}, REWARDS), PI)
    assert np.allclose(found, -softmax_gradient(PI, REWARDS - 0.2 * np.log(PI / base)), atol=1e-12)


def test_rloo_on_win_rates_among_peers_is_self_play() -> None:
    """Win rates of a group have mean 1/2 whatever was drawn, so that leaving one out stretches them by K / (K - 1)."""
    for count in (2, 3):
        options = {"num_generations": count, "beta": 0.0}
        found = gradient("rloo", options, live(make_method("rloo", options), P, {}), PI)
        assert np.allclose(found, -count / (count - 1) * softmax_gradient(PI, P @ PI), atol=1e-12)


def test_grpo_without_its_std_is_policy_gradient_short_of_one_answer_of_the_group() -> None:
    options = {"num_generations": 3, "beta": 0.0, "scale": "none"}
    found = gradient("grpo", options, live(make_method("grpo", options), P, {}, REWARDS), PI)
    assert np.allclose(found, -2 / 3 * softmax_gradient(PI, REWARDS), atol=1e-12)
    scaled = {**options, "scale": "group"}
    other = gradient("grpo", scaled, live(make_method("grpo", scaled), P, {}, REWARDS), PI)
    assert not np.allclose(other / np.linalg.norm(other), found / np.linalg.norm(found), atol=1e-2)


@pytest.mark.parametrize(
    ("estimator", "reverse", "forward"), [("k1", 0, 0), ("k2", 1, 0), ("k3", 0, 1), ("k3_ratio", 1, 0)]
)
def test_what_the_kl_of_grpo_descends(estimator: str, reverse: float, forward: float) -> None:
    options = {"num_generations": 2, "beta": 0.5, "kl_estimator": estimator}
    base = random_policy(7)
    found = gradient("grpo", options, live(make_method("grpo", options), P, {"ref": base}, np.ones(4)), PI)
    expected = 0.5 * (reverse * softmax_gradient(PI, np.log(PI / base)) + forward * (PI - base))
    assert np.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_the_live_term_of_hypo_descends_the_reverse_kl(count: int) -> None:
    base = random_policy(7)
    drawn = torch.cartesian_prod(*[torch.arange(4)] * count)
    weight = mean_one(torch.from_numpy(PI)[drawn].prod(1))

    def view(logits: Tensor) -> Pairs:
        everything = answers(logits, {"ref": base})
        same = everything.select(torch.zeros(len(drawn), dtype=torch.long))
        return Pairs(
            chosen=same,
            rejected=same,
            probability=torch.ones_like(weight),
            weight=weight,
            samples=everything.select(drawn.reshape(-1)),
            sample_pair=torch.arange(len(drawn)).repeat_interleave(count),
        )

    found = gradient("hypo", {"lambda": 0.3, "live": count}, view, PI)
    assert np.allclose(found, 0.3 * softmax_gradient(PI, np.log(PI / base)), atol=1e-12)


# Consistency


def test_soft_labels_of_consistency_have_their_least_loss_at_the_logit() -> None:
    for consistency in (0.3, 0.5, 0.9):
        uniform = np.full((2, 2), consistency) * (1 - np.eye(2)) + 0.5 * np.eye(2)
        uniform[1, 0] = 1 - consistency
        drawn = np.array([[0.0, 1.0], [0.0, 0.0]])

        def view(logits: Tensor, P: np.ndarray = uniform, drawn: np.ndarray = drawn) -> Any:
            return pairs_of(answers(logits, {"ref": np.full(2, 0.5)}), P, drawn, "prob")

        found = as_policy(minimiser(make_method("soft_dpo", {"beta": 0.4}), view, as_logits(np.array([0.4, 0.6]))))
        margin = 0.4 * np.log(found[0] / found[1])
        assert margin == pytest.approx(np.log(consistency / (1 - consistency)), abs=1e-7)
        least = -consistency * np.log(consistency) - (1 - consistency) * np.log(1 - consistency)
        assert float(expected_loss(make_method("soft_dpo", {"beta": 0.4}), view(as_logits(found)))) == pytest.approx(
            least
        )
