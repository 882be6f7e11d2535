"""A whole evaluation of tiny models, recomputed from its rows with plain loops and plain forwards."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.core.errors import CheckpointError, ConfigError, DataError
from align.evaluate import Settings, evaluate_policy, load_side, read_held_out, save_result, starting_model
from align.evaluate.policy import COMPLETIONS, read_rows
from align.evaluate.sides import Side
from align.feedback.functions import Reward
from align.sampling.base import SamplingParams
from align.testing.tiny import random_pairs, save_tiny, tiny_tokenizer

PARAMS = SamplingParams(max_new_tokens=20, seed=5)
SETTINGS = Settings(n=2, sampling=PARAMS, chunk_size=5)


def vowels(prompts, completions, topic, **columns):
    """Missing for completions that begin with a letter; ties are common."""
    assert len(prompts) == len(completions) == len(topic)
    return [
        None if text[:1].isalpha() else float(sum(letter in "aeiou" for letter in text) + one)
        for text, one in zip(completions, topic, strict=True)
    ]


VOWELS = Reward("tests:vowels", vowels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny(folder / "start", "qwen3", seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder / "policy")
    tiny_tokenizer().save_pretrained(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def sides(folder):
    return load_side(str(folder / "policy")), load_side(str(folder / "start"))


ROWS = [row | {"topic": number % 3} for number, row in enumerate(random_pairs(22, seed=3))]


@pytest.fixture(scope="module")
def held_out(sides):
    return read_held_out(ROWS, sides[0].tokenizer, positions=512, max_new_tokens=20)


@pytest.fixture(scope="module")
def done(folder, sides, held_out):
    """(the evaluation, its rows, its folder)."""
    output = folder / "out"
    evaluation = evaluate_policy(*sides, held_out, output, reward=VOWELS, settings=SETTINGS)
    return evaluation, read_rows(output / COMPLETIONS), output


def test_counts_and_wins_by_a_plain_loop(done):
    evaluation, rows, _ = done
    assert len(rows) == evaluation.prompts == 22 and evaluation.n == 2
    wins = losses = ties = missing = 0
    differences, per_prompt = [], []
    for row in rows:
        ours, theirs = ([one["reward"] for one in row[side]] for side in ("policy", "baseline"))
        scores = []
        for a in ours:
            for b in theirs:
                if a is None or b is None:
                    missing += 1
                elif a == b:
                    ties += 1
                    scores.append(0.5)
                else:
                    wins += a > b
                    losses += a < b
                    scores.append(float(a > b))
        per_prompt.append(scores)
        means = [[one for one in side if one is not None] for side in (ours, theirs)]
        if all(means):
            differences.append(sum(means[0]) / len(means[0]) - sum(means[1]) / len(means[1]))
    found = evaluation.wins
    assert (found.wins, found.losses, found.ties, found.missing) == (wins, losses, ties, missing)
    assert min(wins, losses, ties, missing) > 0  # each kind is there, or this proves little
    assert found.rate.value == pytest.approx((wins + ties / 2) / (wins + losses + ties))
    assert found.rate.n == 88 - missing
    assert evaluation.reward_difference.value == pytest.approx(np.mean(differences))
    assert evaluation.reward_difference.n == len(differences)
    rewards = [one["reward"] for row in rows for one in row["policy"]]
    assert evaluation.policy.missing == rewards.count(None)
    assert evaluation.policy.reward.value == pytest.approx(np.mean([one for one in rewards if one is not None]))


def test_rewards_are_those_of_the_texts(done, held_out):
    for row, prompt in zip(done[1], held_out.prompts, strict=True):
        for side in ("policy", "baseline"):
            texts = [one["text"] for one in row[side]]
            again = vowels([row["prompt"]] * 2, texts, [prompt.columns["topic"]] * 2)
            assert [one["reward"] for one in row[side]] == again


def plain_logp(folder, prompt, ids):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double()
    chosen = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
    return chosen[:, 0].numpy()


def test_kl_by_plain_forwards(done, folder, held_out):
    evaluation, rows, _ = done
    first, third, tokens = [], [], 0
    for row, prompt in zip(rows, held_out.prompts, strict=True):
        for one in row["policy"]:
            ratio = plain_logp(folder / "policy", prompt.ids, one["ids"]) - plain_logp(
                folder / "start", prompt.ids, one["ids"]
            )
            assert one["k1"] == pytest.approx(ratio.sum(), abs=1e-3)
            first.append(ratio.sum())
            third.append(sum(math.exp(-r) - 1 + r for r in ratio))
            tokens += len(one["ids"])
    kl = evaluation.kl
    assert kl.k1.value == pytest.approx(np.mean(first), abs=1e-3) and kl.k3.value == pytest.approx(
        np.mean(third), abs=1e-3
    )
    assert kl.tokens == tokens
    assert kl.k3_per_token.value == pytest.approx(sum(third) / tokens, abs=1e-4)
    assert kl.k3.low > 0.1


def test_pairs_by_plain_forwards(done, folder):
    pairs = done[0].pairs
    tokenizer = tiny_tokenizer()
    better = better_per_token = implicit = 0
    margins = []
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        sums = {}
        for side in ("policy", "start"):
            for name in ("chosen", "rejected"):
                ids = [*tokenizer(row[name], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                sums[side, name] = plain_logp(folder / side, prompt, ids)
        better += sums["policy", "chosen"].sum() > sums["policy", "rejected"].sum()
        better_per_token += sums["policy", "chosen"].mean() > sums["policy", "rejected"].mean()
        ratio = {name: sums["policy", name].sum() - sums["start", name].sum() for name in ("chosen", "rejected")}
        margins.append(ratio["chosen"] - ratio["rejected"])
        implicit += margins[-1] > 0
    assert pairs.pairs == len(ROWS)
    assert pairs.accuracy.value == better / len(ROWS)
    assert pairs.accuracy_per_token.value == better_per_token / len(ROWS)
    assert pairs.implicit_accuracy.value == implicit / len(ROWS)
    assert pairs.margin.value == pytest.approx(np.mean(margins), abs=1e-3)
    shown = done[0].tokens
    assert [one["row"] for one in shown] == [row["row"] for row in done[1][:4]]
    totals = [{answer["label"]: answer["total"] for answer in one["answers"]} for one in shown]
    assert [one["chosen"] - one["rejected"] for one in totals] == pytest.approx(margins[:4], abs=1e-3)
    for answer in (answer for one in shown for answer in one["answers"]):
        assert sum(token.get("value", 0.0) for token in answer["tokens"]) == pytest.approx(answer["total"], abs=1e-9)
        assert answer["scored"] == sum("value" in token for token in answer["tokens"]) > 1


def test_lengths_and_completions(done, sides):
    evaluation, rows, _ = done
    own = [one for row in rows for one in row["policy"]]
    assert evaluation.policy.completions == len(own) == 44
    assert evaluation.policy.tokens.value == pytest.approx(np.mean([len(one["ids"]) for one in own]))
    unfinished = [one for one in own if not one["finished"]]
    assert evaluation.policy.unfinished.value == len(unfinished) / 44
    assert all(len(one["ids"]) == 20 for one in unfinished)
    assert all(one["ids"][-1] == sides[0].tokenizer.eos_token_id for one in own if one["finished"])
    grams = [tuple(one["ids"][i : i + 2]) for one in own for i in range(len(one["ids"]) - 1)]
    assert evaluation.policy.distinct_2 == pytest.approx(len(set(grams)) / len(grams))
    # The two draws of a prompt differ, and so do the two models' and two chunks'.
    assert all(row["policy"][0]["ids"] != row["policy"][1]["ids"] for row in rows)
    assert all(row["policy"][0]["ids"] != row["baseline"][0]["ids"] for row in rows)


def test_the_same_call_does_nothing_again_and_gives_the_same_bytes(done, sides, held_out, monkeypatch):
    evaluation, _, output = done
    first = save_result(evaluation, output).read_bytes()
    assert json.loads(first)["wins"]["wins"] == evaluation.wins.wins

    def refuse(*arguments, **words):
        raise AssertionError("sampled again")

    monkeypatch.setattr(Side, "sample", refuse)
    again = evaluate_policy(*sides, held_out, output, reward=VOWELS, settings=SETTINGS)
    assert save_result(again, output).read_bytes() == first


def test_other_settings_are_refused_by_name_and_restart_throws_away(sides, held_out, tmp_path):
    small = replace(held_out, prompts=held_out.prompts[:3])
    once = Settings(sampling=SamplingParams(max_new_tokens=4))
    evaluate_policy(*sides, small, tmp_path, settings=once)
    with pytest.raises(CheckpointError) as caught:
        evaluate_policy(*sides, small, tmp_path, reward=VOWELS, settings=once)
    assert '`reward` was "", is "tests:vowels"' in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        evaluate_policy(*sides, small, tmp_path, settings=replace(once, n=2))
    assert "`n` was 1, is 2" in str(caught.value)
    with pytest.raises(CheckpointError, match="`policy` was"):
        evaluate_policy(sides[1], sides[1], small, tmp_path, settings=once)
    found = evaluate_policy(*sides, small, tmp_path, reward=VOWELS, settings=once, restart=True)
    assert found.wins is not None


def test_a_policy_against_itself(sides, held_out, tmp_path):
    found = evaluate_policy(sides[1], sides[1], held_out, tmp_path, reward=VOWELS, settings=SETTINGS)
    assert found.kl.k1.value == found.kl.k3.value == 0.0
    assert found.wins.rate.low < 0.5 < found.wins.rate.high
    assert found.reward_difference.low < 0 < found.reward_difference.high
    assert found.pairs.margin.value == 0 and found.pairs.implicit_accuracy.value == 0.5
    # Independent draws: or else every comparison would be a tie.
    assert found.wins.wins > 0 and found.wins.losses > 0


def test_without_a_reward_and_at_temperature_0(sides, held_out, tmp_path):
    small = replace(held_out, prompts=held_out.prompts[:4])
    found = evaluate_policy(*sides, small, tmp_path / "a", settings=Settings(sampling=SamplingParams(max_new_tokens=4)))
    assert found.wins is None and found.reward_difference is None and found.policy.reward is None
    assert any("no reward function" in note for note in found.notes) and found.kl is not None
    greedy = Settings(sampling=SamplingParams(max_new_tokens=4, temperature=0))
    found = evaluate_policy(*sides, small, tmp_path / "b", reward=VOWELS, settings=greedy)
    assert found.kl is None and any("temperature 0" in note for note in found.notes)
    warm = Settings(sampling=SamplingParams(max_new_tokens=4, temperature=0.7))
    found = evaluate_policy(*sides, small, tmp_path / "c", reward=VOWELS, settings=warm)
    assert found.kl is not None and any("temperature 0.7" in note for note in found.notes)
    with pytest.raises(ConfigError, match="at temperature 0"):
        Settings(n=2, sampling=SamplingParams(temperature=0))
    with pytest.raises(ConfigError, match="`n` is 0"):
        Settings(n=0)


def test_one_pair_of_a_prompt_is_shown_by_tokens(sides, held_out, tmp_path):
    prompts = [replace(one, pairs=one.pairs * 2) for one in held_out.prompts[:2]]
    bare = replace(held_out.prompts[2], pairs=())
    short = Settings(sampling=SamplingParams(max_new_tokens=4))
    found = evaluate_policy(*sides, replace(held_out, prompts=[bare, *prompts]), tmp_path, settings=short)
    assert found.pairs.pairs == 4
    assert [one["row"] for one in found.tokens] == [str(one.row) for one in prompts]


def test_another_tokenizer(sides, held_out, tmp_path, folder):
    other = AutoTokenizer.from_pretrained(folder / "start")
    other.add_tokens(["<extra>"])
    baseline = replace(sides[1], tokenizer=other)
    found = evaluate_policy(sides[0], baseline, held_out, tmp_path, reward=VOWELS, settings=SETTINGS)
    assert found.kl is None and found.pairs.implicit_accuracy is None and found.pairs.baseline_accuracy is None
    assert found.tokens == ()
    assert found.pairs.accuracy.n == 22 and found.wins.rate.n > 0
    assert any("different tokenizers" in note for note in found.notes)


def test_an_adapter_is_its_base_and_itself(sides, folder, held_out, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    wrapped.save_pretrained(tmp_path / "zero")
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    wrapped.save_pretrained(tmp_path / "moved")
    assert (
        starting_model(str(tmp_path / "zero")) == str(folder / "start")
        and starting_model(str(folder / "start")) is None
    )
    small = replace(held_out, prompts=held_out.prompts[:4])
    settings = Settings(sampling=SamplingParams(max_new_tokens=8))
    kls = {}
    for name in ("zero", "moved"):
        side = load_side(str(tmp_path / name))
        assert len(side.tokenizer) == 320 and not any(p.requires_grad for p in side.model.parameters())
        kls[name] = evaluate_policy(side, sides[1], small, tmp_path / f"out-{name}", settings=settings).kl.k3.value
    assert abs(kls["zero"]) < 1e-6 < kls["moved"]


def test_conversations_are_asked_through_the_chat_template(sides, tmp_path):
    rows = random_pairs(6, seed=1, conversational=True)
    held_out = read_held_out(rows, sides[0].tokenizer)
    seen = []

    def watch(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    found = evaluate_policy(
        *sides,
        held_out,
        tmp_path,
        reward=Reward("w", watch),
        settings=Settings(sampling=SamplingParams(max_new_tokens=6)),
    )
    assert found.wins.ties == 6 and found.wins.rate.value == 0.5
    prompt, completion = seen[0]
    assert prompt == rows[0]["prompt"] and completion[0]["role"] == "assistant" and len(completion) == 1
    assert list(held_out.prompts[0].ids) == sides[0].tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_dict=False
    )


def test_reading_held_out_rows(sides, tmp_path):
    tokenizer = sides[0].tokenizer
    rows = [*ROWS, ROWS[0] | {"chosen": " Another one.", "topic": 9}, {"prompt": "x", "chosen": " a", "rejected": " a"}]
    rows += [{"prompt": 3, "chosen": " a", "rejected": " b"}, ROWS[1] | {"prompt": "long " * 300}]
    with pytest.raises(DataError, match="rows are bad"):
        read_held_out(rows, tokenizer)
    found = read_held_out(rows, tokenizer, max_bad_fraction=0.5, positions=512, max_new_tokens=20)
    assert len(found.prompts) == 22
    assert len(found.prompts[0].pairs) == 2 and found.pairs == 23
    assert found.prompts[0].columns == {"topic": 0}
    assert found.report["repeated"] == 1 and found.report["bad"] == 2 and found.report["dropped"] == 1
    some = read_held_out(ROWS, tokenizer, max_prompts=8, seed=1)
    others = read_held_out(ROWS, tokenizer, max_prompts=8, seed=2)
    assert len(some.prompts) == 8 and some.fingerprint != others.fingerprint
    assert some.fingerprint == read_held_out(ROWS, tokenizer, max_prompts=8, seed=1).fingerprint
    changed = [ROWS[0] | {"topic": 5}, *ROWS[1:]]
    assert read_held_out(changed, tokenizer).fingerprint != read_held_out(ROWS, tokenizer).fingerprint
    prompts_only = read_held_out([{"prompt": "one"}, {"prompt": "two"}], tokenizer)
    assert len(prompts_only.prompts) == 2 and prompts_only.pairs == 0
    (tmp_path / "some.txt").write_text("one\n\ntwo\n")
    lines = read_held_out(tmp_path / "some.txt", tokenizer, max_bad_fraction=0.5)
    assert [str(one.row) for one in lines.prompts] == [f"{tmp_path}/some.txt:1", f"{tmp_path}/some.txt:3"]
    assert [one.prompt for one in lines.prompts] == ["one", "two"]
    with pytest.raises(DataError, match="none of the 1 rows"):
        read_held_out([{"prompt": "long " * 300}], tokenizer, positions=64, max_new_tokens=20)
