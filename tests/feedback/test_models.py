"""Reward models, preference models and implicit rewards against plain forwards of single sequences."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification

from align.core.errors import ConfigError, DataError, ModelError
from align.feedback import FeedbackContext, FeedbackSpec, apply, open_feedback
from align.feedback.implicit import FrozenPolicy, ImplicitReward
from align.feedback.judge_file import load_judge
from align.feedback.pairwise import PairwiseModel
from align.feedback.reward_model import Rendering, RewardModel
from align.feedback.scored import Compared, Scored
from align.feedback.sequences import Classifier
from align.scoring.backends import prepare
from align.scoring.layout import Tree
from align.scoring.value import ValueModel, score_values
from align.testing.tiny import EOS_ID, FAMILIES, tiny_model, tiny_tokenizer
from tests.feedback.made import group

TOKENIZER = tiny_tokenizer()
CHAT = ({"role": "user", "content": "Is it true that the river explains seven stars?"},)
GROUPS = [
    group("Because the cat builds the bridge.", "No.", "", "I do not know. " * 6, row=1, prompt=CHAT),
    group(" Ask somebody else.", " No.", row=2, prompt="Write one line on how an old teacher paints the garden?"),
]


def classifier(family="llama", labels=1, pad=0, seed=0, **changes):
    extra = {"num_labels": labels, "vocab_size": 320, "pad_token_id": pad, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(FAMILIES[family] | extra | changes))
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def alone(model, ids):
    """The logits of one sequence, without padding, read at its last token that the model does not take for padding."""
    last = max(place for place, token in enumerate(ids) if token != model.config.pad_token_id)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, last]
        return model.score(hidden).double().numpy()


def text_ids(prompt, answer):
    if isinstance(prompt, str):
        return TOKENIZER(prompt + answer)["input_ids"] + [EOS_ID]
    messages = [*map(dict, prompt), {"role": "assistant", "content": answer}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("family", "pad"), [("gpt2", 0), ("llama", None), ("qwen3", EOS_ID)])
def test_rewards_are_those_of_single_sequences_whatever_the_batch(family, pad):
    model = classifier(family, pad=pad)
    expected = [[alone(model, text_ids(one.prompt, answer.text))[0] for answer in one.answers] for one in GROUPS]
    for budget in (None, 60):
        reward = RewardModel(Classifier(model, budget), TOKENIZER)
        judged, account = apply([Scored("rm", reward)], GROUPS, 0)
        for one, numbers in zip(judged, expected, strict=True):
            np.testing.assert_allclose(one.rewards(), numbers, rtol=0, atol=2e-5)
        assert account.counts["rm"].judged == 6
    assert model.config.pad_token_id == pad
    assert np.ptp(np.concatenate([np.array(numbers) for numbers in expected])) > 1e-3


def test_a_model_of_the_bert_kind_reads_a_pair_of_texts_and_no_padding():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    template = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B </s>", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**template)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("bert", vocab_size=320, num_labels=1, pad_token_id=0, **small, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    one = group("Because the cat builds the bridge.", "No.", prompt="Is it true?")
    judged, _ = apply([Scored("rm", RewardModel(Classifier(model), tokenizer))], [one], 0)
    for answer, found in zip(one.answers, judged[0].rewards(), strict=True):
        ids = tokenizer("Is it true?", answer.text)["input_ids"]
        assert ids[0] == 1 and ids.count(2) == 2
        with torch.no_grad():
            assert found == pytest.approx(float(model(input_ids=torch.tensor([ids])).logits), abs=1e-5)
    assert np.ptp(judged[0].rewards()) > 1e-3


def test_without_a_padding_token_the_last_token_is_meant_whatever_it_is():
    model = classifier(pad=None)
    rows = [[5, 6, 0], [5, 6, 0, 0], [7, 8, 9, 10, 11], [1, 2]]
    found = Classifier(model)(rows)[:, 0]
    np.testing.assert_allclose(found, [alone(model, row)[0] for row in rows], atol=1e-5)
    assert np.ptp(found) > 1e-3


def test_batches_hold_no_more_tokens_than_the_budget_with_padding():
    read = Classifier(classifier(), 50)
    lengths = [3, 40, 7, 9, 9, 30, 1, 60, 12]
    batches = read._batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 50 for b in batches) and len(batches) < 9


def test_an_answer_that_is_too_long_is_missing_or_refused_and_never_cut():
    model = classifier()
    lengths = [len(text_ids(GROUPS[0].prompt, answer.text)) for answer in GROUPS[0].answers]
    limit = sorted(lengths)[-2]
    judged, account = apply([Scored("rm", RewardModel(Classifier(model), TOKENIZER, max_length=limit))], GROUPS[:1], 0)
    assert np.isnan(judged[0].rewards()).tolist() == [length > limit for length in lengths]
    assert account.counts["rm"].missing == {f"more than {limit} tokens": 1}
    with pytest.raises(DataError, match="the model reads"):
        strict = RewardModel(Classifier(model), TOKENIZER, max_length=limit, too_long="refuse")
        strict.score([i for one in GROUPS for i in _items(one)], 0)


def _items(one):
    from align.feedback.base import Item

    return [Item(one, index) for index in range(len(one))]


def test_a_model_of_several_labels_gives_log_odds_of_the_good_one():
    model = classifier(labels=3)
    model.config.id2label = {0: "bad", 1: "good", 2: "odd"}
    with pytest.raises(ConfigError, match="3 labels"):
        RewardModel(Classifier(model), TOKENIZER)
    with pytest.raises(ConfigError, match="did you mean `good`"):
        RewardModel(Classifier(model), TOKENIZER, label="goood")
    judged, _ = apply([Scored("rm", RewardModel(Classifier(model), TOKENIZER, label="good"))], GROUPS[:1], 0)
    for answer, found in zip(GROUPS[0].answers, judged[0].rewards(), strict=True):
        logits = alone(model, text_ids(CHAT, answer.text))
        p = np.exp(logits[1]) / np.exp(logits).sum()
        assert found == pytest.approx(math.log(p / (1 - p)), abs=1e-5)
    with pytest.raises(ConfigError, match="1 output"):
        RewardModel(Classifier(classifier()), TOKENIZER, label="good")


def test_a_reward_model_from_its_folder_and_a_language_model_that_is_none(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "rm")
    TOKENIZER.save_pretrained(tmp_path / "rm")
    spec = FeedbackSpec(kind="reward_model", name="rm", model=str(tmp_path / "rm"), dtype="float32", tokens=90)
    judged, _ = apply([open_feedback(spec)], GROUPS, 0)
    direct, _ = apply([Scored("rm", RewardModel(Classifier(model), TOKENIZER))], GROUPS, 0)
    np.testing.assert_allclose(judged[0].rewards(), direct[0].rewards(), atol=1e-6)

    tiny_model("llama").save_pretrained(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="its head is not among the saved weights"):
        RewardModel.open(str(tmp_path / "lm"))
    with pytest.raises(ModelError, match="cannot be loaded"):
        RewardModel.open(str(tmp_path / "nothing"))


def test_a_value_model_that_was_trained_here_is_a_reward_model(tmp_path):
    value = ValueModel(tiny_model("qwen3"))
    torch.nn.init.normal_(value.head.weight, std=0.3)
    value.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "value_model.json").read_text())["kind"] == "value"
    judged, _ = apply([Scored("value", RewardModel.open(str(tmp_path), dtype="float32", budget=80))], GROUPS, 0)
    backend = prepare(value, "padded")
    for one in judged:
        for answer, found in zip(one.answers, one.rewards(), strict=True):
            ids = text_ids(one.prompt, answer.text)
            with torch.no_grad():
                states = score_values(value, backend.pack([Tree.of(ids[:1], [ids[1:]])]))["value"]
            assert found == pytest.approx(float(states[0, -1]), abs=1e-5)


def test_a_number_that_is_not_finite_is_missing():
    model = classifier()
    with torch.no_grad():
        model.score.weight[:] = math.inf
    judged, account = apply([Scored("rm", RewardModel(Classifier(model), TOKENIZER))], GROUPS[1:], 0)
    assert np.isnan(judged[0].rewards()).all()
    assert account.counts["rm"].missing == {"the model gives a number that is not finite": 2}


def test_a_pairwise_model_is_the_mean_of_both_orders():
    file = load_judge("plain_pair")
    model = classifier(labels=2, seed=3)
    model.config.id2label = {0: "first", 1: "second"}
    feedback = Compared("pairs", PairwiseModel(Classifier(model, 200), TOKENIZER, file, label="first"))
    judged, account = apply([feedback], GROUPS, 0)

    def p(one, i, j):
        asked = file.render(one, (one.answers[i].text, one.answers[j].text))
        logits = alone(model, TOKENIZER(asked.user)["input_ids"])
        return np.exp(logits[0]) / np.exp(logits).sum()

    for one, made in zip(GROUPS, judged, strict=True):
        for i in range(len(one)):
            for j in range(i):
                expected = (p(one, i, j) + 1 - p(one, j, i)) / 2
                assert made.wins[i, j] == pytest.approx(expected, abs=1e-5)
                assert made.wins[i, j] + made.wins[j, i] == 1
    assert account.counts["pairs"].asked == 7 and 0 < account.means["pairs/first_position"] < 1

    single = classifier(labels=1)
    unswapped = Compared("pairs", PairwiseModel(Classifier(single), TOKENIZER, file), swap=False)
    judged, _ = apply([unswapped], GROUPS[1:], 0)
    asked = file.render(GROUPS[1], (GROUPS[1].answers[0].text, GROUPS[1].answers[1].text))
    logit = alone(single, TOKENIZER(asked.user)["input_ids"])[0]
    assert judged[0].wins[0, 1] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)
    with pytest.raises(ConfigError, match="shows one answer"):
        PairwiseModel(Classifier(single), TOKENIZER, load_judge("yes_no"))


def sampled(seed=0):
    rng = np.random.default_rng(seed)
    return [
        group("a", "b", "c", row=1, ids=[rng.integers(7, 320, size).tolist() for size in (5, 1, 9)]),
        group("d", "e", row=2, ids=[rng.integers(7, 320, 4).tolist(), []]),
    ]


def plain_logps(model, prompt, ids):
    """Log-probs of a completion by one plain forward in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].double()
    return [float(logits[len(prompt) - 1 + t].log_softmax(-1)[token]) for t, token in enumerate(ids)]


def test_the_implicit_reward_is_beta_times_the_log_ratio():
    policy, reference = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    context = FeedbackContext(policy=lambda: FrozenPolicy.of(policy), reference=lambda: FrozenPolicy.of(reference))
    groups = sampled()
    judged, account = apply([open_feedback(FeedbackSpec(kind="implicit", beta=0.3), context)], groups, 0)
    mean, _ = apply([open_feedback(FeedbackSpec(kind="implicit", length_normalised=True), context)], groups, 0)
    golden_policy, golden_reference = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    for one, other in zip(judged, mean, strict=True):
        for answer, found, normalised in zip(one.answers, one.rewards(), other.rewards(), strict=True):
            if not len(answer):
                assert math.isnan(found) and math.isnan(normalised)
                continue
            own = plain_logps(golden_policy, one.prompt_ids, answer.ids)
            ref = plain_logps(golden_reference, one.prompt_ids, answer.ids)
            assert found == pytest.approx(0.3 * (sum(own) - sum(ref)), abs=1e-4)
            assert normalised == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert account.counts["implicit"].missing == {"an empty answer": 1}


def test_the_implicit_reward_of_a_policy_against_itself_is_zero_and_ranks_do_not_depend_on_beta():
    policy = FrozenPolicy.of(tiny_model("llama"))
    zero, _ = apply([Scored("implicit", ImplicitReward(policy, policy))], sampled(), 0)
    assert np.nanmax(np.abs(zero[0].rewards())) == 0
    other = FrozenPolicy.of(tiny_model("llama", seed=5))
    one, two = (
        apply([Scored("implicit", ImplicitReward(policy, other, beta))], sampled(), 0)[0][0].rewards()
        for beta in (0.1, 2.0)
    )
    np.testing.assert_allclose(two, 20 * one, rtol=1e-9)
    swapped = apply([Scored("implicit", ImplicitReward(other, policy, 0.1))], sampled(), 0)[0][0].rewards()
    np.testing.assert_allclose(swapped, -one, rtol=1e-9)


def test_an_adapter_that_is_off_is_the_reference():
    base = tiny_model("llama", seed=4)
    wrapped = get_peft_model(tiny_model("llama", seed=4), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    policy = FrozenPolicy.of(wrapped)
    off = FrozenPolicy.of(wrapped, wrapped.disable_adapter)
    reward = ImplicitReward(policy, off, 1.0)
    with_copy = ImplicitReward(policy, FrozenPolicy.of(base), 1.0)
    one, two = (apply([Scored("implicit", r)], sampled(), 0)[0][0].rewards() for r in (reward, with_copy))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert np.abs(one).max() > 1e-2 and policy.weights != off.weights


def test_an_implicit_reward_that_cannot_be_is_refused():
    policy = FrozenPolicy.of(tiny_model("llama"))
    for given in ({}, {"reference": policy, "rule": "mean_logp"}, {"reference": policy, "beta": 0.0}):
        with pytest.raises(ConfigError):
            ImplicitReward(policy, **given)
    with pytest.raises(ConfigError, match="needs the run's policy"):
        open_feedback(FeedbackSpec(kind="implicit"))


def test_texts_are_joined_as_training_joins_them():
    rendering = Rendering(TOKENIZER)
    for prompt, answer in ((CHAT, "No."), ("Write one line", " No.")):
        assert rendering(prompt, answer) == text_ids(prompt, answer)
    # Tokens that would merge across the boundary do not: the prompt keeps its own ids.
    ids = rendering("Write one line", "s")
    assert ids[: len(TOKENIZER("Write one line")["input_ids"])] == TOKENIZER("Write one line")["input_ids"]
    assert TOKENIZER.decode(ids) == "<s>Write one lines</s>" and ids != text_ids("Write one line", "s")
