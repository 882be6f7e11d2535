"""Judges as files, and judges over a sampler of this package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError, SamplerError
from align.feedback import FeedbackContext, FeedbackSpec, apply, open_feedback
from align.feedback.base import Failed
from align.feedback.cache import JudgementCache
from align.feedback.judge import PairJudge, PointJudge, expected
from align.feedback.judge_file import FOLDER, JudgeFile, load_judge
from align.feedback.judge_local import SamplerJudge, label_tokens
from align.feedback.scored import Compared, Scored
from align.sampling import SamplingParams
from align.sampling.hf import HFSampler
from align.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.feedback.made import group

TOKENIZER = tiny_tokenizer()
SHORT = {"prompt": "{{ prompt }} | {{ first }} | {{ second }} ?"}
POINT = {"prompt": "{{ prompt }} | {{ answer }} ?", "mode": "pointwise"}
CHAT = ({"role": "user", "content": "say it"},)


def judge(family="llama", seed=0, **options):
    return SamplerJudge(HFSampler(tiny_model(family, seed=seed), TOKENIZER), TOKENIZER, **options)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_judge_that_ships_can_be_asked(name):
    file = load_judge(name)
    texts = ("ANSWER ONE", "ANSWER TWO") if file.mode == "pairwise" else ("ANSWER ONE",)
    asked = file.render(group("x", prompt=CHAT), texts)
    assert file.about and all(text in asked.user for text in (*texts, "say it"))
    if file.mode == "pairwise":
        assert asked.user.index("ANSWER ONE") < asked.user.index("ANSWER TWO")
        assert asked.user != file.render(group("x", prompt=CHAT), texts[::-1]).user
        assert max(file.labels.values()) == 1 and min(file.labels.values()) == 0


def test_what_an_answer_says_is_never_taken_for_a_template():
    file = JudgeFile(**POINT, read="regex", pattern="(a)", labels={"a": 1})
    asked = file.render(group("x"), ("{{ 7 * 6 }} {% raw %}",))
    assert "{{ 7 * 6 }} {% raw %}" in asked.user


def test_a_conversation_is_shown_as_a_transcript():
    turns = (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    )
    asked = JudgeFile(**POINT, labels={"a": 1, "b": 0}, system="Be fair.").render(group("x", prompt=turns), ("four",))
    assert asked.user == "User: one\n\nAssistant: two\n\nUser: three | four ?"
    assert asked.messages[0] == {"role": "system", "content": "Be fair."} and asked.text.startswith("Be fair.\n\nUser")


def test_columns_reach_the_prompt_and_a_row_that_lacks_one_is_missing():
    file = JudgeFile(prompt="{{ prompt }} {{ answer }} {{ columns.hint }}", mode="pointwise", labels={"a": 1, "b": 0})
    assert file.render(group("x", hint="blue"), ("y",)).user == "say it y blue"
    feedback = Scored("judge", PointJudge(file, judge()))
    judged, account = apply([feedback], [group("x", hint="blue", row=1), group("y", row=2)], 0)
    assert not np.isnan(judged[0].rewards()[0]) and np.isnan(judged[1].rewards()[0])
    (reason,) = account.counts["judge"].missing
    assert "cannot be filled" in reason and "hint" in reason


REPLIES = [
    ({"read": "regex", "pattern": r"Score: ([0-9.]+)"}, "so Score: 1, no, Score: 2.5", 2.5),
    ({"read": "regex", "pattern": r"Score: ([0-9.]+)"}, "Score: ...", "cannot be read"),
    ({"read": "regex", "pattern": r"\[(\w)\]", "labels": {"A": 1, "C": 0.5}}, "[B] or [C]", 0.5),
    ({"read": "regex", "pattern": r"\[(\w)\]", "labels": {"A": 1, "C": 0.5}}, "[A] or [B]", "no known label"),
    ({"read": "json", "key": "score"}, 'here: {"why": {"score": 1}, "score": 3} done', 1.0),
    ({"read": "json", "key": "score"}, '{"score": 1} then {"score": 4}', 4.0),
    ({"read": "json", "key": "score"}, '{"score": "4"}', 4.0),
    ({"read": "json", "key": "score"}, '{"score": [4]}', "cannot be read"),
    ({"read": "json", "key": "score"}, '{"score": 4', "cannot be read"),
    ({"read": "json", "key": "score"}, '{"score": null}', "cannot be read"),
    ({"read": "json", "key": "score", "high": 3.0}, '{"score": 4}', "outside"),
    ({"read": "json", "key": "score"}, '{"score": NaN}', "no number"),
]


@pytest.mark.parametrize(("options", "reply", "number"), REPLIES)
def test_replies_are_read_or_missing(options, reply, number):
    found = JudgeFile(**POINT, **options).parse(reply)
    assert number in found.reason if isinstance(number, str) else found == number


MISTAKES = [
    ({"prompt": "{{ prompt }} {{ first }}", "labels": {"A": 1, "B": 0}}, "never shows `second`"),
    ({**SHORT, "prompt": SHORT["prompt"] + "{{ anwser }}", "labels": {"A": 1, "B": 0}}, "asks for `anwser`"),
    ({**SHORT, "prompt": "{{ prompt"}, "no Jinja template"),
    ({**SHORT}, "`read: labels` needs `labels`"),
    ({**SHORT, "read": "regex"}, "needs `pattern`"),
    ({**SHORT, "read": "json"}, "needs `key`"),
    ({**SHORT, "read": "regex", "pattern": "(a"}, "no regular expression"),
    ({**SHORT, "read": "regex", "pattern": "a"}, "0 groups"),
    ({**SHORT, "labels": {"A": 1, "B": 0}, "pattern": "(a)"}, "`pattern` is not used"),
    ({**SHORT, "labels": {"A": 1}}, "one label"),
    ({**SHORT, "labels": {True: 1, "B": 0}}, "no text"),
    ({**SHORT, "labels": {"A": 2, "B": 0}}, "stands for 2"),
    ({**SHORT, "labels": {"A": 1, "B": 0}, "samples": 3}, "probabilities are not sampled"),
    ({**POINT, "read": "regex", "pattern": "(a)", "samples": 3}, "all the same"),
    ({**SHORT, "labels": {"A": 1, "B": 0}, "high": 3.0}, "of scores"),
    ({**SHORT, "labels": {"A": 1, "B": 0}, "mode": "listwise"}, "'listwise'"),
]


@pytest.mark.parametrize(("given", "said"), MISTAKES)
def test_a_judge_that_cannot_work_is_refused(given, said):
    with pytest.raises(ConfigError) as caught:
        JudgeFile(**given)
    assert said in str(caught.value)


def test_a_file_that_is_wrong_says_where_and_everything_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("prompt: x\nlables: {A: 1}\nmode: pairwise\nsamples: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_judge(str(path))
    text = str(caught.value)
    assert "mine.yaml" in text and "did you mean `labels`" in text and "`samples` is 0" in text
    with pytest.raises(ConfigError, match="did you mean `pairwise`"):
        load_judge("pairwize")
    for text, said in (("- a\n", "no mapping"), ("mode: pairwise\n", "no `prompt`"), ("a: [", "cannot be read")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_judge(str(path))


def test_two_files_that_ask_the_same_are_one_judge():
    one = JudgeFile(**SHORT, labels={"A": 1, "B": 0}, name="one")
    assert one.digest == JudgeFile(**SHORT, labels={"B": 0, "A": 1}, about="x").digest
    assert one.digest != JudgeFile(**SHORT, labels={"A": 0, "B": 1}).digest


def test_the_expected_value_over_labels():
    yes_no = expected(np.array([-1.0, -2.5]), np.array([1.0, 0.0]))
    assert yes_no == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert expected(np.array([-1.0, -2.5]) - 300, np.array([1.0, 0.0])) == pytest.approx(yes_no)
    assert expected(np.log([0.1, 0.1]), np.array([4.0, 5.0])) == pytest.approx(4.5)
    assert expected(np.array([-1.0, -np.inf]), np.array([1.0, 0.0])) == 1
    assert isinstance(expected(np.array([-np.inf, -np.inf]), np.array([1.0, 0.0])), Failed)
    assert isinstance(expected(np.array([-1.0, np.nan]), np.array([1.0, 0.0])), Failed)


def plain_label_p(model, asked, labels, chat=True):
    """P(label | labels) by one plain forward in float64."""
    if chat:
        turns = [dict(turn) for turn in asked.messages]
        text = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    else:
        ids = TOKENIZER(asked.text)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
    tokens = [TOKENIZER.convert_tokens_to_ids(label) for label in labels]
    return logits[tokens].softmax(-1).numpy()


@pytest.mark.parametrize("chat", [True, False])
def test_labels_are_read_from_the_models_own_probabilities_in_both_orders(chat):
    tokenizer = tiny_tokenizer(chat_template=chat)
    file = JudgeFile(**SHORT, labels={"A": 1, "B": 0, "C": 0.5}, system="Be fair.")
    model = SamplerJudge(HFSampler(tiny_model("qwen3"), tokenizer), tokenizer)
    groups = [group("one", "two", "a much longer answer", row=1), group("x", "yy", row=2, prompt=CHAT)]
    judged, account = apply([Compared("judge", PairJudge(file, model))], groups, 0)
    golden = tiny_model("qwen3")
    values = np.array([1, 0, 0.5])
    for one, made in zip(groups, judged, strict=True):
        for i in range(len(one)):
            for j in range(i):
                texts = one.answers[i].text, one.answers[j].text
                p_ij = plain_label_p(golden, file.render(one, texts), "ABC", chat) @ values
                p_ji = plain_label_p(golden, file.render(one, texts[::-1]), "ABC", chat) @ values
                assert made.wins[i, j] == pytest.approx((p_ij + 1 - p_ji) / 2, abs=1e-5)
    assert account.counts["judge"].judged == 4


def test_a_yes_no_judge_is_the_sigmoid_of_the_difference_of_log_probs():
    file = JudgeFile(**POINT, labels={"Y": 1, "N": 0})
    judged, _ = apply([Scored("judge", PointJudge(file, judge()))], [group("one", "two")], 0)
    golden = tiny_model("llama")
    for answer, found in zip(judged[0].answers, judged[0].rewards(), strict=True):
        p = plain_label_p(golden, file.render(judged[0], (answer.text,)), "YN")
        assert found == pytest.approx(p[0], abs=1e-5)


def test_labels_of_several_tokens_are_refused():
    with pytest.raises(ConfigError, match="is 2 tokens of this tokenizer"):
        label_tokens(TOKENIZER, ["Yes", "N"])
    with pytest.raises(ConfigError, match="same token"):
        label_tokens(TOKENIZER, ["A", "A"])
    assert label_tokens(TOKENIZER, ["A", "B"]) == TOKENIZER.convert_tokens_to_ids(["A", "B"])
    file = JudgeFile(**POINT, labels={"Yes": 1, "No": 0})
    with pytest.raises(ConfigError, match="tokens of this tokenizer"):
        apply([Scored("judge", PointJudge(file, judge()))], [group("one")], 0)


def test_sampled_replies_are_those_of_the_sampler_and_a_cache_does_not_shift_them(tmp_path):
    file = JudgeFile(
        **POINT,
        read="regex",
        pattern=r"([a-z])",
        labels={chr(97 + n): n for n in range(26)},
        samples=3,
        temperature=1.0,
        max_new_tokens=12,
    )
    groups = [group(*(f"answer {n}" for n in range(5)))]
    one, _ = apply([Scored("judge", PointJudge(file, judge()))], groups, 7)
    rewards = one[0].rewards()
    assert np.isfinite(rewards).all() and len(set(rewards)) > 1
    again, _ = apply([Scored("judge", PointJudge(file, judge()))], groups, 7)
    other, _ = apply([Scored("judge", PointJudge(file, judge()))], groups, 8)
    assert rewards.tolist() == again[0].rewards().tolist() != other[0].rewards().tolist()
    # Killed after some of the replies: the others come out as if nothing had happened.
    full = Scored("judge", PointJudge(file, judge(), JudgementCache(tmp_path)))
    apply([full], groups, 7)
    (written,) = tmp_path.glob("*.jsonl")
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:2]))
    half = JudgementCache(tmp_path)
    resumed, _ = apply([Scored("judge", PointJudge(file, judge(), half))], groups, 7)
    assert half.hits == 2 and resumed[0].rewards().tolist() == rewards.tolist()


def test_averaging_replies_divides_the_judges_noise():
    options = {"read": "regex", "pattern": r"([a-z])", "temperature": 1.0, "max_new_tokens": 8}
    labels = {chr(97 + n): n for n in range(26)}
    spread = {}
    for samples in (1, 8):
        file = JudgeFile(**POINT, **options, labels=labels, samples=samples)
        judged, _ = apply([Scored("j", PointJudge(file, judge()))], [group("x", row=row) for row in range(64)], 0)
        spread[samples] = np.nanvar([one.rewards()[0] for one in judged])
    assert 4 < spread[1] / spread[8] < 16


def test_a_question_that_is_too_long_is_missing_and_never_cut():
    file = JudgeFile(**POINT, labels={"A": 1, "B": 0})
    long = "word " * 600
    judged, account = apply([Scored("judge", PointJudge(file, judge()))], [group("one", long)], 0)
    assert np.isnan(judged[0].rewards()).tolist() == [False, True]
    assert account.counts["judge"].missing == {"the question and room for a reply are more than 512 tokens": 1}


def test_a_sampler_that_fails_is_missing_and_one_that_tells_no_log_probs_is_refused():
    class Broken:
        capabilities = frozenset()

        def sample(self, prefixes, n, params, progress=None):
            raise SamplerError("the engine is gone")

    model = SamplerJudge(Broken(), TOKENIZER, weights="broken")
    file = JudgeFile(**POINT, read="regex", pattern="(a)", labels={"a": 1})
    judged, account = apply([Scored("judge", PointJudge(file, model))], [group("x", "y")], 0)
    assert np.isnan(judged[0].rewards()).all()
    assert account.counts["judge"].missing == {"raised SamplerError: the engine is gone": 2}
    with pytest.raises(ConfigError, match="does not tell the log-probs"):
        apply([Scored("judge", PointJudge(JudgeFile(**POINT, labels={"A": 1, "B": 0}), model))], [group("x")], 0)
    with pytest.raises(ConfigError, match="nothing says what"):
        SamplerJudge(Broken(), TOKENIZER)


def test_a_question_that_breaks_the_sampler_costs_itself_alone_and_moves_no_other():
    class Picky(HFSampler):
        calls = 0

        def sample(self, prefixes, n, params, progress=None):
            self.calls += 1
            if any(len(prefix) == longest and count for prefix, count in zip(prefixes, n, strict=True)):
                raise SamplerError("out of memory")
            return super().sample(prefixes, n, params)

    letters = {chr(97 + n): n for n in range(26)}
    sampled = {"read": "regex", "pattern": r"([a-z])", "temperature": 1.0, "max_new_tokens": 12}
    file = JudgeFile(**POINT, **sampled, labels=letters)
    texts = ["one", "two", "an answer that is longer than all others", "four", "five"]
    whole, _ = apply([Scored("judge", PointJudge(file, judge()))], [group(*texts)], 1)
    asked = [file.render(whole[0], (text,)) for text in texts]
    model = judge()
    longest = max(len(model._encode(one.messages)) for one in asked)
    model.sampler = Picky(model.sampler.model, TOKENIZER)
    judged, account = apply([Scored("judge", PointJudge(file, model))], [group(*texts)], 1)
    expected_rewards = whole[0].rewards()
    assert np.isfinite(expected_rewards).sum() >= 3
    expected_rewards[2] = np.nan
    np.testing.assert_array_equal(judged[0].rewards(), expected_rewards)
    assert account.counts["judge"].missing["raised SamplerError: out of memory"] == 1 and model.sampler.calls > 2


def test_a_policy_that_was_trained_is_another_judge(tmp_path):
    sampler = HFSampler(tiny_model("llama"), TOKENIZER)
    file = JudgeFile(**POINT, labels={"A": 1, "B": 0})
    feedback = Scored("judge", PointJudge(file, SamplerJudge(sampler, TOKENIZER), JudgementCache(tmp_path)))
    before, key = apply([feedback], [group("x")], 0)[0][0].rewards(), feedback.key
    with torch.no_grad():
        sampler.model.lm_head.weight.mul_(1.5)
    assert feedback.key != key and feedback.scorer.cache.hits == 0
    assert apply([feedback], [group("x")], 0)[0][0].rewards() != before
    assert apply([feedback], [group("x")], 0)[1].counts["judge"].judged == feedback.scorer.cache.hits == 1


def test_judging_leaves_the_sampler_as_it_was():
    sampler = HFSampler(tiny_model("llama"), TOKENIZER)
    params = SamplingParams(max_new_tokens=5, seed=3)
    before = sampler.sample([[1, 60, 70]], 2, params)
    model = SamplerJudge(sampler, TOKENIZER)
    sampler.model.train()
    sampler.model.lm_head.eval()
    apply([Scored("judge", PointJudge(JudgeFile(**POINT, labels={"A": 1, "B": 0}), model))], [group("x")], 0)
    assert sampler.model.training and not sampler.model.lm_head.training
    after = sampler.sample([[1, 60, 70]], 2, params)
    assert [r.ids.tolist() for r in before[0]] == [r.ids.tolist() for r in after[0]]


def test_a_judge_of_a_recipe_the_policy_itself_or_a_model_of_its_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mode: pointwise\nread: labels\nlabels: {A: 1, B: 0}\nprompt: '{{ prompt }} | {{ answer }} ?'\n")
    sampler = HFSampler(tiny_model("llama"), TOKENIZER)
    context = FeedbackContext(sampler=lambda: sampler, tokenizer=lambda: TOKENIZER, folder=tmp_path)
    own, _ = apply([open_feedback(FeedbackSpec(kind="judge", file="mine.yaml"), context)], [group("x", "yy")], 0)
    save_tiny(tmp_path / "model")
    spec = FeedbackSpec(kind="judge", file=str(file), model=str(tmp_path / "model"), dtype="float32", name="other")
    other, _ = apply([open_feedback(spec)], [group("x", "yy")], 0)
    np.testing.assert_allclose(own[0].rewards(), other[0].rewards(), atol=1e-6)
    with pytest.raises(ConfigError, match="needs the run's sampler"):
        open_feedback(FeedbackSpec(kind="judge", file=str(file)))
    with pytest.raises(ConfigError, match="`swap` is not used by the pointwise judge"):
        open_feedback(FeedbackSpec(kind="judge", file="mine.yaml", swap=True), context)


def test_a_judge_of_the_other_mode_is_refused():
    with pytest.raises(ConfigError, match="is pairwise, not pointwise"):
        PointJudge(load_judge("pairwise"), judge())
    with pytest.raises(ConfigError, match="is pointwise, not pairwise"):
        PairJudge(load_judge("points"), judge())
