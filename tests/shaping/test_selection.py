"""Rules that make pairs, against plain loops written from their papers, and what each does with what is missing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.core.options import declared
from align.core.seeds import generator
from align.data.groups import RowId
from align.data.rollouts import Answer, RolloutGroup
from align.shaping.selection import PairSpec, candidates, faults, rates_against, select, top_share, unused

NAN = math.nan
RULES = ("best_worst", "best_random", "random", "margin", "length_matched", "tournament", "all")


def group(rewards=None, wins=None, lengths=None, texts=None, finished=None, origins=None):
    count = len(rewards if rewards is not None else wins if wins is not None else texts)
    return RolloutGroup(
        RowId("x", 0),
        "ask",
        np.array([1]),
        tuple(
            Answer(
                ids=np.arange((lengths or [3] * count)[k]),
                text=(texts or [f"t{i}" for i in range(count)])[k],
                finished=(finished or [True] * count)[k],
                logp=np.zeros(1, np.float32),
                origin=(origins or ["policy"] * count)[k],
                rewards={} if rewards is None else {"r": rewards[k]},
            )
            for k in range(count)
        ),
        wins=None if wins is None else np.array(wins, dtype=float),
    )


def run(one, seed=0, **spec):
    made = PairSpec(**spec)
    return select(candidates(one, made), made, generator(seed, "test"))


def chosen(one, **spec):
    """(pairs of indices, why there are none)."""
    found = run(one, **spec)
    return [(pair.chosen, pair.rejected) for pair in found.pairs], found.lost


def random_wins(rng, count):
    upper = rng.random((count, count))
    wins = np.triu(upper, 1)
    return wins + np.tril(1 - wins.T, -1) + np.eye(count) / 2


def test_best_worst_is_strict_and_missing_is_never_the_worst():
    assert chosen(group([1.0, 3.0, 2.0]), rule="best_worst") == ([(1, 0)], "")
    assert chosen(group([NAN, 3.0, 2.0, 2.5]), rule="best_worst") == ([(1, 2)], "")
    assert chosen(group([2.0, 2.0, 2.0]), rule="best_worst") == ([], "tie")
    assert chosen(group([2.0, NAN]), rule="best_worst") == ([], "missing")
    assert chosen(group([5.0, 1.0, 5.0, 1.0]), rule="best_worst") == ([(0, 1)], ""), "of equals the first"
    assert chosen(group([5.0, 1.0], texts=["same", "same"]), rule="best_worst") == ([], "identical")
    assert chosen(group([0.0, 5.0, 4.0], texts=["", "b", "c"]), rule="best_worst") == ([(1, 2)], ""), "no empty answer"


@pytest.mark.parametrize("rule", RULES)
def test_missing_feedback_and_empty_answers_take_part_in_no_rule(rule):
    rng = np.random.default_rng(1)
    for trial in range(40):
        rewards = [NAN if rng.random() < 0.4 else float(value) for value in rng.normal(size=6)]
        texts = [" " if rng.random() < 0.2 else f"t{k}" for k in range(6)]
        found = run(group(rewards, texts=texts), seed=trial, rule=rule)
        fit = {k for k in range(6) if not math.isnan(rewards[k]) and texts[k].strip()}
        assert {k for pair in found.pairs for k in (pair.chosen, pair.rejected)} <= fit
        assert found.left_out.get("empty", 0) == sum(not text.strip() for text in texts)
        assert sum(found.left_out.values()) == 6 - len(fit)
        assert bool(found.pairs) == (len(fit) >= 2), (rule, rewards, texts)
        for pair in found.pairs:
            assert rewards[pair.chosen] > rewards[pair.rejected]
            assert pair.margin == pytest.approx(rewards[pair.chosen] - rewards[pair.rejected], abs=1e-15)


def test_best_random_draws_evenly_among_the_worse_ones():
    one = group([1.0, 4.0, 2.0, 4.0, 3.0])
    drawn = [chosen(one, seed=seed, rule="best_random")[0][0] for seed in range(600)]
    assert {pair[0] for pair in drawn} == {1}
    counts = [sum(pair[1] == k for pair in drawn) for k in (0, 2, 4)]
    assert sum(counts) == 600, "an equally good answer is no worse one"
    assert min(counts) > 150  # 200 expected, standard deviation 11.5
    assert chosen(group([1.0, 1.0]), rule="best_random") == ([], "tie")
    assert chosen(group([1.0, 0.5], texts=["a", "a"]), rule="best_random") == ([], "tie")


def test_random_takes_every_pair_of_answers_equally_often_and_keeps_ties_of_soft_labels_only():
    one = group([1.0, 2.0, 3.0, 4.0])
    drawn = [chosen(one, seed=seed, rule="random")[0][0] for seed in range(1200)]
    assert all(better > worse for better, worse in drawn)
    counts = [drawn.count(pair[::-1]) for pair in itertools.combinations(range(4), 2)]
    assert sum(counts) == 1200 and min(counts) > 145  # 200 expected, standard deviation 13
    even = group(wins=[[0.5, 0.5], [0.5, 0.5]])
    assert chosen(even, rule="random") == ([], "tie")
    (pair,) = run(even, rule="random", label="prob").pairs
    assert pair.probability == 0.5
    firsts = [chosen(even, seed=seed, rule="random", label="sampled")[0][0] for seed in range(400)]
    assert 140 < firsts.count((0, 1)) < 260


def test_sampled_labels_win_as_often_as_their_probability_says():
    one = group(wins=[[0.5, 0.7], [0.3, 0.5]])
    found = [run(one, seed=seed, rule="best_worst", label="sampled").pairs[0] for seed in range(2000)]
    kept = [pair for pair in found if not pair.swapped]
    assert abs(len(kept) / 2000 - 0.7) < 0.04  # standard deviation 0.010
    assert {(pair.chosen, pair.rejected, pair.probability) for pair in kept} == {(0, 1, 0.7)}
    turned = next(pair for pair in found if pair.swapped)
    assert (turned.chosen, turned.rejected) == (1, 0)
    assert turned.probability == pytest.approx(0.3) and turned.margin < 0
    (hard,) = run(one, rule="best_worst").pairs
    assert (hard.chosen, hard.probability, hard.swapped) == (0, 0.7, False)


def test_probabilities_of_rewards_are_bradley_terry_and_labels_need_them():
    (pair,) = run(group([1.0, -0.5]), rule="best_worst", scale=2.0, label="prob").pairs
    assert pair.probability == pytest.approx(1 / (1 + math.exp(-3.0)), rel=1e-14)
    for spec in ({"label": "prob"}, {"label": "sampled"}, {"reward": "win_rate"}):
        with pytest.raises(ConfigError, match="needs the probability"):
            run(group([1.0, -0.5]), rule="best_worst", **spec)
    unknown = [[0.5, NAN, 0.8], [NAN, 0.5, 0.6], [0.2, 0.4, 0.5]]
    assert chosen(group(wins=unknown), rule="random", label="prob", seed=0)[1] in ("", "missing")
    assert chosen(group(wins=[[0.5, 0.9, NAN], [0.1, 0.5, 0.2], [NAN, 0.8, 0.5]]), rule="all", label="prob")[0] == [
        (0, 1),
        (2, 1),
    ]


def test_margin_asks_for_the_gap_and_for_another_one_of_the_policys_own_answers():
    """DNO: a positive has at least 5 points, and 2 more than the rejected one, or 1 more where a student wrote it."""
    dno = {"rule": "margin", "margin": 2.0, "own_margin": 1.0, "least_score": 5.0}
    teacher = ["data", "policy", "policy"]
    assert chosen(group([6.0, 5.0, 3.0], origins=teacher), **dno) == ([(0, 2)], "")
    assert chosen(group([6.0, 5.0, 5.0], origins=teacher), **dno) == ([], "margin"), "the teacher needs 2"
    assert chosen(group([6.0, 5.5, 4.5], origins=teacher), **{**dno, "own_margin": 0.5}) == ([(1, 2)], "")
    assert chosen(group([1.0, 5.0, 4.0], origins=teacher), **dno) == ([(1, 0)], ""), "any answer may lose"
    assert chosen(group([4.0, 4.9, 1.0], origins=teacher), **dno) == ([], "margin"), "no positive of 5 points"
    assert chosen(group([4.0, 4.0, 4.0], origins=teacher), **dno) == ([], "tie")
    assert chosen(group([1.0, 1.5]), rule="margin", margin=0.5) == ([(1, 0)], "")
    assert chosen(group([1.0, 1.5]), rule="margin", margin=0.51) == ([], "margin")
    assert chosen(group([1.0, 1.0]), rule="margin") == ([], "tie"), "no gap at all is no pair"


def test_length_matched_takes_the_widest_gap_among_answers_of_like_length():
    one = group([0.0, 5.0, 4.0, 1.0], lengths=[10, 100, 12, 11])
    assert chosen(one, rule="length_matched", length_tolerance=0.2) == ([(2, 0)], "")
    assert chosen(one, rule="length_matched", length_tolerance=0.09) == ([(2, 3)], ""), "12 and 11 alone are so near"
    assert chosen(one, rule="length_matched", length_tolerance=0.95) == ([(1, 0)], "")
    assert chosen(group([0.0, 5.0], lengths=[10, 20]), rule="length_matched") == ([], "length")
    assert chosen(group([3.0, 3.0]), rule="length_matched") == ([], "tie")


def knock_out(wins):
    """INPO's tournament of eight, match by match."""
    w = wins
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    up = [i if w[i, j] >= 0.5 else j for i, j in pairs]
    down = [j if w[i, j] >= 0.5 else i for i, j in pairs]
    semi = [up[i] if w[up[i], up[i + 1]] >= 0.5 else up[i + 1] for i in (0, 2)]
    best = semi[0] if w[semi[0], semi[1]] >= 0.5 else semi[1]
    low = [down[i + 1] if w[down[i], down[i + 1]] >= 0.5 else down[i] for i in (0, 2)]
    worst = low[1] if w[low[0], low[1]] >= 0.5 else low[0]
    return best, worst, w[best, worst] > 0.5


def test_the_tournament_is_inpos_and_its_final_check_drops_prompts():
    kept = dropped = 0
    for trial in range(200):
        wins = random_wins(np.random.default_rng(trial), 8)
        best, worst, won = knock_out(wins)
        pairs, lost = chosen(group(wins=wins), rule="tournament")
        assert (pairs, lost) == (([(best, worst)], "") if won else ([], "final check"))
        kept, dropped = kept + won, dropped + (not won)
    assert kept > 50 and dropped > 20
    rewards = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0, 3.5]
    assert chosen(group(rewards), rule="tournament") == ([(4, 1)], ""), "of a reward the best and the worst"
    missing = random_wins(np.random.default_rng(0), 8)
    missing[0, 1] = missing[1, 0] = NAN
    assert chosen(group(wins=missing), rule="tournament") == ([], "missing")
    assert chosen(group(wins=np.full((4, 4), 0.5)), rule="tournament") == ([], "tie")


def test_all_takes_every_ordered_pair_once():
    pairs, _ = chosen(group([2.0, 1.0, 2.0, NAN]), rule="all")
    assert pairs == [(0, 1), (2, 1)]
    rng = np.random.default_rng(3)
    wins = random_wins(rng, 5)
    pairs, _ = chosen(group(wins=wins), rule="all")
    assert sorted(map(sorted, pairs)) == [list(pair) for pair in itertools.combinations(range(5), 2)]
    assert all(wins[better, worse] > 0.5 for better, worse in pairs)
    assert chosen(group([1.0, 1.0, 1.0]), rule="all") == ([], "tie")


def test_by_origin_needs_no_feedback():
    one = group([NAN] * 4, origins=["policy", "data", "policy", "data_rejected"])
    assert chosen(one, rule="by_origin") == ([(1, 0), (1, 2)], "")
    assert chosen(one, rule="by_origin", rejected_from="data_rejected") == ([(1, 3)], "")
    assert chosen(group([NAN, NAN]), rule="by_origin") == ([], "origin")
    same = group([NAN, NAN], origins=["data", "policy"], texts=["x", "x"])
    assert chosen(same, rule="by_origin") == ([], "identical")


def test_top_is_the_best_of_each_prompt_and_top_share_of_all():
    assert run(group([1.0, 3.0, 3.0, NAN]), rule="top").singles == (1,)
    assert run(group([NAN]), rule="top").lost == "missing"
    spec = PairSpec(rule="top_share", share=0.3)
    groups = [group([1.0, 9.0, 8.0]), group([2.0, NAN, 0.0]), group([7.0, 9.5, 9.0]), group([NAN])]
    found = top_share([candidates(one, spec) for one in groups], spec)
    assert [one.singles for one in found] == [(1,), (), (1,), ()], "two of the eight: 0.3 x 8 rounded"
    assert [one.lost for one in found] == ["", "not among the best", "", "missing"]
    rng = np.random.default_rng(5)
    rewards = rng.normal(size=(50, 4))
    most = PairSpec(rule="top_share", share=0.25)
    taken = top_share([candidates(group(list(row)), most) for row in rewards], most)
    kept = [rewards[number, k] for number, one in enumerate(taken) for k in one.singles]
    assert sorted(kept) == sorted(rewards.ravel())[-50:]


def test_answers_that_were_cut_are_kept_left_out_or_only_rejected():
    one = group([1.0, 5.0, 3.0, 0.0], finished=[True, False, True, False])
    assert chosen(one, rule="best_worst") == ([(1, 3)], "")
    found = run(one, rule="best_worst", unfinished="drop")
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [(2, 0)]
    assert found.left_out == {"unfinished": 2}
    assert chosen(one, rule="best_worst", unfinished="reject") == ([(2, 3)], "")
    assert chosen(group([1.0, 2.0], finished=[True, False]), rule="all", unfinished="reject") == ([], "unfinished")
    assert (
        chosen(group([1.0, 2.0], finished=[False, False]), rule="best_random", unfinished="reject")[1] == "unfinished"
    )


def test_a_length_penalty_is_taken_off_each_token():
    one = group([5.0, 5.5, 4.0], lengths=[10, 30, 10])
    assert chosen(one, rule="best_worst") == ([(1, 2)], "")
    (pair,) = run(one, rule="best_worst", length_penalty=0.1).pairs
    assert (pair.chosen, pair.rejected) == (0, 1) and pair.margin == pytest.approx(4.0 - 2.5)
    with pytest.raises(ConfigError, match=r"`pairs.length_penalty` is unused"):
        run(group(wins=random_wins(np.random.default_rng(0), 3)), rule="all", length_penalty=0.1)


def test_win_rates_count_oneself_as_a_half_and_only_the_policys_answers_as_opponents():
    for trial in range(50):
        rng = np.random.default_rng(trial)
        count = int(rng.integers(2, 7))
        wins, own = random_wins(rng, count), rng.random(count) < 0.7
        wins[rng.random((count, count)) < 0.2] = NAN
        found = rates_against(wins, own)
        for i in range(count):
            met = [wins[i, j] for j in range(count) if own[j] and j != i and not math.isnan(wins[i, j])]
            wanted = sum([*met, *([0.5] if own[i] else [])]) / (len(met) + own[i]) if met else NAN
            np.testing.assert_allclose(found[i], wanted, rtol=1e-14)
    whole = random_wins(np.random.default_rng(9), 5)
    rates = rates_against(whole, np.ones(5, dtype=bool))
    assert rates.mean() == pytest.approx(0.5, abs=1e-15), "SPPO: the mean win rate over the samples is 1/2"
    without = (whole.sum(axis=1) - 0.5) / 4
    np.testing.assert_allclose(rates - 0.5, (without - 0.5) * 4 / 5, atol=1e-15)


def test_pairs_by_wins_follow_the_mean_of_the_matrix():
    wins = random_wins(np.random.default_rng(4), 6)
    rates = wins.mean(axis=1)
    (pair,) = run(group(wins=wins), rule="best_worst").pairs
    assert (pair.chosen, pair.rejected) == (int(rates.argmax()), int(rates.argmin()))
    assert pair.margin == pytest.approx(rates.max() - rates.min(), abs=1e-15)
    assert pair.probability == wins[pair.chosen, pair.rejected]
    both = group([0.0] * 6, wins=wins)
    with pytest.raises(ConfigError, match="write `by: reward` or `by: wins`"):
        run(both, rule="best_worst")
    assert run(both, rule="best_worst", by="wins").pairs == (pair,)
    assert chosen(both, rule="best_worst", by="reward") == ([], "tie")
    assert chosen(group([1.0, 2.0]), rule="best_worst", by="wins") == ([], "missing"), "nobody compared"


def test_options_that_a_rule_does_not_read_are_refused_with_the_rule_that_does():
    names = {name for name, *_ in declared(PairSpec)}
    for rule in (*RULES, "by_origin", "top", "top_share"):
        assert set(unused(rule)) <= names - {"rule"}
    assert "margin" not in unused("margin") and "share" in unused("margin") and "seed" in unused("all")
    given = {"margin": "r.yaml:7", "rule": "r.yaml:6", "seed": "r.yaml:8"}
    found = [str(error) for error in faults(PairSpec(rule="best_worst", margin=1.0, seed=1), given)]
    assert len(found) == 2 and "r.yaml:7: `pairs.margin` is unused" in found[0] and "`rule: margin`" in found[0]
    assert not list(faults(PairSpec(rule="best_worst", seed=1, label="sampled", scale=1.0), {"seed": "r.yaml:8"}))
    assert "are both" in str(*faults(PairSpec(rule="by_origin", chosen_from="policy"), {}))
    assert "`by: wins` has probabilities" in str(*faults(PairSpec(rule="all", by="wins", scale=1.0), {}))
    for wrong in ({"share": 0.0}, {"margin": -1.0}, {"scale": 0.0}, {"rule": "best"}, {"label": "soft"}):
        with pytest.raises(ConfigError):
            PairSpec(**{"rule": "all", **wrong})
