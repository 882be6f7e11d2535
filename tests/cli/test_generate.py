"""`align generate` in process: what it writes, what it leaves out, what it refuses, and that it goes on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align.cli.main import main
from align.core.chunks import Chunks
from align.data.groups import RowId
from align.data.readers import reader_for
from align.sampling.hf import HFSampler
from align.sampling.prompts import prompt_ids
from align.testing.tiny import random_pairs, save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("generate") / "model"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(1)
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).save_pretrained(folder)
    return str(folder)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys, *words):
    code = main(["generate", *words])
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


QUICK = ("--max-new-tokens", "6", "--chunk-size", "2", "--batch-size", "4")


def test_rows_carry_the_prompt_the_answer_and_where_they_come_from(model, tmp_path, capsys):
    pairs = random_pairs(5, seed=1)
    source = jsonl(tmp_path / "pairs.jsonl", pairs)
    out = tmp_path / "out.jsonl"
    code, said, _ = run(capsys, model, "--prompts", source, "--output", str(out), "--n", "3", "--json", *QUICK)
    report = json.loads(said)
    rows = rows_of(out)
    assert code == 0
    assert report["completions"] == len(rows) == 15
    assert report["chunks"] == 3
    assert [row["prompt"] for row in rows[::3]] == [pair["prompt"] for pair in pairs]
    assert [row["sample"] for row in rows[:4]] == [0, 1, 2, 0]
    assert {row["row"] for row in rows} == {f"{source}:{number}" for number in range(1, 6)}
    assert len({row["completion"] for row in rows[:3]}) == 3
    assert report["finished"] == sum(row["finished"] for row in rows)
    for row in rows:
        assert row["model"] == model and row["seed"] == 0
        assert row["tokens"] == 6 or row["finished"]
    reader = reader_for(rows, where="out.jsonl")  # align (and TRL) read what was written
    assert reader.layout.format == "demonstrations"
    assert reader(rows[0], RowId("out.jsonl", 0)).prompt == pairs[0]["prompt"]


def test_answers_are_those_of_the_model_on_the_ids_of_training(model, tmp_path, capsys):
    rows = [{"prompt": [{"role": "user", "content": "Why?"}]}, {"prompt": [{"role": "user", "content": "the river"}]}]
    out = tmp_path / "out.jsonl"
    code, _, _ = run(
        capsys,
        model,
        "--prompts",
        jsonl(tmp_path / "p.jsonl", rows),
        "--output",
        str(out),
        "--temperature",
        "0",
        *QUICK,
    )
    assert code == 0
    tokenizer, causal = tiny_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
    for row, given in zip(rows_of(out), rows, strict=True):
        ids = torch.tensor([prompt_ids(tokenizer, given["prompt"])])
        found = causal.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
        assert row["completion"] == [{"role": "assistant", "content": tokenizer.decode([i for i in found if i != 2])}]
        logits = causal(torch.tensor([[*ids[0].tolist(), *found]])).logits[0, ids.shape[1] - 1 : -1]
        logp = logits.detach().log_softmax(-1).gather(1, torch.tensor(found)[:, None]).mean()
        assert row["logp"] == pytest.approx(float(logp), abs=1e-4)


def test_bad_rows_are_counted_with_their_place_and_the_rest_is_done(model, tmp_path, capsys):
    source = tmp_path / "mixed.jsonl"
    lines = [json.dumps({"prompt": "one"}), "{broken", json.dumps({"prompt": ""}), json.dumps({"prompt": "x " * 400})]
    source.write_text("\n".join([*lines, json.dumps({"prompt": "two"})]) + "\n")
    out = tmp_path / "out.jsonl"
    code, said, err = run(capsys, model, "--prompts", str(source), "--output", str(out), "--json", *QUICK)
    report = json.loads(said)
    assert code == 0
    assert [row["prompt"] for row in rows_of(out)] == ["one", "two"]
    assert report["rejected"]["count"] == 3
    places = {place: reason for reason, told in report["rejected"]["reasons"].items() for place in told["rows"]}
    assert set(places) == {f"{source}:2", f"{source}:3", f"{source}:4"}
    assert "too long" in places[f"{source}:4"]
    assert f"{source}:2" in err


FORMATS = [
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
    ({"messages": [{"role": "user", "content": "c"}]}, "c"),
    ({"prompt": "d", "completion": "x", "label": True}, "d"),
    ({"prompt": "e", "completions": ["x", "y"], "scores": [1, 2]}, "e"),
    ({"task": "f", "other": 3}, "f"),
]


@pytest.mark.parametrize(("row", "wanted"), FORMATS)
def test_the_prompt_of_every_format(row, wanted, model, tmp_path, capsys):
    source = jsonl(tmp_path / "rows.jsonl", [row])
    out = tmp_path / "out.jsonl"
    extra = ["--prompt-column", "task"] if "task" in row else []
    code, _, err = run(capsys, model, "--prompts", source, "--output", str(out), *QUICK, *extra)
    assert code == 0, err
    prompt = rows_of(out)[0]["prompt"]
    assert (prompt if isinstance(prompt, str) else prompt[0]["content"]) == wanted


def test_text_files_chat_and_system(model, tmp_path, capsys):
    source = tmp_path / "prompts.txt"
    source.write_text("first line\n\nsecond line\n")
    out = tmp_path / "out.jsonl"
    code, _, err = run(capsys, model, "--prompts", str(source), "--output", str(out), *QUICK)
    assert code == 0
    assert [row["prompt"] for row in rows_of(out)] == ["first line", "second line"]
    assert [row["row"] for row in rows_of(out)] == [f"{source}:1", f"{source}:3"]
    assert f"an empty line ({source}:2)" in err
    assert "--chat asks them" in err
    out = tmp_path / "chat.jsonl"
    words = ("--prompts", str(source), "--output", str(out), "--system", "Be brief.", "--max-prompts", "1")
    code, _, err = run(capsys, model, *words, *QUICK)
    assert code == 0
    assert "--chat" not in err
    assert [row["prompt"] for row in rows_of(out)] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "first line"}]
    ]


def test_prompts_on_the_command_line_print(model, capsys):
    code, out, _ = run(capsys, model, "-p", "the cat", "-p", "a dog", "--n", "2", "--max-new-tokens", "3")
    assert code == 0
    assert out.count("--- -p:") == 4
    code, out, _ = run(capsys, model, "-p", "the cat", "--max-new-tokens", "3", "--json")
    assert json.loads(out)["rows"][0]["prompt"] == "the cat"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_alone(model, capsys, monkeypatch):
    words = (model, "-p", "the cat", "-p", "a dog", "--n", "2", "--max-new-tokens", "3")
    _, plain, err = run(capsys, *words)
    assert "sampling" not in err
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        assert main(["generate", *words]) == 0
        shown = sys.stderr.getvalue()
    assert "sampling" in shown and "4/4" in shown
    assert capsys.readouterr().out == plain


def test_adapters_by_their_folder_or_over_a_model(model, adapter, tmp_path, capsys):
    source = jsonl(tmp_path / "p.jsonl", random_pairs(2, seed=3))
    found = {}
    for name, words in (("base", [model]), ("over", [model, "--adapter", adapter]), ("folder", [adapter])):
        out = tmp_path / f"{name}.jsonl"
        code, _, err = run(capsys, *words, "--prompts", source, "--output", str(out), *QUICK)
        assert code == 0, err
        found[name] = [row["completion"] for row in rows_of(out)]
    assert found["over"] == found["folder"] != found["base"]


def test_a_second_call_does_nothing_and_other_settings_are_refused(model, tmp_path, capsys, monkeypatch):
    source = jsonl(tmp_path / "p.jsonl", random_pairs(5, seed=3))
    out = tmp_path / "out.jsonl"
    words = (model, "--prompts", source, "--output", str(out), *QUICK)
    assert run(capsys, *words)[0] == 0
    before = out.read_bytes()
    calls = []
    sample = HFSampler.sample
    monkeypatch.setattr(HFSampler, "sample", lambda self, *rest: (calls.append(1), sample(self, *rest))[1])
    code, said, _ = run(capsys, *words)
    assert code == 0 and not calls and "nothing was left to do" in said
    code, _, err = run(capsys, *words, "--seed", "1")
    assert code == 2 and "`seed` was 0, is 1" in err and "--restart" in err
    assert out.read_bytes() == before
    assert run(capsys, *words, "--seed", "1", "--restart")[0] == 0
    assert calls and out.read_bytes() != before
    out.write_text("something of the user's\n")
    code, _, err = run(capsys, *words, "--seed", "1")
    assert code == 2 and "there already" in err and out.read_text() == "something of the user's\n"
    other = tmp_path / "other.jsonl"
    other.write_text("mine\n")
    code, _, err = run(capsys, model, "--prompts", source, "--output", str(other), *QUICK)
    assert code == 2 and other.read_text() == "mine\n" and not list(tmp_path.glob(".other*"))


def test_a_stopped_call_goes_on_with_the_same_bytes(model, tmp_path, capsys, monkeypatch):
    source = jsonl(tmp_path / "p.jsonl", random_pairs(7, seed=3))
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert run(capsys, model, "--prompts", source, "--output", str(whole), "--n", "2", *QUICK)[0] == 0
    write, done = Chunks.write, []

    def stopping(self, chunk, rows):
        write(self, chunk, rows)
        done.append(chunk)
        if len(done) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(Chunks, "write", stopping)
    words = (model, "--prompts", source, "--output", str(parts), "--n", "2", *QUICK)
    assert [run(capsys, *words)[0] for _ in range(3)] == [130, 130, 0]
    assert done == [0, 1, 2, 3]
    assert parts.read_bytes() == whole.read_bytes()


MISTAKES = [
    (["--prompts", "none.jsonl", "--output", "o.jsonl"], "there is no such file"),
    (["--prompts", "{rows}"], "no output is named"),
    (["-p", "x", "--n", "0"], "`--n` is 0"),
    (["-p", "x", "--temperature", "-1"], "`temperature` is -1.0, outside its range"),
    (["-p", "x", "--split", "test"], "does nothing with -p"),
    (["-p", "x", "--max-new-tokens", "600"], "too long for the model"),
    (["--prompts", "{rows}", "--output", "{folder}"], "the output is a folder"),
    (["--prompts", "{rows}", "--output", "o.jsonl", "--prompt-column", "promt"], "did you mean `prompt`"),
    (["--prompts", "{text}", "--output", "o.jsonl"], "whole texts, not prompts"),
    (["-p", "x", "--adapter", "{folder}"], "there is no adapter_config.json"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_mistakes(words, says, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    named = {
        "rows": jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}]),
        "text": jsonl(tmp_path / "text.jsonl", [{"text": "a whole text"}]),
        "folder": str(folder),
    }
    code, out, err = run(capsys, model, *(word.format(**named) for word in words))
    assert code == 2
    assert says in err
    assert "Traceback" not in err and not out


def test_models_that_cannot_be_loaded(adapter, tmp_path, capsys):
    run_folder = tmp_path / "run"
    save_tiny(run_folder / "policy")
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (moved / file).write_bytes((tmp_path / adapter / file).read_bytes())
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/no/such/model"}))
    for words, says in (
        (["/no/such/folder"], "there is no such model folder"),
        ([str(run_folder)], f"its model is `{run_folder / 'policy'}`"),
        ([str(moved)], "MODEL --adapter DIR"),
        ([adapter, "--adapter", adapter], "the model is an adapter itself"),
    ):
        code, _, err = run(capsys, *words, "-p", "x")
        assert code == 2
        assert says in err


def test_killed_at_random_moments_it_ends_with_the_same_bytes_and_no_chunk_twice(tmp_path):
    driver = Path(__file__).with_name("generate_kill_driver.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path), "5"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == 5, report
    assert report["code"] == 0, report["errors"]
    assert report["same"] and report["rows"] == 160
    # A kill between a chunk's rename and our note of it may hide a chunk from the log, never show it twice.
    assert len(set(report["chunks"])) == len(report["chunks"]) >= 15
    assert all(report["kept"])
    assert report["left"] == ["done.json", "key.json"]
