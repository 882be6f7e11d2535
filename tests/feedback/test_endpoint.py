"""Judges over HTTP against a real server that fails, hangs, answers nonsense and dies."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.feedback import FeedbackSpec, apply, open_feedback
from align.feedback.endpoint import DOWN, Endpoint
from align.feedback.judge_endpoint import labels_of
from tests.feedback.made import group
from tests.feedback.server import chat, chat_logprobs, serving

QUICK = {"deadline": 0.5, "retries": 1}


def judging(url, file="points", **options):
    options = {"model": "judge", **QUICK, **options}
    return open_feedback(FeedbackSpec(kind="judge", name="judge", file=file, url=url, **options))


def scores(url, groups, seed=0, **options):
    judged, account = apply([judging(url, **options)], groups, seed)
    return [[answer.rewards["judge"] for answer in one.answers] for one in judged], account


def shown(body):
    """The answer that a question of `points` shows."""
    return body["messages"][-1]["content"].split("Answer:\n")[1].split("\n\nSay in")[0]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Short pauses between tries."""
    original = Endpoint.__init__

    def quick(self, **given):
        original(self, **{"backoff": 0.01, "longest_wait": 1.5, **given})

    monkeypatch.setattr(Endpoint, "__init__", quick)


def test_replies_are_asked_for_as_the_file_says_and_averaged():
    with serving(lambda body, _: chat("Score: 4", "it is fine. Score: 3", "Score: 5")) as server:
        found, account = scores(server.url, [group("one", "two")])
    assert found == [[4, 4]] and account.counts["judge"].judged == 2
    assert server.paths == ["/v1/chat/completions"] * 2
    body = next(body for body in server.bodies if shown(body) == "one")
    assert (body["model"], body["n"], body["temperature"], body["top_p"]) == ("judge", 3, 0.7, 0.9)
    assert "say it" in body["messages"][0]["content"] and body["messages"][0]["role"] == "user"
    seeds = {shown(body): body["seed"] for body in server.bodies}
    assert len(set(seeds.values())) == 2 and all(0 <= seed < 2**31 for seed in seeds.values())
    with serving(lambda body, _: chat("Score: 4")) as server:
        scores(server.url, [group("two", row=5)])
        scores(server.url, [group("two", row=5)], seed=1)
    assert server.bodies[0]["seed"] == seeds["two"] != server.bodies[1]["seed"]


def test_what_cannot_be_read_or_is_out_of_range_is_missing_not_zero_and_not_clamped():
    said = {"a": ["no idea"], "b": ["Score: 7"], "c": ["Score: -1"], "d": ["rubbish", "Score: 2"], "e": [""]}
    with serving(lambda body, _: chat(*said[shown(body)])) as server:
        found, account = scores(server.url, [group(*said)])
    assert np.isnan(found[0]).tolist() == [True, True, True, False, True] and found[0][3] == 2
    assert account.counts["judge"].missing == {
        "the judge's reply cannot be read": 3,
        "a number outside 0 to 5": 1,
    }


def test_the_last_score_of_a_reply_counts():
    with serving(lambda body, _: chat("If it were longer, Score: 5. As it is:\nScore: 2")) as server:
        assert scores(server.url, [group("a")])[0] == [[2]]


NONSENSE = {
    "no choices": {"choices": []},
    "no content": {"choices": [{"message": {"content": None}}]},
    "another form": {"answer": 4},
    "a list": [1, 2],
    "no JSON": (200, "<html>gateway</html>"),
    "refused": (400, "context too long"),
    "hang": "hang",
    "drip": "drip",
    "die": "die",
    "down": (503, "overloaded"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_server_that_fails_on_one_row_costs_that_row_alone(kind):
    def answer(body, number):
        return NONSENSE[kind] if shown(body) == "bad" else chat("Score: 3")

    started = time.monotonic()
    with serving(answer) as server:
        found, account = scores(server.url, [group("a", "bad", "c", row=1), group("d", row=2)])
    assert found[0][0] == found[0][2] == 3 and math.isnan(found[0][1]) and found[1] == [3]
    assert account.counts["judge"].judged == 3
    (reason,) = account.counts["judge"].missing
    assert (reason == "the server did not answer before the deadline") == (kind in ("hang", "drip"))
    assert time.monotonic() - started < 15
    tries = sum(shown(body) == "bad" for body in server.bodies)
    again = kind in ("a list", "no JSON", "hang", "drip", "die", "down")
    assert tries == (2 if again else 1)


def test_a_request_that_may_succeed_later_is_sent_again_and_the_server_is_listened_to():
    failures = {0: (429, "slow down", {"Retry-After": "1.2"}), 1: (500, "oops"), 2: "die"}
    times = []

    def answer(body, number):
        times.append(time.monotonic())
        return failures.get(number, chat("Score: 1"))

    with serving(answer) as server:
        found, account = scores(server.url, [group("a")], retries=3)
    assert found == [[1]] and len(server.bodies) == 4 and times[1] - times[0] > 1.2
    assert account.counts["judge"].missing == {}


def test_a_server_that_is_gone_is_not_waited_for_row_by_row(caplog):
    with serving(lambda body, _: chat("Score: 1")) as server:
        url = server.url
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        found, account = scores(url, [group(*(f"answer {n}" for n in range(200)))], concurrency=1)
    assert np.isnan(found[0]).all() and time.monotonic() - started < 5
    missing = account.counts["judge"].missing
    assert missing[f"not asked: the server failed {3 * DOWN} times in a row"] == 200 - 3 * DOWN
    assert "given up" in caplog.text and "gave nothing" in caplog.text


def test_a_server_that_comes_back_is_asked_on():
    def answer(body, number):
        return (503, "busy") if number < 2 * DOWN + 1 else chat("Score: 2")

    with serving(answer) as server:
        found, _ = scores(server.url, [group(*(f"answer {n}" for n in range(20)))], concurrency=1)
    # DOWN requests with two tries each, then one try.
    assert np.isnan(found[0]).sum() == DOWN + 1 and not np.isnan(found[0][DOWN + 1 :]).any()


def test_rows_that_fail_among_others_do_not_add_up_to_a_server_that_is_gone():
    texts = [f"{kind} {n}" for n in range(3 * DOWN + 2) for kind in ("bad", "good")]

    def answer(body, _):
        return (503, "no") if shown(body).startswith("bad") else chat("Score: 2")

    with serving(answer) as server:
        found, account = scores(server.url, [group(*texts)], concurrency=1)
    assert [not math.isnan(value) for value in found[0]] == [text.startswith("good") for text in texts]
    assert account.counts["judge"].missing == {"the server answered 503": 3 * DOWN + 2}


@pytest.mark.parametrize(("status", "said"), [(401, "key_env"), (404, "check `url` and `model`")])
def test_a_server_that_refuses_everything_stops_the_run(status, said):
    with serving(lambda body, _: (status, "who are you")) as server, pytest.raises(ConfigError) as caught:
        scores(server.url, [group("a")])
    assert said in str(caught.value) and "who are you" in str(caught.value) and len(server.bodies) == 1


def test_no_more_requests_at_once_than_allowed():
    def slow(body, _):
        time.sleep(0.05)
        return chat("Score: 1")

    with serving(slow) as server:
        scores(server.url, [group(*(f"answer {n}" for n in range(12)))], concurrency=3, deadline=5.0)
    assert server.most == 3 and len(server.bodies) == 12


def test_the_key_is_sent_and_appears_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with caplog.at_level(logging.DEBUG), serving(lambda body, n: (400, "bad key sk-very-secret")) as server:
        feedback = judging(server.url, key_env="JUDGE_KEY")
        _, account = apply([feedback], [group("a")], 0)
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in caplog.text + str(account) + str(feedback.key) + repr(feedback)
    assert "bad key ***" in caplog.text
    with pytest.raises(ConfigError, match="`NO_SUCH_KEY` is not set"):
        judging(server.url, key_env="NO_SUCH_KEY")
    for url in ("127.0.0.1:8000", "ftp://host/v1", "http://me:secret@host/v1"):
        with pytest.raises(ConfigError) as caught:
            judging(url)
        assert "secret" not in caught.value.what


def test_labels_are_read_from_the_likeliest_tokens_in_both_orders():
    def answer(body, _):
        text = body["messages"][-1]["content"]
        first = text.split("Answer A:\n")[1].split("\n\nAnswer B")[0]
        return chat_logprobs(A=math.log(0.6), B=math.log(0.2)) if first == "a" else chat_logprobs(A=-1.0, B=-1.0)

    with serving(answer) as server:
        judged, account = apply([judging(server.url, "pairwise")], [group("a", "b")], 0)
    # Renormalised over the labels: 3/4 as first, 1/2 as second.
    assert judged[0].wins[0, 1] == pytest.approx((0.75 + 0.5) / 2)
    assert account.means["judge/first_position"] == pytest.approx((0.75 + 0.5) / 2)
    assert all(body["logprobs"] is True and body["top_logprobs"] == 20 for body in server.bodies)
    assert all(body["max_tokens"] == 1 for body in server.bodies)


def test_a_judge_who_always_says_the_first_gives_a_half():
    with serving(lambda body, _: chat_logprobs(A=0.0, B=-40.0)) as server:
        judged, account = apply([judging(server.url, "pairwise")], [group("a", "b", "c")], 0)
    assert judged[0].wins == pytest.approx(0.5) and account.means["judge/first_position"] == pytest.approx(1)


def test_plain_completions_take_the_same_way():
    def answer(body, _):
        if "logprobs" in body:
            return {"choices": [{"text": "A", "logprobs": {"top_logprobs": [{"A": -0.5, "B": -1.5, "x": -3.0}]}}]}
        return {"choices": [{"text": "Better: B"}]}

    with serving(answer) as server:
        one = apply([judging(server.url, "pairwise", api="completions", swap=False)], [group("a", "b")], 0)[0]
        two = apply([judging(server.url, "pairwise_reasons", api="completions", swap=False)], [group("a", "b")], 0)[0]
    assert one[0].wins[0, 1] == pytest.approx(1 / (1 + math.exp(-1))) and two[0].wins[0, 1] == 0
    assert server.paths == ["/v1/completions"] * 2 and "Answer A:\na" in server.bodies[0]["prompt"]


def test_a_label_that_was_not_told_counts_as_nothing_only_where_it_could_hold_nothing():
    near = {"A": -0.01, "x": -12.0}
    assert labels_of(near, ["A", "B"]) == [-0.01, -math.inf]
    assert labels_of({"A": -1.0, "x": -2.0}, ["A", "B"]).reason == "a label is not among the judge's likeliest tokens"
    assert "none of the labels" in labels_of({"x": -0.1, " A": -3.0}, ["A", "B"]).reason
    assert labels_of({"A": -1.0, "B": -2.0, "x": -0.7}, ["A", "B"]) == [-1.0, -2.0]


def test_a_paid_reply_is_never_bought_twice(tmp_path):
    cache = str(tmp_path)
    groups = [group("a", "bad", "c")]
    with serving(lambda body, _: (400, "no") if shown(body) == "bad" else chat("Score: 3")) as server:
        scores(server.url, groups, cache=cache)
        assert len(server.bodies) == 3
        found, account = scores(server.url, groups, cache=cache)
        assert [shown(body) for body in server.bodies[3:]] == ["bad"]
        assert found[0][0] == found[0][2] == 3 and account.counts["judge"].judged == 2
        # Sampled replies of another seed are others.
        scores(server.url, groups, seed=1, cache=cache)
        assert len(server.bodies) == 7


def test_replies_are_kept_as_they_come(tmp_path):
    """What was paid for before a crash is there after it."""

    def answer(body, number):
        if shown(body) == "last":
            raise SystemExit
        return chat("Score: 3")

    class Crash(Exception):
        pass

    def progress(done):
        progress.done += done
        if progress.done == 3:
            raise Crash

    progress.done = 0
    with serving(answer) as server:
        feedback = judging(server.url, cache=str(tmp_path), concurrency=1)
        with pytest.raises(Crash):
            feedback.judge([group("a", "b", "c", "last")], 0, progress)
        count = len(server.bodies)
        scores(server.url, [group("a", "b", "c")], cache=str(tmp_path))
        assert len(server.bodies) == count


def test_another_way_to_read_a_reply_costs_nothing(tmp_path):
    text = "about: x\nmode: pointwise\nread: regex\nprompt: 'Request {{ prompt }}\n\n  Answer:\n\n  {{ answer }}'\n"
    for name, pattern in (("one", "is ([0-9])"), ("two", "or ([0-9])")):
        (tmp_path / f"{name}.yaml").write_text(text + f"pattern: '{pattern}'\n")
    with serving(lambda body, _: chat("it is 4 or 5")) as server:
        one = scores(server.url, [group("a")], file=str(tmp_path / "one.yaml"), cache=str(tmp_path / "cache"))[0]
        two = scores(server.url, [group("a")], file=str(tmp_path / "two.yaml"), cache=str(tmp_path / "cache"))[0]
    assert (one, two) == ([[4]], [[5]]) and len(server.bodies) == 1
