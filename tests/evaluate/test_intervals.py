"""Intervals: known values, independent loops, and coverage by simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.evaluate import (
    Estimate,
    kl_on_samples,
    length_controlled_win_rate,
    mean_interval,
    paired_difference,
    ratio_interval,
    win_rate,
    win_rate_of,
)
from align.evaluate.intervals import student_t
from align.evaluate.results import distinct

# Tables of Student's t, two-sided 95 %.
T = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    7: 2.3646,
    30: 2.0423,
    60: 2.0003,
    120: 1.9799,
    1000: 1.9623,
    4000: 1.9606,
}


def covered(estimates: list[Estimate], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in estimates]))


def test_student_t_is_that_of_the_tables():
    for df, value in T.items():
        assert student_t(df) == pytest.approx(value, abs=6e-5), df
    assert student_t(1000) == pytest.approx(student_t(1001), abs=3e-6)  # the sums meet the expansion
    assert student_t(9, 0.99) == pytest.approx(3.2498, abs=1e-4)


def test_mean_interval_by_hand():
    # Mean 3, standard deviation 1.5811, standard error 0.70711, t(4) = 2.7764.
    found = mean_interval([1, 2, 3, 4, 5])
    assert (found.value, found.n) == (3, 5)
    assert found.low == pytest.approx(3 - 1.96325, abs=1e-4) and found.high == pytest.approx(3 + 1.96325, abs=1e-4)
    assert mean_interval([1, 2, 3, 4, 5, math.nan]) == found
    assert mean_interval([2.0]).value == 2 and math.isnan(mean_interval([2.0]).low)
    assert mean_interval([]).n == 0 and math.isnan(mean_interval([math.nan]).value)


def test_clusters_by_an_independent_loop():
    rng = random.Random(0)
    values, clusters = [], []
    for name in "abcdefgh":
        for _ in range(rng.randint(1, 4)):
            values.append(rng.gauss(ord(name) % 3, 1))
            clusters.append(name)
    mean = sum(values) / len(values)
    total = 0.0
    for name in set(clusters):
        own = [value for value, cluster in zip(values, clusters, strict=True) if cluster == name]
        total += (sum(own) - mean * len(own)) ** 2
    half = T[7] * math.sqrt(8 / 7 * total) / len(values)
    found = mean_interval(values, clusters)
    assert found.value == pytest.approx(mean)
    assert found.high - found.value == pytest.approx(half, rel=1e-4)
    order = list(range(len(values)))
    rng.shuffle(order)
    mixed = mean_interval([values[i] for i in order], [clusters[i] for i in order])
    assert mixed.low == pytest.approx(found.low)
    # Copies of a value say nothing new.
    twice = mean_interval([1.0, 1.0, 4.0, 4.0, 6.0, 6.0], [0, 0, 1, 1, 2, 2])
    once = mean_interval([1.0, 4.0, 6.0])
    assert (twice.value, twice.low) == (pytest.approx(once.value), pytest.approx(once.low))


def test_ratio_is_of_sums():
    found = ratio_interval([1, 2, 9], [1, 1, 4])
    assert found.value == 2
    by_hand = T[2] * math.sqrt(3 / 2 * ((1 - 2) ** 2 + 0 + (9 - 8) ** 2)) / 6
    assert found.high - 2 == pytest.approx(by_hand, rel=1e-4)


def test_paired_difference():
    before, after = [1.0, 5.0, 3.0, math.nan], [2.0, 7.0, 3.0, 9.0]
    found = paired_difference(before, after)
    assert found == mean_interval([1.0, 2.0, 0.0])
    assert found.value == 1 and paired_difference(after, before).value == -1
    with pytest.raises(ConfigError, match="2 values before and 1 after"):
        paired_difference([1, 2], [1])


def test_wilson_values():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611; 29 of 29 gives 0.8830 to 1.
    for wins, n, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)):
        found = win_rate(wins, n - wins)
        assert found.value == wins / n and found.n == n
        assert found.low == pytest.approx(low, abs=6e-5) and found.high == pytest.approx(high, abs=6e-5)
    assert win_rate(3, 1, 2).value == pytest.approx(4 / 6)
    mirrored = win_rate(1, 3, 2)
    assert (mirrored.low, mirrored.high) == (
        pytest.approx(1 - win_rate(3, 1, 2).high),
        pytest.approx(1 - win_rate(3, 1, 2).low),
    )
    # Ties are less noise than wins and losses, and never certainty.
    assert 0 < width(win_rate(0, 0, 50)) < width(win_rate(20, 20, 10)) < width(win_rate(25, 25))
    assert win_rate(0, 0).n == 0
    with pytest.raises(ConfigError, match="not negative"):
        win_rate(-1, 2)


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def test_scores_are_counts_and_missing_is_no_loss():
    scores = [1, 1, 0, 0.5, math.nan, 1]
    assert win_rate_of(scores) == win_rate(3, 1, 1)
    assert win_rate_of(scores, [1, 2, 3, 4, 5, 6]) == win_rate(3, 1, 1)
    assert math.isnan(win_rate_of([math.nan]).value)
    # Four identical answers of each prompt are one observation of it.
    rng = np.random.default_rng(0)
    single = (rng.random(80) < 0.6).astype(float)
    repeated = win_rate_of(np.repeat(single, 4), np.repeat(np.arange(80), 4).tolist())
    assert repeated.value == pytest.approx(single.mean())
    assert width(repeated) == pytest.approx(width(win_rate_of(single)), rel=0.03)
    assert width(win_rate_of(np.repeat(single, 4))) < 0.6 * width(repeated)


@pytest.mark.parametrize(
    ("n", "shares"),
    [
        (200, (0.5, 0.5, 0.0)),
        (200, (0.7, 0.1, 0.2)),
        (100, (0.3, 0.1, 0.6)),
        (60, (0.55, 0.4, 0.05)),
        (400, (0.9, 0.05, 0.05)),
    ],
)
def test_win_rate_covers(n, shares):
    counts = np.random.default_rng(n).multinomial(n, shares, 4000)
    found = covered([win_rate(*map(int, row)) for row in counts], shares[0] + shares[2] / 2)
    assert 0.93 <= found <= 0.97


def test_clustered_win_rate_covers_where_the_plain_one_does_not():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(60), 4).tolist()
    with_clusters, without = [], []
    for _ in range(1200):
        chances = rng.beta(0.6, 0.3, 60)
        scores = (rng.random((60, 4)) < chances[:, None]).astype(float).ravel()
        with_clusters.append(win_rate_of(scores, clusters))
        without.append(win_rate_of(scores))
    assert 0.93 <= covered(with_clusters, 2 / 3) <= 0.97
    assert covered(without, 2 / 3) < 0.88


def test_means_and_differences_cover():
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(25), 3).tolist()
    means, differences = [], []
    for _ in range(1500):
        shared = rng.normal(0, 2, 25)
        noise = rng.normal(0, 1, (2, 25, 3))
        before = shared[:, None] + noise[0]
        after = shared[:, None] + 0.3 + noise[1]
        means.append(mean_interval(after.ravel(), clusters))
        differences.append(paired_difference(before.ravel(), after.ravel(), clusters))
    assert 0.93 <= covered(means, 0.3) <= 0.97
    assert 0.93 <= covered(differences, 0.3) <= 0.97
    assert np.mean([width(one) for one in differences]) < 0.6 * np.mean([width(one) for one in means])


def simulate_lengths(rng: np.random.Generator, n: int, level: float, slope: float) -> tuple[np.ndarray, ...]:
    lengths, baseline = rng.normal(60, 20, n), rng.normal(45, 20, n)
    gap = lengths - baseline
    chance = 1 / (1 + np.exp(-(level + slope * np.tanh(gap / np.sqrt(np.mean(gap**2))))))
    return (rng.random(n) < chance).astype(float), lengths, baseline


def test_length_controlled_win_rate():
    rng = np.random.default_rng(3)
    # Wins come from length alone: the plain win rate is fooled, this one is not.
    scores, lengths, baseline = simulate_lengths(rng, 4000, 0.0, 2.0)
    assert win_rate_of(scores).value > 0.62
    assert length_controlled_win_rate(scores, lengths, baseline).value == pytest.approx(0.5, abs=0.03)
    estimates = [length_controlled_win_rate(*simulate_lengths(rng, 200, 0.5, 1.0)) for _ in range(600)]
    assert 0.93 <= covered(estimates, 1 / (1 + math.exp(-0.5))) <= 0.97
    # Without differences of length it is the plain rate, drawn to 1/2 by one tie.
    flat = length_controlled_win_rate([1] * 30 + [0] * 10, [5] * 40, [5] * 40)
    assert flat.value == pytest.approx(30.5 / 41, abs=1e-9)
    # Mirrored sides give the mirrored rate; every comparison won is no error and no certainty.
    mirrored = length_controlled_win_rate(1 - scores[:300], baseline[:300], lengths[:300])
    assert mirrored.value == pytest.approx(
        1 - length_controlled_win_rate(scores[:300], lengths[:300], baseline[:300]).value
    )
    all_won = length_controlled_win_rate(np.ones(50), lengths[:50], baseline[:50])
    assert 0.9 < all_won.value < all_won.high < 1 and all_won.low < 0.95


def test_length_control_by_gradient_descent():
    """The same model fitted by plain gradient steps, in a loop."""
    rng = np.random.default_rng(4)
    scores, lengths, baseline = simulate_lengths(rng, 120, 0.4, 1.0)
    scores[:10] = 0.5
    gap = lengths - baseline
    scale = math.sqrt(sum(d * d for d in gap) / len(gap))
    rows = [(score, math.tanh(d / scale)) for score, d in zip(scores, gap, strict=True)] + [(0.5, 0.0)]
    a = b = 0.0
    for _ in range(4000):
        slope_a = slope_b = 0.0
        for score, x in rows:
            error = score - 1 / (1 + math.exp(-(a + b * x)))
            slope_a += error
            slope_b += error * x
        a += 0.02 * slope_a
        b += 0.02 * (slope_b - 0.01 * b)
    found = length_controlled_win_rate(scores, lengths, baseline)
    assert found.value == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-6)


def test_kl_estimators_are_unbiased_for_a_chain():
    """Three tokens from a policy whose second distribution depends on the first token; the KL is summed by hand."""
    rng = np.random.default_rng(5)
    policy = [rng.dirichlet(np.ones(4) * 2, 5) for _ in range(3)]
    reference = [rng.dirichlet(np.ones(4) * 2, 5) for _ in range(3)]
    exact = 0.0
    reached = {(): 1.0}
    for step in range(3):
        after = {}
        for prefix, chance in reached.items():
            state = prefix[-1] if prefix else 4
            for token in range(4):
                p, q = policy[step][state][token], reference[step][state][token]
                exact += chance * p * math.log(p / q)
                after[(*prefix, token)] = chance * p
        reached = after
    ours, theirs = [], []
    for _ in range(6000):
        state, one, other = 4, [], []
        for step in range(3):
            token = rng.choice(4, p=policy[step][state])
            one.append(math.log(policy[step][state][token]))
            other.append(math.log(reference[step][state][token]))
            state = token
        ours.append(np.array(one))
        theirs.append(np.array(other))
    found = kl_on_samples(ours, theirs)
    assert found.tokens == 18000
    for estimate, scale in ((found.k1, 1), (found.k3, 1), (found.k1_per_token, 3), (found.k3_per_token, 3)):
        assert estimate.low <= exact / scale <= estimate.high
        assert width(estimate) < 0.2 * exact
    assert kl_on_samples(ours, ours).k1.value == kl_on_samples(ours, ours).k3.value == 0
    with pytest.raises(ConfigError, match="different tokens"):
        kl_on_samples([np.zeros(3)], [np.zeros(2)])


def test_kl_by_hand_and_per_token():
    found = kl_on_samples([[-1.0, -2.0], [-0.5]], [[-1.5, -1.0], [-2.5]])
    assert found.k1.value == pytest.approx(((0.5 - 1.0) + 2.0) / 2)
    third = (math.exp(-0.5) - 1 + 0.5) + (math.exp(1.0) - 1 - 1.0) + (math.exp(-2.0) - 1 + 2.0)
    assert found.k3.value == pytest.approx(third / 2)
    assert found.k1_per_token.value == pytest.approx(1.5 / 3) and found.k3_per_token.value == pytest.approx(third / 3)


def test_distinct_n():
    assert distinct([[1, 2, 1], [2]], 1) == 2 / 4
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert math.isnan(distinct([[1]], 2))
