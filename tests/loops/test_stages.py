"""Sample, judge, pair: each stage writes what a plain computation on the stage before gives, and no row is lost."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from align.core.errors import CheckpointError, ConfigError, DataError
from align.core.progress import silent
from align.core.seeds import derive
from align.data.artefacts import Artefact
from align.data.prepare import open_sources, prepare_data
from align.data.rollout_rows import from_row
from align.data.tokenise import Tokeniser
from align.loops import stages
from align.recipe import stages as recipes
from align.recipe.collect import read
from align.sampling.base import SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.loading import load
from align.sampling.prompts import PromptEncoder
from align.testing.tiny import random_pairs, save_tiny, tiny_tokenizer
from tests.sampling.serving import served

PROMPTS = 7
_JUDGES = '''
import os, time
from pathlib import Path

def number(answer):
    text = answer if isinstance(answer, str) else answer[-1]["content"]
    return (sum(map(ord, text)) * 7919 % 1000) / 1000

def plain(prompts, completions, **columns):
    return [number(text) for text in completions]

def coarse(prompts, completions, **columns):
    return [round(number(text)) for text in completions]

def beats(prompts, first, second, **columns):
    gaps = [number(a) - number(b) for a, b in zip(first, second)]
    return [0.5 + gap / 2 for gap in gaps]

def unreliable(prompts, completions, completion_ids, mark, **columns):
    """By the row: raises, says nonsense, says nothing, hangs, dies."""
    what = mark[0]
    if what == "raises":
        raise RuntimeError("no")
    if what == "hangs":
        time.sleep(60)
    if what == "dies":
        os._exit(7)
    return [{"nonsense": "very good", "silent": None, "endless": float("inf")}.get(what, 1.0) for _ in completions]

def longest(prompts, completions, **columns):
    return [float(len(answer)) for answer in completions]

def asked(prompts, completions, folder, place, **columns):
    with open(Path(folder[0]) / "asked.txt", "a") as file:
        file.writelines(f"{text!r}\\n" for text in completions)
    broken = place[0] > 2 and (Path(folder[0]) / "broken").exists()
    return [None if broken and i else 1.0 for i in range(len(completions))]
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    save_tiny(folder / "model")
    (folder / "stage_judges.py").write_text(_JUDGES)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("stage_judges", None)


def rows_of(conversational=False, **extra):
    return [row | extra for row in random_pairs(PROMPTS, seed=1, conversational=conversational)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(home, folder, rows, text="", **sample):
    given = {"n": 3, "max_new_tokens": 8, "chunk": 3, **sample}
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {home / 'model'}}}\ndata: {{prompts: {write(folder / 'prompts.jsonl', rows)}}}\n"
        f"sample: {json.dumps(given)}\noutput_dir: {folder / 'run'}\n{text}"
    )
    return folder / "recipe.yaml"


def unwatched(total):
    return nullcontext(silent)


def go(path, *commands, **given):
    return [recipes.run(read(path, command), command, unwatched, **given) for command in commands][-1]


def groups(folder, name="judged"):
    return [from_row(row) for row in Artefact.open(folder / "run" / name, "").rows()]


def pairs_in(folder):
    return list(Artefact.open(folder / "run" / "pairs", "").rows())


def number(text):
    return (sum(map(ord, text)) * 7919 % 1000) / 1000


BW = "feedback: [{name: stage_judges:plain}]\npairs: {rule: best_worst}\n"


def test_samples_are_those_of_the_sampler_under_the_seed_of_their_chunk(home, tmp_path):
    done = go(recipe(home, tmp_path, rows_of(task="sum"), seed=5), "sample")
    assert (done.prompts, done.chunks, done.before) == (PROMPTS, 3, 0)
    loaded = load(str(home / "model"))
    encoder = PromptEncoder(loaded.tokenizer)
    found = groups(tmp_path, "samples")
    assert [group.prompt for group in found] == [row["prompt"] for row in rows_of()]
    for chunk in range(3):
        own = found[3 * chunk : 3 * chunk + 3]
        params = SamplingParams(max_new_tokens=8, seed=derive(5, "chunk", chunk) % 2**53)
        wanted = HFSampler(loaded.model, loaded.tokenizer).sample([encoder(one.prompt) for one in own], 3, params)
        for group, rollouts in zip(own, wanted, strict=True):
            assert group.prompt_ids.tolist() == encoder(group.prompt)
            assert group.columns["task"] == "sum"
            for answer, rollout in zip(group.answers, rollouts, strict=True):
                assert answer.ids.tolist() == rollout.ids.tolist()
                np.testing.assert_allclose(answer.logp, rollout.logp, rtol=1e-5)
                assert (answer.text, answer.finished) == (rollout.text, rollout.finished)
                assert (answer.origin, answer.model, answer.temperature) == ("policy", str(home / "model"), 1.0)
    texts = [answer.text for group in found for answer in group.answers]
    assert len(set(texts)) > 15, "chunks and answers draw differently"
    counts = done.of("answers")
    assert counts["sampled"] == 21 and counts["tokens"] == sum(len(one) for group in found for one in group.answers)
    assert counts["finished"] == sum(one.finished for group in found for one in group.answers)


def test_pairs_are_best_and_worst_by_a_plain_computation_and_training_reads_them(home, tmp_path):
    text = "feedback: [{name: stage_judges:plain}]\npairs: {rule: best_worst, scale: 2.0, label: prob}\n"
    done = go(recipe(home, tmp_path, rows_of(conversational=True), text), "sample", "judge", "pairs")
    judged, pairs = groups(tmp_path), pairs_in(tmp_path)
    assert done.of("pairs")["pairs"] == len(pairs) == PROMPTS
    for group, row in zip(judged, pairs, strict=True):
        values = [number(answer.text) for answer in group.answers]
        assert [answer.rewards for answer in group.answers] == [{"stage_judges:plain": value} for value in values]
        best, worst = values.index(max(values)), values.index(min(values))
        assert row["prompt"] == [dict(turn) for turn in group.prompt]
        assert row["chosen"] == [{"role": "assistant", "content": group.answers[best].text}]
        assert row["rejected"] == [{"role": "assistant", "content": group.answers[worst].text}]
        assert (row["chosen_reward"], row["rejected_reward"]) == (values[best], values[worst])
        assert row["margin"] == pytest.approx(values[best] - values[worst], abs=1e-15)
        assert row["probability"] == pytest.approx(1 / (1 + math.exp(-2 * row["margin"])), rel=1e-12)
        came = row["provenance"]
        assert (came["rule"], came["source"], came["row"]) == ("best_worst", group.row.source, group.row.row)
        side, answer = came["rejected"], group.answers[worst]
        assert (side["index"], side["origin"], side["model"]) == (worst, "policy", str(home / "model"))
        assert side["logp"] == pytest.approx(float(answer.logp.astype(float).sum()), rel=1e-12)
        assert (side["tokens"], side["finished"], side["temperature"]) == (len(answer), answer.finished, 1.0)
        assert side["rewards"] == [{"name": "stage_judges:plain", "value": values[worst]}]
    found = open_sources([str(tmp_path / "run" / "pairs")], "pairs")
    assert "not used: `provenance`" in found[0].reader.description, "said, not silently"
    data = prepare_data([str(tmp_path / "run" / "pairs")], Tokeniser(tiny_tokenizer(), "pairs", needs={"probability"}))
    item = data.dataset[2]
    (preference,) = item.preferences
    best = judged[2].answers[pairs[2]["provenance"]["chosen"]["index"]]
    assert preference.probability == pairs[2]["probability"]
    assert item.prompt.tolist() == judged[2].prompt_ids.tolist(), "trained after the ids that were sampled after"
    if best.finished:
        assert item.completions[preference.winner].ids.tolist() == best.ids.tolist()


def test_preferences_fill_the_matrix_and_win_rates_go_with_the_pairs(home, tmp_path):
    text = (
        "feedback: [{kind: pairwise_function, name: stage_judges:beats}]\npairs: {rule: best_worst, reward: win_rate}\n"
    )
    go(recipe(home, tmp_path, rows_of(), text), "sample", "judge", "pairs")
    for group, row in zip(groups(tmp_path), pairs_in(tmp_path), strict=True):
        values = [number(answer.text) for answer in group.answers]
        wins = np.array([[0.5 + (a - b) / 2 for b in values] for a in values])
        np.testing.assert_allclose(group.wins, wins, atol=1e-12)
        best, worst = int(np.argmax(values)), int(np.argmin(values))
        assert row["chosen_reward"] == pytest.approx(wins[best].mean(), abs=1e-12)
        assert row["rejected_reward"] == pytest.approx(wins[worst].mean(), abs=1e-12)
        assert row["provenance"]["win_probability"] == pytest.approx(wins[best, worst], abs=1e-12)
        assert "probability" not in row, "a hard label is no probability"


def test_a_judge_that_fails_in_any_way_costs_its_own_rows_only_and_says_how_many(home, tmp_path):
    marks = ["raises", "fine", "nonsense", "silent", "hangs", "dies", "endless"]
    rows = [row | {"mark": mark} for row, mark in zip(rows_of(), marks, strict=True)]
    text = (
        "feedback:\n"
        "  - {name: stage_judges:unreliable, deadline: 1.0, isolate: true, batch: 1, weight: 0.5}\n"
        "  - {name: stage_judges:plain}\n"
        "pairs: {rule: best_worst}\n"
    )
    path = recipe(home, tmp_path, rows, text, n=2)
    judged = go(path, "sample", "judge")
    name = "stage_judges:unreliable"
    assert judged.of("asked") == {name: 14, "stage_judges:plain": 14}
    assert judged.of("judged") == {name: 2, "stage_judges:plain": 14}
    assert sum(judged.of("lost").values()) == 12 and all(name in reason for reason in judged.of("lost"))
    assert sorted(judged.of("lost").values()) == [2] * 6, "a reason for each kind of failure"
    for group, mark in zip(groups(tmp_path), marks, strict=True):
        for answer in group.answers:
            assert math.isnan(answer.rewards[name]) == (mark != "fine")
            assert answer.rewards["stage_judges:plain"] == number(answer.text), "the other judge's stand"
    pairs = go(path, "pairs")
    assert pairs.of("lost")["missing"] == 6 and pairs.of("left_out") == {"missing": 12}
    (row,) = pairs_in(tmp_path)
    assert row["provenance"]["row"] == 1
    assert row["margin"] == pytest.approx(abs(np.diff([number(one.text) for one in groups(tmp_path)[1].answers])[0]))


class Stop(Exception):
    pass


def test_a_stage_that_was_stopped_goes_on_and_ends_with_the_same_bytes(home, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        recipe(home, folder, rows_of(), BW)
    # The same prompts file, so that row ids are the same.
    (parts / "recipe.yaml").write_text(
        (whole / "recipe.yaml").read_text().replace(str(whole / "run"), str(parts / "run"))
    )
    for command in ("sample", "judge", "pairs"):
        go(whole / "recipe.yaml", command)
        write_, calls = Artefact.write, []

        def stopping(self, chunk, rows, account=None, write_=write_, calls=calls):
            if len(calls) == 1:
                calls.append("stopped")
                raise Stop
            calls.append(chunk)
            write_(self, chunk, rows, account)

        monkeypatch.setattr(Artefact, "write", stopping)
        with pytest.raises(Stop):
            go(parts / "recipe.yaml", command)
        done = go(parts / "recipe.yaml", command)
        monkeypatch.undo()
        assert calls == [0, "stopped", 1, 2] and done.before == 1
        again = go(parts / "recipe.yaml", command)
        assert (again.before, again.counts) == (3, done.counts)
        folder = {"sample": "samples", "judge": "judged", "pairs": "pairs"}[command]
        for file in sorted((whole / "run" / folder).iterdir()):
            assert file.read_bytes() == (parts / "run" / folder / file.name).read_bytes(), (command, file.name)


def test_missing_judgements_are_asked_for_again_where_that_is_wanted_and_no_others(home, tmp_path):
    text = f"feedback: [{{name: stage_judges:asked, batch: 3, cache: {tmp_path / 'kept'}}}]\n"
    rows = [row | {"folder": str(tmp_path), "place": place} for place, row in enumerate(rows_of())]
    path = recipe(home, tmp_path, rows, text)
    (tmp_path / "broken").touch()
    asked, part = tmp_path / "asked.txt", tmp_path / "run" / "judged" / "part-000000.parquet"
    first = go(path, "sample", "judge")
    assert first.of("judged") == {"stage_judges:asked": 9 + 4} and len(asked.read_text().splitlines()) == 21
    before = part.stat().st_mtime_ns
    again = go(path, "judge")
    assert again.before == 3 and len(asked.read_text().splitlines()) == 21
    (tmp_path / "broken").unlink()
    last = go(path, "judge", retry_missing=True)
    assert last.of("judged") == {"stage_judges:asked": 21} and not last.of("lost")
    assert last.before == 1 and part.stat().st_mtime_ns == before, "a chunk that lacks nothing stays"
    assert len(asked.read_text().splitlines()) == 21 + 8, "what was judged costs nothing again"


def test_given_answers_join_under_their_own_origin_with_the_ids_of_training(home, tmp_path):
    rows = rows_of(conversational=True)
    go(recipe(home, tmp_path, rows, "pairs: {rule: by_origin}\n", n=1, data_answers=True), "sample", "pairs")
    tokenise = Tokeniser(tiny_tokenizer(), "pairs")
    data = prepare_data([str(tmp_path / "prompts.jsonl")], tokenise)
    for number_, group in enumerate(groups(tmp_path, "samples")):
        own, good, bad = group.answers
        assert (own.origin, good.origin, bad.origin) == ("policy", "data", "data_rejected")
        trained = data.dataset[number_]
        (pair,) = trained.preferences
        assert good.ids.tolist() == trained.completions[pair.winner].ids.tolist()
        assert bad.ids.tolist() == trained.completions[pair.loser].ids.tolist()
        assert good.logp is None and good.finished
    pairs = pairs_in(tmp_path)
    assert [row["chosen"] for row in pairs] == [row["chosen"] for row in rows]
    assert [row["rejected"][0]["content"] for row in pairs] == [
        group.answers[0].text for group in groups(tmp_path, "samples")
    ]
    assert all("margin" not in row and row["weight"] == 1.0 for row in pairs)


def test_the_policy_judges_itself_by_its_log_ratio_to_a_reference(home, tmp_path):
    save_tiny(tmp_path / "reference", seed=1)
    text = (
        f"feedback: [{{kind: implicit, name: own, reference: '{tmp_path / 'reference'}', beta: 0.3}}]\n"
        "pairs: {rule: best_worst}\n"
    )
    go(recipe(home, tmp_path, rows_of(), text, n=2), "sample", "judge", "pairs")
    models = [load(str(folder)).model for folder in (home / "model", tmp_path / "reference")]
    for group in groups(tmp_path)[::3]:
        for answer in group.answers:
            ids, start = torch.tensor([[*group.prompt_ids, *answer.ids]]), len(group.prompt_ids)
            own, other = (
                model(ids).logits[0, start - 1 : -1].double().log_softmax(-1)[range(len(answer)), answer.ids.tolist()]
                for model in models
            )
            assert answer.rewards["own"] == pytest.approx(0.3 * float((own - other).sum()), rel=1e-4)


def test_the_policy_replies_as_its_own_judge(home, tmp_path):
    (tmp_path / "ab.yaml").write_text(
        "mode: pointwise\nread: labels\nabout: words\nprompt: '{{ prompt }} {{ answer }}'\n"
        "labels: {a: 1, b: 0}\nlow: 0\nhigh: 1\n"
    )
    text = f"feedback: [{{kind: judge, name: self, file: '{tmp_path / 'ab.yaml'}'}}]\n"
    path = recipe(home, tmp_path, rows_of(conversational=True), text, n=2)
    judged = go(path, "sample", "judge")
    assert judged.of("judged") == {"self": 14}
    loaded = load(str(home / "model"))
    encoder = PromptEncoder(loaded.tokenizer)
    a, b = (loaded.tokenizer.convert_tokens_to_ids(token) for token in "ab")
    for group in groups(tmp_path)[::3]:
        for answer in group.answers:
            asked = [{"role": "user", "content": f"{group.prompt[0]['content']} {answer.text}"}]
            logits = loaded.model(torch.tensor([encoder(asked)])).logits[0, -1].double()
            assert answer.rewards["self"] == pytest.approx(float(torch.sigmoid(logits[a] - logits[b])), rel=1e-4)
    kept = sum(len(file.read_text().splitlines()) for file in (tmp_path / "run" / "judgements").glob("*.jsonl"))
    assert kept == 14, "every reply is kept without being asked to"


def test_the_top_answers_are_demonstrations(home, tmp_path):
    text = "feedback: [{name: stage_judges:plain}]\npairs: {rule: top}\n"
    path = recipe(home, tmp_path, rows_of(), text)
    done = go(path, "sample", "judge", "pairs")
    assert done.of("pairs") == {"demonstrations": PROMPTS, "swapped": 0}
    for group, row in zip(groups(tmp_path), pairs_in(tmp_path), strict=True):
        assert row["completion"] == max((one.text for one in group.answers), key=number)
    (opened,) = open_sources([str(tmp_path / "run" / "pairs")], "demonstrations")
    assert opened.reader.gives == {"demonstrations"}
    path.write_text(path.read_text().replace("rule: top", "rule: top_share, share: 0.2"))
    share = go(path, "pairs", restart=True)
    best = sorted((number(one.text) for group in groups(tmp_path) for one in group.answers), reverse=True)[:4]
    assert share.of("pairs")["demonstrations"] == 4
    assert sorted((number(row["completion"]) for row in pairs_in(tmp_path)), reverse=True) == best


def test_the_pairs_of_a_prompt_share_weight_one(home, tmp_path):
    path = recipe(home, tmp_path, rows_of(), "pairs: {rule: by_origin}\n", n=3, data_answers=True)
    go(path, "sample", "pairs")
    rows = pairs_in(tmp_path)
    assert [row["weight"] for row in rows] == [1 / 3] * (3 * PROMPTS)
    data = prepare_data([str(tmp_path / "run" / "pairs")], Tokeniser(tiny_tokenizer(), "pairs"))
    assert data.dataset[4].preferences[0].weight == pytest.approx(1 / 3)


def test_weights_order_the_answers_and_judges_held_out_do_not(home, tmp_path):
    text = (
        "feedback:\n  - {name: stage_judges:plain, weight: -1.0}\n"
        "  - {name: stage_judges:longest, held_out: true, weight: 100.0}\n"
        "pairs: {rule: best_worst, scale: 3.0, reward: win_rate}\n"
    )
    go(recipe(home, tmp_path, rows_of(), text), "sample", "judge", "pairs")
    for group, row in zip(groups(tmp_path), pairs_in(tmp_path), strict=True):
        values = [-number(answer.text) for answer in group.answers]
        assert [one.rewards["stage_judges:longest"] for one in group.answers] == [len(a.text) for a in group.answers]
        best, worst = values.index(max(values)), values.index(min(values))
        assert (row["chosen"], row["rejected"]) == (group.answers[best].text, group.answers[worst].text)
        for side, k in (("chosen", best), ("rejected", worst)):
            wins = [1 / (1 + math.exp(-3.0 * (values[k] - other))) for other in values]
            assert row[f"{side}_reward"] == pytest.approx(sum(wins) / 3, rel=1e-12), "SPPO: with itself as 1/2"
            assert row["provenance"][side]["score"] == values[k]


def test_ties_are_dropped_and_counted_prompt_by_prompt(home, tmp_path):
    text = "feedback: [{name: stage_judges:coarse}]\npairs: {rule: best_worst}\n"
    done = go(recipe(home, tmp_path, rows_of(), text, n=2, seed=1), "sample", "judge", "pairs")
    ties = [len({round(number(one.text)) for one in group.answers}) == 1 for group in groups(tmp_path)]
    assert 0 < sum(ties) < PROMPTS
    assert done.of("lost") == {"tie": sum(ties)} and done.of("pairs")["pairs"] == PROMPTS - sum(ties)
    assert [row["provenance"]["row"] for row in pairs_in(tmp_path)] == [k for k, tie in enumerate(ties) if not tie]


def test_messages_with_more_than_a_role_and_a_content_are_read_back_whole(home, tmp_path):
    prompt = [{"role": "user", "content": "hi", "name": "Ann"}]
    rows = [{"prompt": prompt}, {"prompt": [{"role": "user", "content": "ho"}]}]
    text = "feedback: [{name: stage_judges:plain}]\npairs: {rule: best_worst}\n"
    go(recipe(home, tmp_path, rows, text), "sample", "judge", "pairs")
    (opened,) = open_sources([str(tmp_path / "run" / "pairs")], "pairs")
    group = opened.reader(opened.source.read([0])[0], opened.source.row_id(0))
    assert group.prompt == ({"role": "user", "content": "hi", "name": "Ann"},)
    assert group.completions[0].segments[0].role == "assistant"


def test_plain_and_chat_prompts_do_not_go_together(home, tmp_path):
    rows = [{"prompt": "plain"}, {"prompt": [{"role": "user", "content": "chat"}]}]
    with pytest.raises(DataError, match="some prompts are plain text and some are messages"):
        go(recipe(home, tmp_path, rows), "sample")


def test_a_stage_asks_for_the_one_before_and_for_the_settings_it_was_made_with(home, tmp_path):
    path = recipe(home, tmp_path, rows_of(), BW)
    with pytest.raises(CheckpointError, match="run `align sample` first"):
        go(path, "judge")
    go(path, "sample")
    with pytest.raises(CheckpointError, match="is not there"):
        go(path, "pairs")
    with pytest.raises(CheckpointError, match=r"`sample\.n` was 3, is 4"):
        recipes.run(read(path, "judge", ["sample.n=4"]), "judge", unwatched)
    with pytest.raises(CheckpointError, match=r"`recipe\.n` was 3, is 4"):
        recipes.run(read(path, "sample", ["sample.n=4"]), "sample", unwatched)
    go(path, "judge")
    before = (tmp_path / "run" / "judged" / "manifest.json").read_bytes()
    fresh = recipes.run(read(path, "sample", ["sample.n=4"]), "sample", unwatched, restart=True)
    assert fresh.of("answers")["sampled"] == 28
    with pytest.raises(CheckpointError, match="`samples` was"):
        recipes.run(read(path, "judge", ["sample.n=4"]), "judge", unwatched)
    assert (tmp_path / "run" / "judged" / "manifest.json").read_bytes() == before


def test_no_pair_at_all_is_an_error_that_says_why(home, tmp_path):
    path = recipe(home, tmp_path, rows_of(), BW.replace("best_worst", "margin, margin: 2"))
    with pytest.raises(DataError, match=r"no prompt gives a pair\n  why: 7 margin"):
        go(path, "sample", "judge", "pairs")


def test_a_judge_who_says_nothing_at_all_is_an_error_that_says_why(home, tmp_path):
    path = recipe(home, tmp_path, rows_of(mark="silent"), "feedback: [{name: stage_judges:unreliable}]\n")
    with pytest.raises(DataError, match=r"`stage_judges:unreliable` judged nothing\n  why: 21 of `stage_judges:unrel"):
        go(path, "sample", "judge")


def test_greedy_answers_are_drawn_once():
    with pytest.raises(ConfigError, match="would be the same"):
        stages.SampleSpec(n=2, temperature=0.0)
    assert stages.SampleSpec(n=1, temperature=0.0).n == 1


SERVED = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def answers_score_as_sampled(folder):
    """Log-probs of the first answers, by a forward pass of the model."""
    model = load(str(folder / "model")).model
    for group in groups(folder, "samples")[:2]:
        first, second = group.answers[:2]
        assert first.text != second.text
        ids = torch.tensor([[*group.prompt_ids, *first.ids]])
        logp = model(ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        wanted = logp[range(len(first)), first.ids.tolist()].detach().numpy()
        np.testing.assert_allclose(first.logp, wanted, atol=1e-4)


@pytest.mark.slow
def test_vllm_samples_for_the_same_stage(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    save_tiny(tmp_path / "model", "qwen3", **SERVED)
    text = "sampler: {kind: vllm, max_model_len: 256, enforce_eager: true}\npairs: {rule: by_origin}\n"
    path = recipe(tmp_path, tmp_path, rows_of(conversational=True), text, n=2, data_answers=True)
    done = go(path, "sample")
    assert done.of("answers")["sampled"] == 2 * PROMPTS and done.of("answers")["data"] == 2 * PROMPTS
    answers_score_as_sampled(tmp_path)
    assert go(path, "sample").before == 3 and go(path, "pairs").of("pairs")["pairs"] == 2 * PROMPTS


@pytest.mark.slow
def test_a_server_samples_for_the_same_stage(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    save_tiny(tmp_path / "model", "qwen3", **SERVED)
    rows = rows_of(conversational=True)
    with served(tmp_path / "model", "--max-model-len", "512", "--logprobs-mode", "processed_logprobs") as url:
        path = recipe(tmp_path, tmp_path, rows, f"sampler: {{kind: server, urls: ['{url}'], deadline: 60}}\n", n=2)
        assert go(path, "sample").of("answers")["sampled"] == 2 * PROMPTS
    answers_score_as_sampled(tmp_path)
    assert go(path, "sample").before == 3, "nobody is asked again"
