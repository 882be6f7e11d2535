"""A judge served by a real `vllm serve`, through the code that a remote endpoint takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.compat.vllm import installed
from align.feedback import FeedbackSpec, apply, open_feedback
from align.feedback.cache import JudgementCache
from align.feedback.judge import PointJudge
from align.feedback.judge_file import load_judge
from align.feedback.judge_local import SamplerJudge
from align.feedback.scored import Scored
from align.sampling.server import ServerSampler, ServerSettings
from align.testing.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.feedback.made import group
from tests.sampling.serving import served

pytestmark = pytest.mark.skipif(not installed(), reason="vLLM is not installed (extra `vllm`)")
TOKENIZER = tiny_tokenizer()
SHAPE = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
FILES = {
    # Short prompts, for a model of 192 positions.
    "pair": "mode: pairwise\nread: labels\nlabels: {LABELS}\nprompt: '{{ prompt }} | {{ first }} | {{ second }} ?'\n",
    "words": (
        "mode: pointwise\nread: regex\npattern: '([a-z])'\nsamples: 4\ntemperature: 1.0\nmax_new_tokens: 12\n"
        "labels: {WORDS}\nprompt: '{{ prompt }} | {{ answer }} ?'\n"
    ),
}
GROUPS = [group("one", "two", "a longer answer", row=1), group("x", "yy", row=2)]


def prompt_ids(asked):
    turns = [dict(turn) for turn in asked.messages]
    text = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def next_logp(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def model():
    """A model whose letters A and B are likely where a reply begins, as those of a real judge are."""
    made = tiny_model("qwen3", **SHAPE)
    with torch.no_grad():
        ids = torch.tensor(
            [[*TOKENIZER("some question")["input_ids"], TOKENIZER.convert_tokens_to_ids("<|assistant|>")]]
        )
        start = made.model(input_ids=ids).last_hidden_state[0, -1]
        made.lm_head.weight[TOKENIZER.convert_tokens_to_ids(["A", "B"])] += 6 * start / start.square().sum()
    return made


@pytest.fixture(scope="module")
def address(tmp_path_factory, model):
    folder = save_tiny(tmp_path_factory.mktemp("judge") / "model", "qwen3", **SHAPE)
    model.save_pretrained(folder)
    # The stricter of the two ways of a server: log-probs of what it draws from.
    arguments = ["--max-model-len", "192", "--served-model-name", "judge", "--generation-config", "vllm"]
    with served(folder, *arguments, "--logprobs-mode", "processed_logprobs") as url:
        yield f"{url}/v1"


def feedback(address, tmp_path, name, **options):
    labels = "{A: 1, B: 0}"
    words = "{" + ", ".join(f'"{chr(97 + n)}": {n}' for n in range(26)) + "}"
    path = tmp_path / f"{name}.yaml"
    path.write_text(FILES[name].replace("{LABELS}", labels).replace("{WORDS}", words))
    given = {"kind": "judge", "name": "judge", "file": str(path), "url": address, "model": "judge", "deadline": 30.0}
    return load_judge(str(path)), open_feedback(FeedbackSpec(**given | options))


def expected_p(model, file, one, i, j):
    """P(A | A or B) by a plain forward, and None where one of them is not among the twenty likeliest."""
    logp = next_logp(model, prompt_ids(file.render(one, (one.answers[i].text, one.answers[j].text))))
    a, b = (logp[TOKENIZER.convert_tokens_to_ids(letter)] for letter in "AB")
    least = np.sort(logp)[-20]
    if min(a, b) < least:
        return None
    return 1 / (1 + np.exp(b - a))


def test_labels_of_a_served_judge_are_the_models_own_probabilities_in_both_orders(address, tmp_path, model):
    file, judge = feedback(address, tmp_path, "pair")
    judged, account = apply([judge], GROUPS, 0)
    compared = 0
    for one, made in zip(GROUPS, judged, strict=True):
        for i in range(len(one)):
            for j in range(i):
                there, back = expected_p(model, file, one, i, j), expected_p(model, file, one, j, i)
                if there is not None and back is not None:
                    assert made.wins[i, j] == pytest.approx((there + 1 - back) / 2, abs=1e-3)
                    compared += 1
    assert compared >= 2 and account.counts["judge"].judged >= compared


def test_plain_completions_and_chat_give_replies_that_repeat_and_average(address, tmp_path):
    for api in ("chat", "completions"):
        _, judge = feedback(address, tmp_path, "words", api=api)
        one, account = apply([judge], GROUPS, 3)
        again, _ = apply([judge], GROUPS, 3)
        other, _ = apply([judge], GROUPS, 4)
        rewards = np.concatenate([group.rewards() for group in one])
        np.testing.assert_array_equal(rewards, np.concatenate([group.rewards() for group in again]))
        assert not np.array_equal(rewards, np.concatenate([group.rewards() for group in other]), equal_nan=True)
        assert account.counts["judge"].judged >= 3 and np.nanstd(rewards) > 0


def test_a_sampler_of_a_server_judges_too_and_a_cache_does_not_shift_its_draws(address, tmp_path):
    file, _ = feedback(address, tmp_path, "words")
    settings = ServerSettings(deadline=30.0, tries=2)
    sampler = ServerSampler.open(address.removesuffix("/v1"), TOKENIZER, settings)
    try:
        model = SamplerJudge(sampler, TOKENIZER, weights="the served judge")
        whole, account = apply([Scored("judge", PointJudge(file, model))], GROUPS, 5)
        cached = Scored("judge", PointJudge(file, model, JudgementCache(tmp_path / "cache")))
        apply([cached], GROUPS[:1], 5)
        resumed, _ = apply([cached], GROUPS, 5)
    finally:
        sampler.close()
    assert account.counts["judge"].judged >= 3 and cached.scorer.cache.hits == 3
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one.rewards(), other.rewards())


def test_a_question_that_is_too_long_for_the_served_model_is_missing(address, tmp_path):
    _, judge = feedback(address, tmp_path, "words")
    judged, account = apply([judge], [group("word " * 300, "one")], 0)
    assert np.isnan(judged[0].rewards())[0] and not np.isnan(judged[0].rewards())[1]
    assert account.counts["judge"].missing == {"the server answered 400": 1}
