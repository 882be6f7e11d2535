"""Matrix games: equilibria, gaps and ratings against plain loops, and every population step's facts and limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.evaluate import games
from align.worlds.twist import ACTIONS, EQUILIBRIUM, Twist

GAME = games.twist()
P, REF = GAME.P, GAME.ref
NASH = np.array([1, 4, 2, 0]) / 7
STAR = np.array([0.2920, 0.4866, 0.1613, 0.0601])
"""The regularised equilibrium of temperature 0.1, to four digits."""


def random_matrix(seed: int, n: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((n, n)), 1)
    return upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(n)


def random_policy(seed: int, n: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(n, 1.5))


def path(step: Callable[[np.ndarray], np.ndarray], count: int, start: np.ndarray = REF) -> np.ndarray:
    """`count` iterates, [count, n]."""
    found = [step(start)]
    while len(found) < count:
        found.append(step(found[-1]))
    return np.array(found)


def gaps(policies: np.ndarray) -> np.ndarray:
    return np.array([games.duality_gap(policy, P) for policy in policies])


# Equilibria, gaps


def test_the_twisted_game_has_one_equilibrium_and_the_world_is_it() -> None:
    (found,) = games.equilibria(P)
    assert np.allclose(found, NASH, atol=1e-12) and np.allclose(games.nash(P), NASH, atol=1e-12)
    assert (
        GAME.actions == ACTIONS and np.allclose(P, Twist().preferences, atol=1e-15) and np.allclose(EQUILIBRIUM, NASH)
    )
    for a, b, c in ((0.1, 0.2, 0.3), (0.45, 0.05, 0.3)):
        expected = np.array([b, a, c, 0]) / (a + b + c)
        assert np.allclose(games.nash(games.twist(a, b, c).P), expected, atol=1e-12)


def test_equilibria_of_random_games_cannot_be_exploited_and_those_of_support_one_are_found() -> None:
    for seed in range(20):
        matrix = random_matrix(seed, 3 + seed % 4)
        (pi,) = games.equilibria(matrix)
        worst = max(sum(matrix[y, z] * pi[z] for z in range(len(pi))) for y in range(len(pi)))
        assert worst == pytest.approx(0.5, abs=1e-9) and pi.sum() == pytest.approx(1) and pi.min() >= 0
    best = games.ladder([0.0, 2.0, 1.0]).P
    assert np.array_equal(games.nash(best), [0, 1, 0])


def test_the_gap_is_what_the_best_answer_gains() -> None:
    for seed in range(10):
        pi = random_policy(seed)
        by_hand = max(sum(pi[j] * P[i, j] for j in range(4)) for i in range(4))
        assert games.duality_gap(pi, P) == pytest.approx(2 * by_hand - 1) and games.duality_gap(pi, P) > 1e-3
    assert games.duality_gap(NASH, P) == pytest.approx(0, abs=1e-12)
    assert games.duality_gap(np.eye(4)[2], P) == pytest.approx(0.8)


def test_the_regularised_gap_is_a_maximum_over_policies_and_zero_at_the_regularised_equilibrium_alone() -> None:
    tau = 0.1
    star = games.regularised_nash(P, REF, tau)
    assert games.regularised_gap(star, P, REF, tau) == pytest.approx(0, abs=1e-12)
    pi = random_policy(3)

    def value(other: np.ndarray) -> float:
        win = sum(other[i] * pi[j] * P[i, j] for i in range(4) for j in range(4))
        return 2 * (win - tau * games.kl(other, REF) + tau * games.kl(pi, REF)) - 1

    found = games.regularised_gap(pi, P, REF, tau)
    tried = max(value(random_policy(seed)) for seed in range(3000))
    assert found - 0.02 < tried <= found and found > 0.05
    assert value(games.best_response(pi, P, REF, tau)) == pytest.approx(found)


def test_the_regularised_equilibrium_is_a_fixed_point_and_has_the_right_limits() -> None:
    assert np.allclose(games.regularised_nash(P, REF, 0.1), STAR, atol=6e-5)
    assert games.duality_gap(games.regularised_nash(P, REF, 0.1), P) == pytest.approx(0.0906, abs=5e-5)
    ref = random_policy(1, 5)
    matrix = random_matrix(4, 5)
    for tau in (0.3, 0.02, 1e-3):
        pi = games.regularised_nash(matrix, ref, tau)
        weights = [ref[i] * math.exp(sum(pi[j] * matrix[i, j] for j in range(5)) / tau - 0.5 / tau) for i in range(5)]
        assert np.allclose(pi, np.array(weights) / sum(weights), atol=1e-9)
    assert np.allclose(games.regularised_nash(P, REF, 1e-3), NASH, atol=2e-3)
    assert np.allclose(games.regularised_nash(P, REF, 1e4), REF, atol=1e-4)
    with pytest.raises(ConfigError, match="temperature"):
        games.regularised_nash(P, REF, 0.0)


def test_dice_and_three_raters() -> None:
    dice = games.dice().P
    assert dice[0, 1] == dice[1, 2] == dice[2, 0] == pytest.approx(5 / 9)
    assert np.allclose(games.nash(dice), 1 / 3) and np.allclose(games.bradley_terry(dice), 0, atol=1e-12)
    assert games.cyclic_fraction(dice) == pytest.approx(1) == games.cyclic_fraction(dice, "logit")
    best = {}
    for eps in (-0.1, -1e-3, 1e-3, 0.1):
        matrix = games.three_raters(eps).P
        assert np.allclose(games.nash(matrix), [1 / 3 + eps / 2, 1 / 3 + eps / 2, 1 / 3 - eps], atol=1e-10)
        best[eps] = int(games.bradley_terry(matrix).argmax())
    assert best == {-0.1: 1, -1e-3: 1, 1e-3: 0, 0.1: 0}


# Ratings


def test_cyclic_fraction_is_what_a_least_squares_rating_leaves() -> None:
    for seed in range(5):
        matrix = random_matrix(seed, 5) * 0.98 + 0.01
        for scale in ("probability", "logit"):
            flow = matrix - 0.5 if scale == "probability" else np.log(matrix / (1 - matrix))
            rows = list(itertools.product(range(5), repeat=2))
            design = np.zeros((len(rows), 5))
            for row, (i, j) in zip(design, rows, strict=True):
                row[i] += 1
                row[j] -= 1
            rest = flow.reshape(-1) - design @ np.linalg.lstsq(design, flow.reshape(-1), rcond=1e-9)[0]
            assert games.cyclic_fraction(matrix, scale) == pytest.approx((rest**2).sum() / (flow**2).sum())
    ladder = games.ladder([0.3, -1.0, 2.0, 0.9]).P
    assert games.cyclic_fraction(ladder, "logit") < 1e-12 < 1e-3 < games.cyclic_fraction(ladder)
    assert games.cyclic_fraction(P) == pytest.approx(0.515, abs=1e-3)
    assert games.cyclic_fraction(np.full((3, 3), 0.5)) == 0
    with pytest.raises(ConfigError, match="no logit"):
        games.cyclic_fraction(games.thresholded(P), "logit")


def test_bradley_terry_is_the_maximum_of_the_likelihood() -> None:
    counts = np.array([[0, 7, 2, 1], [3, 0, 6, 9], [8, 1, 0, 4], [2, 5, 3, 0.0]])
    s = games.bradley_terry(counts)
    strength = np.ones(4)  # Zermelo's own iteration
    for _ in range(2000):
        for i in range(4):
            met = sum((counts[i, j] + counts[j, i]) / (strength[i] + strength[j]) for j in range(4) if j != i)
            strength[i] = counts[i].sum() / met
    assert np.allclose(s, np.log(strength) - np.log(strength).mean(), atol=1e-10)
    assert np.allclose(games.bradley_terry(P), [0.71, 0.16, -0.27, -0.60], atol=5e-3)
    flattered = games.twist(decoy=(0.55, 0.95, 0.55)).P
    assert games.bradley_terry(flattered).argmax() == 1 and np.allclose(games.nash(flattered), NASH)
    assert np.allclose(games.bradley_terry(games.ladder([2.0, -7.0, 5.0]).P), [2, -7, 5], atol=1e-8)
    with pytest.raises(ConfigError, match="no finite"):
        games.bradley_terry(np.array([[0, 3, 1], [0, 0, 1], [0, 1, 0.0]]))


def test_elo_keeps_its_sum_and_depends_on_the_order() -> None:
    start = np.array([1000.0, 1200.0, 1100.0])
    first = games.elo_update(games.elo_update(start, 0, 1, 1.0), 1, 2, 0.5)
    second = games.elo_update(games.elo_update(start, 1, 2, 0.5), 0, 1, 1.0)
    assert first.sum() == pytest.approx(start.sum()) and not np.allclose(first, second)
    expected = 1 / (1 + 10 ** (200 / 400))
    assert games.elo_update(start, 0, 1, 1.0)[0] == pytest.approx(1000 + 32 * (1 - expected))
    assert list(start) == [1000, 1200, 1100]


def test_win_matrix_has_wilson_intervals() -> None:
    counts = np.array([[0, 30], [10, 0]])
    found = games.win_matrix(counts)[0][1]
    z, p, n = 1.959964, 0.75, 40
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.low, found.high) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert found.value == 0.75 and games.win_matrix(counts)[1][0].value == 0.25
    assert games.win_matrix(counts, np.array([[0, 20], [20, 0]]))[0][1].value == pytest.approx(40 / 60)


def test_nash_averaging_shares_among_clones_and_drops_the_dominated() -> None:
    assert np.allclose(games.nash_averaging(P), NASH, atol=1e-9)
    copied = [0, 1, 1, 2, 3, 0, 0]
    found = games.nash_averaging(P[np.ix_(copied, copied)])
    expected = np.array([1 / 3, 2, 2, 2, 0, 1 / 3, 1 / 3]) / 7
    assert np.allclose(found, expected, atol=1e-6)
    # An answer that ties with all beside the cycle: every mixture of it and the cycle's equilibrium is one.
    tied = np.full((4, 4), 0.5)
    tied[1:, 1:] = P[:3, :3]
    entropy = -(NASH[:3] @ np.log(NASH[:3]))
    share = 1 / (1 + math.exp(entropy))
    assert len(games.equilibria(tied)) == 2
    assert np.allclose(games.nash_averaging(tied), [share, *((1 - share) * NASH[:3])], atol=1e-7)
    # Checkpoints that play one action each are the game; of a ladder the strongest is all.
    assert games.nash_averaging(games.ladder([1.0, 3.0, 2.0]).P)[1] == pytest.approx(1)
    assert games.bradley_terry(P).argmax() == 0 and NASH[0] == min(NASH[:3])


def test_what_is_no_game_is_refused() -> None:
    with pytest.raises(ConfigError, match="no preference matrix"):
        games.Game(np.array([[0.5, 0.7], [0.4, 0.5]]), ("a", "b"), np.full(2, 0.5))
    with pytest.raises(ConfigError, match="2 answers has 1 names"):
        games.Game(np.full((2, 2), 0.5), ("a",), np.full(2, 0.5))
    with pytest.raises(ConfigError, match="shape"):
        games.check_matrix(np.zeros((2, 3)))
    with pytest.raises(ConfigError, match="15 answers"):
        games.equilibria(np.full((15, 15), 0.5))


# Loops on the game, from the even reference


def test_offline_preferences_are_exploited() -> None:
    policy = games.preference_step(REF, P, REF, 0.1)
    assert policy[0] == pytest.approx(0.996, abs=5e-4) and games.duality_gap(policy, P) == pytest.approx(0.40, abs=5e-3)
    assert int(games.win_rates(P, policy).argmax()) == 1


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_rounds_of_dpo_on_the_previous_iterate_cycle(beta: float) -> None:
    late = path(lambda pi: games.preference_step(pi, P, pi, beta), 150)[40:]
    assert gaps(late).max() > 0.55
    assert {int(policy.argmax()) for policy in late} == {0, 1, 2}


def test_rounds_of_dpo_on_a_frozen_reference() -> None:
    settled = path(lambda pi: games.preference_step(pi, P, REF, 1.0), 200)
    assert (
        np.allclose(settled[-1], [0.348, 0.348, 0.181, 0.123], atol=5e-4) and np.ptp(settled[-50:], axis=0).max() < 1e-9
    )
    assert games.duality_gap(settled[-1], P) == pytest.approx(0.116, abs=5e-4)
    for beta, worst in ((0.1, 0.78), (0.3, 0.467)):
        late = gaps(path(lambda pi, beta=beta: games.preference_step(pi, P, REF, beta), 200)[100:])
        assert late.max() == pytest.approx(worst, abs=5e-3) and late.min() < late.max() - 0.05


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0, 5.0])
def test_inpo_reaches_the_regularised_equilibrium_whatever_its_step(rate: float) -> None:
    star = games.regularised_nash(P, REF, 0.1)
    assert np.allclose(games.inpo_step(star, P, REF, 0.1, 1 / rate), star, atol=1e-12)
    last = path(lambda pi: games.inpo_step(pi, P, REF, 0.1, 1 / rate), 1500)[-1]
    assert games.kl(star, last) < 1e-10 and games.duality_gap(last, P) == pytest.approx(0.0906, abs=5e-5)


def test_inpo_with_growing_eta_closes_in_like_one_over_the_rounds() -> None:
    star, pi, left = games.regularised_nash(P, REF, 0.1), random_policy(2), {}
    for t in range(1, 1601):
        pi = games.inpo_step(pi, P, REF, 0.1, 0.1 * (t + 2) / 2)
        left[t] = games.kl(star, pi)
    assert left[1600] < 1e-3 and all(left[4 * t] < left[t] / 3 for t in (100, 200, 400))


def test_inpo_on_the_likelier_winner_plays_another_game() -> None:
    hard = games.thresholded(P)
    other = games.nash(hard)
    assert np.allclose(other, [1 / 3, 1 / 3, 1 / 3, 0]) and games.duality_gap(other, P) == pytest.approx(
        0.1333, abs=1e-4
    )
    last = path(lambda pi: games.inpo_step(pi, hard, REF, 0.02, 10.0), 9000)[-1]
    assert np.allclose(last, other, atol=1e-3) and games.duality_gap(last, P) == pytest.approx(0.133, abs=2e-3)


@pytest.mark.parametrize(("eta", "left"), [(0.1, 8e-6), (0.02, 3e-7)])
def test_nash_md_stops_beside_the_regularised_equilibrium(eta: float, left: float) -> None:
    star = games.regularised_nash(P, REF, 0.1)
    policies = path(lambda pi: games.nash_md_step(pi, P, REF, 0.1, eta), 8000)
    assert games.kl(star, policies[-1]) == pytest.approx(left, rel=0.1)
    away = np.array([games.kl(star, pi) for pi in policies[:500]])
    assert (away[1:] <= (1 - eta * 0.1) * away[:-1] + 2 * eta**2 + 1e-15).all()


def test_nash_md_with_falling_steps_keeps_its_bound() -> None:
    tau, star, pi = 0.5, games.regularised_nash(P, REF, 0.5), REF
    for t in range(1000):
        pi = games.nash_md_step(pi, P, REF, tau, 2 / (tau * (t + 2)))
        assert games.kl(star, pi) <= 8 / (tau**2 * (t + 2))
    assert games.kl(star, pi) < 1e-6


def test_multiplicative_weights_cycle_and_their_average_converges() -> None:
    policies = path(lambda pi: games.mwu_step(pi, P, 0.5), 3000)
    assert gaps(policies[1500:]).max() == pytest.approx(0.76, abs=0.01)
    for count, expected in ((200, 0.027), (3000, 0.004)):
        average = games.duality_gap(policies[:count].mean(0), P)
        assert average == pytest.approx(expected, abs=5e-4)
        assert average <= 2 * (math.log(4) / (0.5 * count) + 0.5 / 8)
    assert games.duality_gap(policies[199], P) == pytest.approx(0.08, abs=2e-3)
    assert np.allclose(games.nash_md_step(REF, P, REF, 0.0, 0.5), policies[0])


def test_optimistic_weights_converge_in_the_last_iterate() -> None:
    pi = previous = REF
    for _ in range(6000):
        pi, previous = games.optimistic_mwu(pi, previous, P, 0.5), pi
    assert games.duality_gap(pi, P) < 1e-3 and np.allclose(pi, NASH, atol=1e-3)


def test_every_dno_step_beats_its_predecessor_by_its_divergences_and_still_cycles() -> None:
    pi, late = REF, []
    for t in range(600):
        after = games.dno_step(pi, P, 2.0)
        if t < 100:
            wins = sum(after[i] * pi[j] * P[i, j] for i in range(4) for j in range(4))
            assert wins == pytest.approx(0.5 + 2.0 * (games.kl(after, pi) + games.kl(pi, after)), abs=1e-12)
        pi = after
        late.append(games.duality_gap(pi, P))
    assert wins > 0.5 and max(late[300:]) > 0.4


def test_fictitious_play() -> None:
    average = REF.copy()
    for t in range(1, 5001):
        average += (np.eye(4)[int(games.win_rates(P, average).argmax())] - average) / (t + 1)
    assert games.duality_gap(average, P) < 0.03
    soft = REF.copy()
    for t in range(1, 5001):
        soft += (games.best_response(soft, P, REF, 0.1) - soft) / (t + 1)
    assert np.allclose(soft, games.regularised_nash(P, REF, 0.1), atol=1e-3)


# Demonstrations, and the best of several


def test_spin_moves_by_a_share_of_the_log_odds() -> None:
    data, even = np.array([0.8, 0.2]), np.array([0.5, 0.5])
    assert [games.spin_step(even, data, beta)[0] for beta in (1, 2, 5)] == pytest.approx([0.8, 0.667, 0.569], abs=5e-4)
    assert np.allclose(games.spin_step(data, data, 0.1), data)
    for beta in (0.4, 0.5, 0.8, 3.0):
        error = [
            math.log(p[0] / p[1]) - math.log(4) for p in path(lambda pi, b=beta: games.spin_step(pi, data, b), 6, even)
        ]
        assert error[5] == pytest.approx(error[0] * (1 - 1 / beta) ** 5)
        assert (abs(error[5]) > abs(error[0]) + 1e-9) == (beta < 0.5)


def test_alpha_spin_stops_between_the_data_and_the_base() -> None:
    data, base = random_policy(5), random_policy(6)
    assert np.allclose(games.alpha_spin_step(REF, base, data, 0.0, 2.0), games.spin_step(REF, data, 2.0))
    for alpha, beta in ((0.3, 1.0), (0.7, 2.0)):
        last = path(lambda pi, a=alpha, b=beta: games.alpha_spin_step(pi, base, data, a, b), 300)[-1]
        share = alpha * beta
        expected = (data * base**share) ** (1 / (1 + share))
        assert np.allclose(last, expected / expected.sum(), atol=1e-12) and not np.allclose(last, data, atol=1e-2)
    for alpha, beta, stable in ((0.2, 0.6, True), (0.5, 0.6, False), (0.0, 0.6, True), (0.9, 0.5, False)):
        assert (abs(1 - alpha - 1 / beta) < 1) == stable
        fixed = (data * base ** (alpha * beta)) ** (1 / (1 + alpha * beta))
        near = games.normalised(np.log(fixed) + np.array([1e-3, 0, 0, 0]))
        far = path(lambda pi, a=alpha, b=beta: games.alpha_spin_step(pi, base, data, a, b), 12, near)
        moved = [games.kl(fixed / fixed.sum(), policy) for policy in far]
        assert (moved[-1] < moved[0]) == stable


def test_the_best_of_k_by_enumeration_and_over_rounds() -> None:
    pi, rewards = random_policy(8), np.array([0.2, 0.9, 0.2, 0.5])
    law = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=3):
        best = [i for i in drawn if rewards[i] == max(rewards[j] for j in drawn)]
        for i in best:  # a tie of two equal rewards is shared by how often each was drawn
            law[i] += math.prod(pi[j] for j in drawn) / len(best)
    assert np.allclose(games.best_of(pi, rewards, 3), law, atol=1e-12)
    rounds = path(lambda policy: games.best_of(policy, rewards, 3), 3, pi)[-1]
    assert np.allclose(rounds, games.best_of(pi, rewards, 27), atol=1e-12)
    assert np.allclose(games.best_of(pi, rewards, 1), pi) and games.best_of(pi, rewards, 5000)[1] > 1 - 1e-9
