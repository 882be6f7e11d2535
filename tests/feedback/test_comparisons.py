"""Labels, win rates and tournaments against plain loops and the books' own numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.core.seeds import generator
from align.data.comparisons import label, play, tournament, win_rates
from align.feedback.consistency import consistency, ends_consistency, kendall_tau


def random_matrix(count, seed=0):
    rng = np.random.default_rng(seed)
    wins = np.full((count, count), 0.5)
    for i, j in itertools.combinations(range(count), 2):
        wins[i, j] = rng.random()
        wins[j, i] = 1 - wins[i, j]
    return wins


def test_labels_are_hard_sampled_or_the_probability():
    assert [label(p, "hard") for p in (0.0, 0.49, 0.5, 0.51, 1.0)] == [0, 0, 0.5, 1, 1]
    assert [label(p, "prob") for p in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]
    assert all(math.isnan(label(math.nan, kind)) for kind in ("hard", "sampled", "prob"))
    drawn = [label(0.7, "sampled", 3, "file", row) for row in range(4000)]
    assert set(drawn) == {0.0, 1.0} and abs(np.mean(drawn) - 0.7) < 0.03
    assert drawn[:50] == [label(0.7, "sampled", 3, "file", row) for row in range(50)]
    assert drawn[:50] != [label(0.7, "sampled", 4, "file", row) for row in range(50)]
    assert label(1.0, "sampled", 0, 1) == 1 and label(0.0, "sampled", 0, 1) == 0
    with pytest.raises(ConfigError, match="probability"):
        label(1.2, "prob")


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_win_rates_with_and_without_oneself(count):
    wins = random_matrix(count, count)
    with_self, without = win_rates(wins), win_rates(wins, with_self=False)
    for i in range(count):
        others = [wins[i, j] for j in range(count) if j != i]
        assert with_self[i] == pytest.approx((sum(others) + 0.5) / count, abs=1e-15)
        assert without[i] == pytest.approx(sum(others) / (count - 1), abs=1e-15)
    # The mean is 1/2 either way, and the rule with oneself shrinks P - 1/2 by (K - 1) / K.
    assert with_self.mean() == pytest.approx(0.5) and without.mean() == pytest.approx(0.5)
    assert with_self - 0.5 == pytest.approx((without - 0.5) * (count - 1) / count)
    wins[0, 1] = wins[1, 0] = np.nan
    assert np.isnan(win_rates(wins)).tolist() == [i < 2 for i in range(count)]


def test_a_tournament_of_eight_takes_eleven_matches_and_finds_best_and_worst():
    strength = np.array([0.3, 1.2, -0.4, 2.5, 0.9, -1.7, 0.1, 1.1])
    wins = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
    played = tournament(wins)
    assert (played.winner, played.loser, played.kept) == (3, 5, True)
    assert len(played.compared) == 11 and len(set(played.compared)) == 11
    assert played.compared[:4] == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert all(i < j for i, j in played.compared)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 9, 16])
def test_a_tournament_of_a_ladder_finds_its_ends_whatever_the_number(count):
    for seed in range(20):
        strength = generator(seed, count).permutation(count).astype(float)
        played = tournament((strength[:, None] > strength[None, :]) + 0.5 * np.eye(count))
        assert (played.winner, played.loser) == (strength.argmax(), strength.argmin())
        assert played.kept


def test_ties_go_to_the_first_and_a_pair_that_loses_its_own_match_is_not_kept():
    played = tournament(np.full((8, 8), 0.5))
    assert (played.winner, played.loser, played.kept) == (0, 7, False)
    # 0 beats 1 and 2, 3 loses to 2 and to 1: best 0, worst 3. But 3 beats 0.
    wins = np.full((4, 4), 0.5)
    for i, j, p in ((0, 1, 0.9), (2, 3, 0.9), (0, 2, 0.9), (1, 3, 0.9), (0, 3, 0.2)):
        wins[i, j], wins[j, i] = p, 1 - p
    played = tournament(wins)
    assert (played.winner, played.loser, played.kept) == (0, 3, False) and len(played.compared) == 5


def test_a_missing_match_leaves_no_winner_and_one_that_is_not_played_costs_nothing():
    wins = random_matrix(8)
    needed = tournament(wins).compared
    spare = next(p for p in itertools.combinations(range(8), 2) if p not in needed)
    holed = wins.copy()
    holed[spare] = np.nan
    assert tournament(holed) == tournament(wins)
    holed[needed[5]] = np.nan
    assert tournament(holed).winner is None and not tournament(holed).kept
    assert list(play(1)) == []
    # Of two answers the first match is the last, and is played once.
    assert tournament(random_matrix(2)).compared == ((0, 1),)


def loop_tau(a, b):
    """Kendall's tau-b by its definition, pair by pair."""
    agree = left = right = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        x, y = a[i] - a[j], b[i] - b[j]
        agree += int(x * y > 0) - int(x * y < 0)
        left += x != 0
        right += y != 0
    return agree / math.sqrt(left * right)


def test_kendall_tau_is_the_loop_and_its_identities_hold():
    rng = np.random.default_rng(0)
    for count in (3, 5, 9):
        a, b = rng.normal(size=count), rng.integers(0, 3, count).astype(float)
        b[0], b[1] = 0, 2
        assert kendall_tau(a, b) == pytest.approx(loop_tau(a, b), abs=1e-15)
        assert kendall_tau(a, a) == 1 and kendall_tau(a, -a) == -1
        assert kendall_tau(a, b) == kendall_tau(np.exp(a), 3 * b + 7) == kendall_tau(b, a)
        assert kendall_tau(a, -b) == -kendall_tau(a, b)
    assert kendall_tau(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 3])) == pytest.approx(4 / 5)
    assert math.isnan(kendall_tau(np.array([1.0, 1.0]), np.array([1.0, 2.0])))
    # A missing reward leaves its answer out, as if it had not been sampled.
    holed = kendall_tau(np.array([1.0, np.nan, 3, 2]), np.array([1.0, 9, 2, 3]))
    assert holed == kendall_tau(np.array([1.0, 3, 2]), np.array([1.0, 2, 3])) == pytest.approx(1 / 3)


def test_consistency_keeps_its_groups_in_place():
    found = consistency([[1, 2, 3], [1, 1, 1], [3, 2, 1]], [[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert found.each[0] == 1 and np.isnan(found.each[1]) and found.each[2] == 0
    assert found.mean == 0.5 and found.undefined == 1
    with pytest.raises(ConfigError):
        consistency([[1.0, 2.0]], [[1.0]])


def test_ends_agree_on_the_best_and_the_worst_answer_not_on_the_first_and_the_last():
    a = np.array([2.0, 9, 1, 5])
    assert ends_consistency(a, np.array([5.0, 7, 0, 2])) == 1  # the middle is swapped
    assert ends_consistency(a, np.array([2.0, 7, 3, 0])) == 0
    assert ends_consistency(a, np.array([2.0, 9, 9, 0])) == 0  # a tie for the best
    assert consistency([a], [a * 2], "ends").mean == 1
