"""Reward and preference functions of users: TRL's signature, and what each way to fail costs."""

from __future__ import annotations

import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.feedback import FeedbackSpec, apply, open_feedback
from align.feedback.cache import JudgementCache
from align.feedback.calling import each, in_thread
from align.feedback.functions import reward_function
from align.feedback.scored import Scored
from align.worlds.base import as_user
from align.worlds.style import Style
from align.worlds.twist import Twist
from tests.feedback.made import group

MODULE = """
import asyncio, os, sys, time
import numpy
seen, calls = [], []

def full(prompts, completions, completion_ids, **columns):
    seen.append((prompts, completions, completion_ids, columns))
    return [float(len(ids)) for ids in completion_ids]

def narrow(completions, answer):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

async def later(completions, **columns):
    await asyncio.sleep(0.01)
    return [numpy.float32(len(text)) for text in completions]

def logs(completions, log_extra, log_metric):
    log_extra("upper", [text.upper() for text in completions])
    log_metric("letters", sum(map(len, completions)))
    return [0.0] * len(completions)

def misaligned(completions, log_extra):
    log_extra("one", [1])
    return [0.0] * len(completions)

def odd(completions, **columns):
    calls.append(len(completions))
    values = {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "4", "list": [1]}
    return [values.get(text, 1.0) for text in completions]

def acting(completions, **columns):
    calls.append(len(completions))
    for text in completions:
        if text == "raise":
            raise ValueError("a bad row")
        if text == "exit":
            sys.exit(3)
        if text == "die":
            os._exit(3)
        if text == "hang":
            time.sleep(60)
        if text == "print":
            print("noise on stdout", flush=True)
    return [float(len(text)) for text in completions]

def short(completions, **columns):
    return [1.0]

def prefer(prompts, first, second, **columns):
    seen.append((prompts, first, second, columns))
    texts = [(a if isinstance(a, str) else a[0]["content"], b if isinstance(b, str) else b[0]["content"])
             for a, b in zip(first, second)]
    return [None if "none" in pair else 1.7 if "more" in pair else float(len(pair[0]) > len(pair[1])) for pair in texts]
"""
CHAT = ({"role": "user", "content": "say it"},)


@pytest.fixture
def module(tmp_path, monkeypatch):
    import sys

    (tmp_path / "user_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("user_rewards", None)
    import user_rewards

    return user_rewards


def judged(name, groups, **options):
    feedback = open_feedback(FeedbackSpec(name=f"user_rewards:{name}", **options))
    done = []
    out, account = apply([feedback], groups, 0, done.append)
    assert sum(done) == account.counts[feedback.name].asked  # whatever became of them
    if options.get("isolate"):
        feedback.scorer.close()
    return [[answer.rewards[f"user_rewards:{name}"] for answer in one.answers] for one in out], account


def test_the_signature_is_trls(module):
    groups = [group("a", "bb", ids=[[5], [5, 6]], topic="x"), group("c", prompt=CHAT, ids=[[7, 8, 9]], level=3)]
    found, _ = judged("full", groups)
    assert found == [[1, 2], [3]]
    prompts, completions, ids, columns = module.seen[-1]
    assert prompts == ["say it", "say it", [{"role": "user", "content": "say it"}]]
    assert completions == ["a", "bb", [{"role": "assistant", "content": "c"}]]
    assert ids == [[5], [5, 6], [7, 8, 9]] and type(ids[0][0]) is int
    assert columns["topic"] == ["x", "x", None] and columns["level"] == [None, None, 3]


def test_functions_that_name_columns_and_asynchronous_ones(module):
    assert judged("narrow", [group("a", "b", answer="b")])[0] == [[0, 1]]
    assert judged("later", [group("a", "bbb")])[0] == [[1, 3]]
    with pytest.raises(ConfigError, match=r"`answer`.*neither given"):
        judged("narrow", [group("a", answers="b")])


def test_an_asynchronous_function_within_a_running_loop(module):
    import asyncio

    async def notebook():
        return judged("later", [group("a", "bbb")])[0]

    # In a thread of its own: the one that runs the tests may have a loop already.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, notebook()).result() == [[1, 3]]


def test_what_a_function_logs_reaches_the_account(module):
    for isolate in (None, True):
        groups = [group("a", "bb", row=1), group("ccc", row=2)]
        _, account = judged("logs", groups, isolate=isolate)
        assert account.means == {"user_rewards:logs/letters": 6.0}
        values = [("rows.jsonl row 1", ["A", "BB"]), ("rows.jsonl row 2", ["CCC"])]
        assert account.extras == {"user_rewards:logs/upper": values}
    with pytest.raises(ConfigError, match="1 values of `one` for 2 completions"):
        judged("misaligned", [group("a", "b")])


def test_what_is_no_number_is_missing_by_reason_and_a_wrong_length_is_an_error(module):
    found, account = judged("odd", [group("none", "nan", "inf", "text", "list", "good")])
    assert np.isnan(found[0]).tolist() == [True] * 5 + [False] and found[0][5] == 1
    assert account.counts["user_rewards:odd"].missing == {
        "no number given": 2,
        "an infinite number": 1,
        "a text in place of a number": 1,
        "a list in place of a number": 1,
    }
    with pytest.raises(ConfigError, match=r"user_rewards:short.*one number per completion") as caught:
        judged("short", [group("a", "b")])
    assert "1 rewards for 2 completions" in str(caught.value)


@pytest.mark.parametrize("act", ["raise", "exit"])
def test_a_row_that_raises_costs_itself_alone(module, act):
    groups = [group("a", act, "ccc", row=1), *(group("dd", "e", row=row) for row in range(2, 20))]
    found, account = judged("acting", groups)
    assert found[0][0] == 1 and math.isnan(found[0][1]) and found[0][2] == 3
    assert found[1:] == [[2, 1]] * 18
    reason = {"raise": "raised ValueError", "exit": "raised SystemExit"}[act]
    assert account.counts["user_rewards:acting"].missing == {reason: 1}
    # Halving: not a call a row.
    assert len(module.calls) <= 2 * math.ceil(math.log2(39)) + 1


def test_a_row_that_hangs_costs_itself_alone(module):
    started = time.monotonic()
    found, account = judged("acting", [group("a", "hang", "ccc")], deadline=0.3)
    assert found[0][0] == 1 and math.isnan(found[0][1]) and found[0][2] == 3 and time.monotonic() - started < 10
    assert account.counts["user_rewards:acting"].missing == {"no answer before the deadline": 1}


def test_a_function_that_hangs_on_everything_is_not_waited_for_each_time(module):
    started = time.monotonic()
    _, account = judged("acting", [group(*["hang"] * 40)], deadline=0.2)
    missing = account.counts["user_rewards:acting"].missing
    assert sum(missing.values()) == 40 and time.monotonic() - started < 10
    assert missing["not tried: 3 in a row had failed"] >= 30


def test_a_row_that_hangs_first_of_many_costs_itself_alone(module):
    found, account = judged("acting", [group("hang", *["good"] * 63)], deadline=0.2)
    assert account.counts["user_rewards:acting"].missing == {"no answer before the deadline": 1}
    assert math.isnan(found[0][0]) and found[0][1:] == [4] * 63


def test_a_function_that_dies_or_hangs_in_a_process_of_its_own(module, capfd):
    groups = [group("a", "die", "ccc", row=1), group("hang", "raise", "print", row=2)]
    # The deadline holds for calls, not for the start of the process.
    found, account = judged("acting", groups, isolate=True, deadline=2.0, batch=3)
    assert found[0][0] == 1 and math.isnan(found[0][1]) and found[0][2] == 3
    assert np.isnan(found[1]).tolist() == [True, True, False] and found[1][2] == 5
    assert account.counts["user_rewards:acting"].missing == {
        "its process died": 1,
        "no answer before the deadline": 1,
        "raised ValueError": 1,
    }
    assert "noise on stdout" in capfd.readouterr().err


def test_the_process_of_an_isolated_function_is_ended(module):
    scorer = reward_function("user_rewards:acting", isolate=True)
    apply([Scored("one", scorer)], [group("a")], 0)
    pid = scorer._worker[0]._process.pid
    os.kill(pid, signal.SIGCONT)  # it is there
    scorer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_preference_functions(module):
    groups = [group("a", "bbb", "none", "more", row=1, topic=4), group("cc", "d", row=2, prompt=CHAT)]
    spec = FeedbackSpec(kind="pairwise_function", name="user_rewards:prefer")
    out, account = apply([open_feedback(spec)], groups, 0)
    assert out[0].wins[:2, :2].tolist() == [[0.5, 0.0], [1.0, 0.5]] and out[1].wins[0, 1] == 1
    assert np.isnan(out[0].wins[2:, :2]).all()
    counts = account.counts["user_rewards:prefer"]
    assert counts.missing == {"no number given": 3, "a number outside 0 to 1": 2} and counts.asked == 7
    prompts, first, second, columns = module.seen[-1]
    assert prompts[0] == "say it" and first[-1] == [{"role": "assistant", "content": "cc"}]
    assert second[-1][0]["content"] == "d" and columns["topic"] == [4] * 6 + [None]


def test_a_worlds_gold_reward_and_gold_preference_take_the_same_way():
    world = Style()
    prompts = world.prompts(3)
    rng = np.random.default_rng(0)
    groups = [
        group(*(world.demonstrate(prompt, rng) for _ in range(3)), row=row, prompt=as_user(prompt))
        for row, prompt in enumerate(prompts)
    ]
    out, _ = apply([open_feedback(FeedbackSpec(name=world.reward_name))], groups, 0)
    for prompt, one in zip(prompts, out, strict=True):
        expected = [world.reward(prompt, answer.text) for answer in one.answers]
        assert one.rewards().tolist() == expected

    twist = Twist()
    (prompt,) = twist.prompts(1)
    answers = [twist.demonstrate(prompt, rng) for _ in range(6)]
    spec = FeedbackSpec(kind="pairwise_function", name=twist.preference_name)
    out, _ = apply([open_feedback(spec)], [group(*answers, prompt=as_user(prompt))], 0)
    for i in range(6):
        for j in range(6):
            expected = 0.5 if answers[i] == answers[j] else twist.win_probability(prompt, answers[i], answers[j])
            assert out[0].wins[i, j] == pytest.approx(expected, abs=1e-12)


def test_another_version_of_the_function_is_another_judge(module, tmp_path):
    one, other = reward_function("user_rewards:acting"), reward_function("user_rewards:full")
    assert one.key["source"] == other.key["source"] != "" and one.key != other.key
    cache = JudgementCache(tmp_path / "cache")
    apply([Scored("one", one, cache)], [group("a", topic=1)], 0)
    apply([Scored("one", one, cache)], [group("a", topic=1)], 0)
    assert module.calls == [1]
    apply([Scored("one", one, cache)], [group("a", topic=2)], 0)  # a column may decide
    assert module.calls == [1, 1]


def test_batches_are_halved_and_order_is_kept():
    def work(part):
        if 13 in part:
            raise ValueError
        return [value * 2 for value in part]

    found = each(work, list(range(40)), 16, "test")
    assert [value for value in found if isinstance(value, int)] == [2 * n for n in range(40) if n != 13]
    assert found[13].reason == "raised ValueError"
    with pytest.raises(ConfigError):
        each(lambda part: in_thread(lambda: (_ for _ in ()).throw(ConfigError("no")), None), [1], 1, "test")
