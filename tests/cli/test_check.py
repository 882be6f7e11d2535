"""`align check` in process: its numbers against plain code, what it leaves untouched, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.cli.main import main
from align.core.errors import TrainingError
from align.testing.tiny import random_pairs, save_tiny
from align.trainers import preference

ROWS = random_pairs(90, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check-cli")
    save_tiny(folder / "model")
    save_tiny(folder / "other", seed=5)
    labelled = [{"prompt": r["prompt"], "completion": r["chosen"], "label": n % 3 == 0} for n, r in enumerate(ROWS)]
    shown = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    for name, rows in (("pairs", ROWS), ("labels", labelled), ("demonstrations", shown)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, tmp_path: Path, rows: str = "pairs", **sections: Any) -> str:
    plain = {
        "model": {"name": str(folder / "model")},
        "method": {"name": "dpo"},
        "data": {"train": [str(folder / f"{rows}.jsonl")], "max_length": 256},
        "train": {"output_dir": str(tmp_path / "run"), "global_batch_size": 32, "learning_rate": 1e-6},
    }
    for section, values in sections.items():
        plain[section] = {**plain.get(section, {}), **values}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


def check(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["check", *words, "--json", "--max-duplicates", "none"]) == code
    return json.loads(capsys.readouterr().out)


def plain_logp(folder: Path, row: dict[str, str], column: str) -> tuple[float, int]:
    """(sum of log-probabilities, scored tokens) of an answer with its end token, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    start = tokenizer(row["prompt"])["input_ids"]
    ids = [*tokenizer(row["prompt"] + row[column])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    answer = range(len(start), len(ids))
    return sum(float(logp[place - 1, ids[place]]) for place in answer), len(answer)


def test_dpo(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [recipe(folder, tmp_path), "train.num_train_epochs=2", "--train.tokens_per_micro_batch", "300"]
    found = check(capsys, *words)
    assert found["data"]["streams"]["train"]["rows"]["kept"] == 90
    assert len(found["data"]["streams"]["train"]["samples"]) == 5
    run, zero = found["run"], found["model"]["step_zero"]
    assert (run["steps_per_epoch"], run["steps"], run["epochs"]) == (3, 6, 2.0)
    assert (run["rows_per_step"], run["learning_rate"], run["warmup_steps"]) == (32, 1e-6, 1)
    assert zero["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert zero["known_value"] == math.log(2)
    assert zero["loss_if_equal"] == pytest.approx(math.log(2), abs=1e-6)
    assert zero["expected_equal"]
    assert zero["largest_difference"] <= 1e-4
    rows = [ROWS[int(name.rpartition(":")[2]) - 1] for name in zero["row_ids"]]
    scored = [plain_logp(folder / "model", row, column) for row in rows for column in ("chosen", "rejected")]
    assert zero["scored_tokens"] == sum(count for _, count in scored)
    nats = -sum(total for total, _ in scored) / zero["scored_tokens"]
    assert zero["nats_per_token"] == pytest.approx(nats, abs=1e-4)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert found["model"]["parameters"] == {"policy": {"trainable": total, "all": total}}
    assert found["model"]["backend"] == "tree"


def test_micro_batches_and_gain(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = check(capsys, recipe(folder, tmp_path, train={"tokens_per_micro_batch": 300}), "--no-model")["run"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sizes = []
    for row in ROWS:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        answers = [len(tokenizer(row["prompt"] + row[c])["input_ids"]) - prompt + 1 for c in ("chosen", "rejected")]
        sizes.append((prompt, sum(answers)))
    unique = sum(prompt + answers for prompt, answers in sizes)
    assert run["sharing_gain"] == pytest.approx(
        sum(2 * prompt + answers for prompt, answers in sizes) / unique, abs=1e-3
    )
    assert run["longest_row"] == max(prompt + answers for prompt, answers in sizes)
    assert run["tokens_per_step"] == pytest.approx(32 * unique / 90, rel=0.1)
    fewest = run["tokens_per_step"] / 300
    assert fewest <= run["micro_batches_per_step"]["mean"] <= 1.6 * fewest
    assert run["micro_batches_per_step"]["mean"] <= run["micro_batches_per_step"]["most"]


@pytest.mark.parametrize(
    ("method", "data", "view"),
    [
        ({"name": "kto"}, "labels", "singles"),
        ({"name": "kto"}, "pairs", "singles"),
        ({"name": "sft"}, "demonstrations", "demonstrations"),
        ({"name": "simpo"}, "pairs", "pairs"),
        ({"name": "ipo", "tau": 0.2}, "pairs", "pairs"),
        ({"name": "tdpo"}, "pairs", "pairs"),
        ({"name": "rpo"}, "pairs", "pairs"),
    ],
)
def test_other_methods(
    method: dict[str, Any], data: str, view: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = check(capsys, recipe(folder, tmp_path, data, method=method))
    assert found["data"]["view"] == view
    zero = found["model"]["step_zero"]
    assert math.isfinite(zero["loss"])
    if method["name"] in ("simpo", "sft"):
        assert found["model"]["reference"] is None
        assert "largest_difference" not in zero
    else:
        assert zero["loss"] == pytest.approx(zero["loss_if_equal"], abs=1e-5)
    if method["name"] == "sft":
        assert zero["loss"] == pytest.approx(zero["nats_per_token"], abs=1e-4)
    if method["name"] == "ipo":
        assert zero["known_value"] == pytest.approx(6.25)
        assert zero["loss"] == pytest.approx(6.25, abs=1e-3)
    if data == "pairs" and view == "singles":
        assert found["run"]["rows_per_step"] == 16  # a pair is two completions


def test_lora_and_another_reference(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    found = check(capsys, recipe(folder, tmp_path, model={"peft": peft}))["model"]
    assert found["reference"] == "adapter_off"
    assert found["parameters"]["policy"]["trainable"] == 2 * 2 * 4 * 32  # layers, A and B, rank, width
    assert found["step_zero"]["largest_difference"] == 0
    other = recipe(folder, tmp_path, reference={"kind": "frozen", "model": str(folder / "other")})
    zero = check(capsys, other)["model"]["step_zero"]
    assert not zero["expected_equal"]
    assert zero["largest_difference"] > 0.1
    assert "known_value" not in zero


def test_nothing_is_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(folder, tmp_path, reference={"kind": "cached", "cache_dir": str(tmp_path / "cache")})
    check(capsys, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_run_in_progress_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(folder, tmp_path, train={"max_steps": 1})
    assert main(["train", path]) == 0
    output = tmp_path / "run"
    (output / ".checkpoint-2.partial").mkdir()  # a checkpoint that is being written at this moment
    before = {entry: entry.stat().st_mtime_ns for entry in output.rglob("*")}
    capsys.readouterr()
    check(capsys, path)
    assert {entry: entry.stat().st_mtime_ns for entry in output.rglob("*")} == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    assert main(["check", path, f"train.output_dir={tmp_path / 'foreign'}"]) == 2
    assert "is used and is not a run" in capsys.readouterr().err


def test_the_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "check.html"
    path = recipe(folder, tmp_path, train={"learning_rate": 1e-2})
    assert main(["check", path, "--html", str(page), "--max-duplicates", "none"]) == 0
    printed = capsys.readouterr()
    for part in ("the run", "step zero", "0.693147; known: log 2 = 0.693147", "tree: ", "gain of sharing prompts"):
        assert part in printed.out
    assert f"winner: \u27e6{ROWS[0]['chosen']}</s>\u27e7\n" in printed.out
    assert f"warning: {path}:" in printed.err
    assert "learning_rate" in printed.err
    text = page.read_text()
    assert "known: log 2" in text
    assert "learning_rate" in text


def test_thresholds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(folder, tmp_path)
    found = check(capsys, path, "--no-model", "data.max_length=60", code=1)
    (line,) = found["crossed"]
    assert "are longer than `max_length`; the limit `truncated` is 5.00%" in line
    assert found["model"] is None
    check(capsys, path, "--no-model", "data.max_length=60", "--max-truncated", "1")
    # A recipe's own limit of bad rows holds here.
    assert {one["name"]: one["limit"] for one in found["data"]["limits"]}["bad"] == 0.01
    found = check(capsys, path, "--no-model", "data.max_bad_fraction=0.3")
    assert {one["name"]: one["limit"] for one in found["data"]["limits"]}["bad"] == 0.3


def test_no_row_is_left(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", recipe(folder, tmp_path), "data.max_length=8"]) == 2
    printed = capsys.readouterr()
    assert "none of the 90 rows can be trained on" in printed.err
    assert "too long for `max_length`" in printed.err


def test_a_step_zero_that_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose dropout cannot be switched off differs from its own copy."""
    save_tiny(tmp_path / "gpt2", "gpt2", resid_pdrop=0.4)
    monkeypatch.setattr(preference, "disable_dropout", lambda model: None)
    path = recipe(folder, tmp_path, model={"name": str(tmp_path / "gpt2")})
    assert main(["check", path]) == 2
    printed = capsys.readouterr()
    assert "step zero: policy and reference differ by" in printed.err
    assert "loss at step zero" in printed.out  # what was found is shown all the same
    with pytest.raises(TrainingError):
        main(["check", path, "--debug"])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"name": "./nowhere"}}, ["there is no model folder", "recipe.yaml:"]),
        ({"method": {"name": "dop"}}, ["did you mean", "`dpo`", "recipe.yaml:"]),
        ({"method": {"name": "kto"}, "train": {"global_batch_size": 31}}, ["global_batch_size", "multiple of 2"]),
        ({"data": {"train": ["./nowhere.jsonl"]}}, ["nowhere.jsonl", "recipe.yaml:"]),
        ({"train": {"optim": "adamm"}}, ["adamm"]),
    ],
)
def test_mistakes(
    sections: dict[str, Any], said: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", recipe(folder, tmp_path, **sections)]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    for part in said:
        assert part in printed.err


def test_what_advice_is_told(folder: Path, tmp_path: Path) -> None:
    from align.recipe.check import check as look
    from align.recipe.schema import load

    path = recipe(folder, tmp_path, "labels", method={"name": "kto"}, data={"max_length": 60})
    facts = dataclasses.asdict(look(load(path), with_model=False).facts)
    assert (facts["rows"], facts["desirable"], facts["undesirable"], facts["chat_template"]) == (90, 30, 60, True)
    assert 0.2 < facts["too_long"] < 0.9


@pytest.mark.parametrize("method", [{"name": "soft_dpo"}, {"name": "smpo", "label": "margin"}, {"name": "robust_bt"}])
def test_data_without_what_the_method_is_about(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: dict[str, Any]
) -> None:
    assert main(["check", recipe(folder, tmp_path, method=method), "--max-duplicates", "none"]) == 2
    said = capsys.readouterr().err
    assert f"needs the `{method.get('label', 'probability')}` of each pair" in said
    assert "pairs.jsonl" in said
