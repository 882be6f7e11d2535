"""Feedback out of scorers and comparers: what is asked, what is kept, and what a failure costs."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest

from align.core.errors import CheckpointError, ConfigError, FeedbackError
from align.data.comparisons import tournament
from align.feedback import Account, Verdict, apply
from align.feedback.base import Failed
from align.feedback.cache import JudgementCache
from align.feedback.pairwise import FromRewards
from align.feedback.scored import Compared, Scored
from tests.feedback.made import Lengths, Longer, group

GROUPS = [group("a", "bbb", "fail", row=1), group("cc", row=2), group(row=3), group("d", "ee", "fff", "gggg", row=4)]


def rewards(groups, name="lengths"):
    return [[answer.rewards[name] for answer in one.answers] for one in groups]


def test_a_failed_judgement_is_missing_and_said_to_be():
    judged, account = apply([Scored("lengths", Lengths())], GROUPS, 0)
    assert rewards(judged)[1:] == [[2], [], [1, 2, 3, 4]]
    assert rewards(judged)[0][:2] == [1, 3] and math.isnan(rewards(judged)[0][2])
    assert str(account) == "`lengths`: 7 of 8 answers have a reward, 1 are missing (1: no)."
    assert np.isnan(judged[0].rewards()).tolist() == [False, False, True]
    assert rewards([judged[0]])[0][2] != 0


def test_rewards_of_several_stand_beside_each_other_and_what_was_there_stays():
    judged, _ = apply([Scored("one", Lengths())], GROUPS, 0)
    judged, account = apply([Scored("two", Lengths()), Scored("three", Lengths())], judged, 0)
    assert set(judged[3].answers[0].rewards) == {"one", "two", "three"} and set(account.counts) == {"two", "three"}
    with pytest.raises(ConfigError, match="two feedbacks are named `one`"):
        apply([Scored("one", Lengths()), Scored("one", Lengths())], GROUPS, 0)


class Wild:
    """A user's own feedback: does to each group what `acts` say."""

    name = "wild"

    def __init__(self, *acts, gives="reward"):
        self.acts, self.gives, self.key = acts, gives, {}

    def judge(self, groups, seed, progress=None):
        return [self.acts[one.row.row % len(self.acts)](one) for one in groups]


def good(one):
    return Verdict([1.0] * len(one), None, (), len(one))


def boom(one):
    raise RuntimeError("no")


def stopped(one):
    raise FeedbackError("the judge is away")


def test_a_feedback_that_raises_costs_only_its_own_groups(caplog):
    groups = [group("a", "b", row=n) for n in range(6)]
    judged, account = apply([Wild(good, boom, stopped)], groups, 0)
    assert [np.isnan(r).all() for r in rewards(judged, "wild")] == [False, True, True] * 2
    assert rewards(judged, "wild")[::3] == [[1, 1], [1, 1]]
    missing = dict(account.counts["wild"].missing)
    assert missing == {"raised RuntimeError": 4, "raised FeedbackError: the judge is away": 4}
    with caplog.at_level(logging.WARNING):
        _, account = apply([Wild(boom)], groups[:1], 0)
    assert account.silent == ["wild"] and "gave nothing" in caplog.text


def test_nonsense_is_refused_by_name_or_missing():
    one = [group("a", "b", row=0)]
    for verdict in (Verdict([1.0]), Verdict(None), Verdict([1.0, 2.0, 3.0])):
        with pytest.raises(ConfigError, match="`wild` breaks its contract"):
            apply([Wild(lambda _, verdict=verdict: verdict)], one, 0)
    judged, account = apply([Wild(lambda _: Verdict([math.inf, 2.0], None, (), 2))], one, 0)
    assert math.isnan(rewards(judged, "wild")[0][0]) and account.counts["wild"].judged == 1
    for wins in (np.array([[0.5, 1.2], [-0.2, 0.5]]), np.array([[0.5, 0.9], [0.9, 0.5]]), np.zeros((3, 3))):
        with pytest.raises(ConfigError, match="`wild` breaks its contract"):
            apply([Wild(lambda _, wins=wins: Verdict(None, wins), gives="preference")], one, 0)

    class Short(Wild):
        def judge(self, groups, seed, progress=None):
            return []

    with pytest.raises(ConfigError, match="0 verdicts for 1 groups"):
        apply([Short()], one, 0)


def test_accounts_of_chunks_add_up():
    whole = apply([Scored("lengths", Lengths())], GROUPS, 0)[1]
    parts = [apply([Scored("lengths", Lengths())], [one], 0)[1] for one in GROUPS]
    assert sum(parts, Account()).counts == whole.counts


def matrix(one, bias=0.0, swap=True):
    """P of every pair by a loop: the mean of both orders."""
    judge, count = Longer(bias), len(one)
    wins = np.full((count, count), 0.5)
    for i, j in itertools.permutations(range(count), 2):
        first, second = one.answers[i].text, one.answers[j].text
        if first != second and swap:
            wins[i, j] = (judge.p(first, second) + 1 - judge.p(second, first)) / 2
        elif first != second and i < j:
            wins[i, j] = judge.p(first, second)
            wins[j, i] = 1 - wins[i, j]
    return wins


@pytest.mark.parametrize("swap", [True, False])
def test_every_pair_in_both_orders(swap):
    judge = Longer(bias=0.1)
    one = group("d", "ee", "ee", "gggg")
    judged, account = apply([Compared("longer", judge, swap=swap)], [one], 0)
    np.testing.assert_allclose(judged[0].wins, matrix(one, 0.1, swap), atol=1e-12)
    assert account.counts["longer"].asked == 6 and account.counts["longer"].judged == 6
    # Answers of one text are tied without being asked about.
    assert len(judge.asked) == (10 if swap else 5) and ("ee", "ee") not in judge.asked
    assert ("longer/first_position" in account.means) == swap


def test_a_judge_who_always_says_the_first_says_nothing():
    judged, account = apply([Compared("first", Longer(bias=1.0))], [group("d", "ee", "fff")], 0)
    assert (judged[0].wins == 0.5).all() and account.means == {"first/first_position": 1.0}


def test_a_pair_of_which_one_order_failed_is_missing_and_no_other():
    one = group("d", "fail", "fff", row=1)
    judged, account = apply([Compared("longer", Longer())], [one, GROUPS[3]], 0)
    assert np.isnan(judged[0].wins).tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    np.testing.assert_allclose(judged[1].wins, matrix(GROUPS[3]))
    assert account.counts["longer"].missing == {"no": 2} and account.counts["longer"].asked == 9


def test_one_order_alone_is_no_judgement():
    class HalfDeaf(Longer):
        def compare(self, matches, seed, progress=None):
            return [Failed("no") if m.texts[0] == "ee" else self.p(*m.texts) for m in matches]

    judged, account = apply([Compared("half", HalfDeaf())], [group("d", "ee", "fff")], 0)
    assert np.isnan(judged[0].wins).tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert account.counts["half"].missing == {"no": 2}


def test_fewer_opponents_ask_for_fewer_comparisons():
    one = group(*("x" * n for n in range(1, 9)), row=7)
    asked = {}
    for opponents in ("all", "first", "random", "tournament"):
        judge = Longer()
        feedback = Compared("longer", judge, swap=False, opponents=opponents, rivals=2)
        wins = apply([feedback], [one], 5)[0][0].wins
        asked[opponents] = len(judge.asked)
        there = ~np.isnan(wins)
        np.testing.assert_allclose(wins[there], matrix(one, swap=False)[there])
        if opponents == "random":
            assert (there.sum(axis=1) >= 3).all()
            again = apply([Compared("longer", Longer(), swap=False, opponents=opponents, rivals=2)], [one], 5)
            np.testing.assert_array_equal(again[0][0].wins, wins)
        if opponents == "tournament":
            played = tournament(wins)
            assert (played.winner, played.loser) == (7, 0) and set(played.compared) <= set(
                map(tuple, np.argwhere(there).tolist())
            )
    assert asked["all"] == 28 and asked["first"] == 7 and asked["tournament"] == 11 and 8 <= asked["random"] <= 16


def test_tournaments_of_several_groups_are_played_round_by_round():
    class Counted(Longer):
        calls = 0

        def compare(self, matches, seed, progress=None):
            self.calls += 1
            return super().compare(matches, seed)

    judge = Counted()
    groups = [group(*("x" * ((n * step) % 9 + 1) for n in range(8)), row=step) for step in (1, 2, 4)]
    judged, _ = apply([Compared("longer", judge, swap=False, opponents="tournament")], groups, 0)
    assert judge.calls == 4 and len(judge.asked) <= 33
    for one in judged:
        assert tournament(one.wins).winner == np.argmax([len(answer.text) for answer in one.answers])


def test_preferences_out_of_rewards():
    one = group("d", "ee", "ff", "fail", row=3)
    for rule, scale in (("sigmoid", 0.7), ("hard", 1.0)):
        feedback = FromRewards(Scored("lengths", Lengths()), rule, scale)
        judged, account = apply([feedback], [one], 0)
        for i, j in itertools.product(range(3), range(3)):
            gap = len(one.answers[i].text) - len(one.answers[j].text)
            expected = 1 / (1 + math.exp(-scale * gap)) if rule == "sigmoid" else [0.5, 1.0, 0.0][gap]
            assert judged[0].wins[i, j] == pytest.approx(expected, abs=1e-12)
        assert np.isnan(judged[0].wins[3, :3]).all() and judged[0].wins[3, 3] == 0.5
        assert account.counts["lengths"].missing == {"a reward is missing (no)": 3}
    with pytest.raises(ConfigError, match="scale"):
        FromRewards(Scored("lengths", Lengths()), "sigmoid", 0.0)
    with pytest.raises(ConfigError, match="preferences already"):
        FromRewards(Compared("longer", Longer()))


def test_two_who_compare_are_averaged_and_a_gap_of_one_is_a_gap():
    class Sure(Longer):
        def compare(self, matches, seed, progress=None):
            return [self.p(*match.texts) for match in matches]

    one = group("d", "ee", "fail", row=1)
    hard = FromRewards(Scored("hard", Lengths()), "hard")
    judged, _ = apply([Compared("longer", Sure()), hard], [one], 0)
    assert judged[0].wins[1, 0] == pytest.approx((1 / (1 + math.exp(-1)) + 1) / 2)
    assert np.isnan(judged[0].wins[0, 2])


def test_what_is_remembered_is_not_asked_again_and_what_failed_is(tmp_path):
    judge = Lengths()
    first, _ = apply([Scored("lengths", judge, JudgementCache(tmp_path))], GROUPS, 0)
    assert len(judge.asked) == 8
    again, account = apply([Scored("lengths", judge, JudgementCache(tmp_path))], GROUPS, 1)
    assert judge.asked[8:] == ["fail"] and account.counts["lengths"].missing == {"no": 1}
    np.testing.assert_equal(rewards(again), rewards(first))
    # Another prompt is another question.
    other = group("a", "bbb", row=9, prompt=({"role": "user", "content": "say it"},))
    apply([Scored("lengths", judge, JudgementCache(tmp_path))], [other], 0)
    assert judge.asked[9:] == ["a", "bbb"]
    # Where the seed matters, another seed is another question.
    drawing = Lengths(draws=True)
    for seed in (0, 0, 1):
        apply([Scored("lengths", drawing, JudgementCache(tmp_path))], [GROUPS[3]], seed)
    assert len(drawing.asked) == 8


def test_comparisons_are_remembered_by_order(tmp_path):
    judge = Longer(bias=0.1)
    first, _ = apply([Compared("longer", judge, cache=JudgementCache(tmp_path))], [GROUPS[3]], 0)
    count = len(judge.asked)
    again, _ = apply([Compared("longer", judge, cache=JudgementCache(tmp_path))], [GROUPS[3]], 0)
    assert len(judge.asked) == count == 12
    np.testing.assert_array_equal(again[0].wins, first[0].wins)
    np.testing.assert_allclose(again[0].wins, matrix(GROUPS[3], 0.1))


def test_a_torn_line_is_dropped_with_a_word_and_the_rest_stands(tmp_path, caplog):
    cache = JudgementCache(tmp_path)
    for number in range(3):
        cache.put(f"key {number}", [number, "text \n of two lines", None])
    cache.close()
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    for cut in (1, 7, len(whole.splitlines(keepends=True)[-1]) - 1):
        file.write_bytes(whole[:-cut])
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = JudgementCache(tmp_path)
        # Without its newline alone a line is whole.
        assert len(found) == (3 if cut == 1 else 2) and (cut == 1 or "damaged" in caplog.text)
        assert found.get("key 1") == [1, "text \n of two lines", None]
    damaged = bytearray(whole)
    damaged[40] ^= 1
    file.write_bytes(bytes(damaged))
    found = JudgementCache(tmp_path)
    assert len(found) == 2 and found.dropped == 1 and found.get("key 2") is not None
    found.put("key 0", "again")
    found.close()
    assert JudgementCache(tmp_path).get("key 0") == "again" and len(list(tmp_path.glob("*.jsonl"))) == 2


def test_a_cache_that_cannot_be_written_stops_the_run(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        JudgementCache(blocked / "folder").put("a", 1)
