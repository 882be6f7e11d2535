"""Users' mistakes, one table: each gives a clear error and exit code 2, or a counted rejection. Never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.cli.main import main
from align.testing.tiny import random_pairs, save_tiny, tiny_tokenizer

GOOD = random_pairs(12, seed=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model that the cases copy or point at."""
    return save_tiny(tmp_path_factory.mktemp("made") / "model")


class Case:
    """A run that would work; cases break one thing each."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.rows: list[Any] = [dict(row) for row in GOOD]
        self.lines: list[str] | None = None
        self.recipe: dict[str, Any] = {
            "model": {"name": str(model)},
            "method": {"name": "dpo", "beta": 0.1},
            "data": {"train": [str(folder / "rows.jsonl")], "max_length": 200, "max_bad_fraction": 0.0},
            "train": {
                "learning_rate": 1e-4,
                "global_batch_size": 4,
                "max_steps": 2,
                "save_steps": 1,
                "output_dir": str(folder / "out"),
            },
        }
        self.text: str | None = None

    def copy_model(self) -> Path:
        copied = self.folder / "model"
        shutil.copytree(self.model, copied)
        self.recipe["model"]["name"] = str(copied)
        return copied

    def run(self) -> int:
        lines = [json.dumps(row) for row in self.rows] if self.lines is None else self.lines
        (self.folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe) if self.text is None else self.text)
        return main(["train", str(path)])


def each(change: Callable[[dict], None]) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        for row in case.rows:
            change(row)

    return apply


def one(change: Callable[[dict], None]) -> Callable[[Case], None]:
    return lambda case: change(case.rows[3])


def setting(path: str, value: Any) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        *parents, last = path.split(".")
        section: dict = case.recipe
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value

    return apply


def broken_line(case: Case) -> None:
    case.lines = [json.dumps(row) for row in case.rows]
    case.lines[3] = case.lines[3][:20]


def wrong_roles(row: dict) -> None:
    row["prompt"] = [{"role": "user", "content": "hello"}]
    row["chosen"] = [{"role": "user", "content": "I am the user"}]
    row["rejected"] = [{"role": "assistant", "content": "no"}]


def conversational(row: dict) -> None:
    for key in ("prompt", "chosen", "rejected"):
        row[key] = [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}]


def without_template(case: Case) -> None:
    each(conversational)(case)
    folder = case.copy_model()
    tiny_tokenizer(chat_template=False).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def without_eos(case: Case) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    folder = case.copy_model()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def pickled(case: Case) -> None:
    folder = case.copy_model()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def foreign_output(case: Case) -> None:
    out = case.folder / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")


def encoder_decoder(case: Case) -> None:
    folder = case.copy_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5"], "is_encoder_decoder": True})
    )
    assert config


def truncated_checkpoint(case: Case) -> None:
    assert case.run() == 0
    for name in ("checkpoint-1", "checkpoint-2"):
        file = case.folder / "out" / name / "policy" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])


def another_recipe(case: Case) -> None:
    assert case.run() == 0
    case.recipe["method"]["beta"] = 0.3


CASES: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {
    "missing column": (each(lambda row: row.pop("rejected")), ("rejected", "winner")),
    "ambiguous direction": (
        lambda case: setattr(
            case, "rows", [{"prompt": r["prompt"], "a": r["chosen"], "b": r["rejected"], "score": 1} for r in case.rows]
        ),
        ("score", "winner"),
    ),
    "empty completion": (one(lambda row: row.update(chosen="  ")), ("rows.jsonl:3", "chosen", "max_bad_fraction")),
    "identical completions": (one(lambda row: row.update(chosen=row["rejected"])), ("rows.jsonl:3", "identical")),
    "non-string content": (one(lambda row: row.update(chosen=5)), ("rows.jsonl:3", "chosen")),
    "null content": (one(lambda row: row.update(prompt=None)), ("rows.jsonl:3", "prompt")),
    "broken JSON line": (broken_line, ("rows.jsonl:3", "JSON")),
    "a row that is no object": (lambda case: case.rows.__setitem__(3, [1, 2]), ("rows.jsonl:3",)),
    "wrong role order": (lambda case: (each(conversational)(case), wrong_roles(case.rows[3])), ("rows.jsonl:3",)),
    "a missing value in one row": (one(lambda row: row.pop("chosen")), ("rows.jsonl:3", "chosen")),
    "no rows": (lambda case: setattr(case, "lines", [""]), ("rows.jsonl",)),
    "data file missing": (setting("data.train", ["nowhere.jsonl"]), ("nowhere.jsonl",)),
    "all prompts too long": (setting("data.max_length", 8), ("max_length",)),
    "labels for a pair method": (
        lambda case: setattr(
            case, "rows", [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in case.rows]
        ),
        ("better", "label", "winner"),
    ),
    "a label that is no label": (
        lambda case: (
            setattr(
                case,
                "rows",
                [
                    {"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2 == 0}
                    for n, r in enumerate(case.rows)
                ],
            ),
            case.rows[3].update(label="perhaps"),
            case.recipe.update(method={"name": "kto"}),
        ),
        ("rows.jsonl", "label", "perhaps"),
    ),
    "tokenizer without EOS": (without_eos, ("EOS", "eos_token")),
    "tokenizer without chat template": (without_template, ("chat template",)),
    "model folder missing": (setting("model.name", "./no/such/model"), ("no/such/model",)),
    "model folder without a config": (lambda case: (case.copy_model() / "config.json").unlink(), ("config.json",)),
    "pickled weights": (pickled, ("pickle", "safetensors")),
    "encoder-decoder model": (encoder_decoder, ("encoder-decoder",)),
    "truncated checkpoints": (truncated_checkpoint, ("checkpoint",)),
    "misspelt section": (lambda case: case.recipe.update(trian=case.recipe.pop("train")), ("trian", "train")),
    "misspelt option": (setting("train.learning_rat", 1e-4), ("learning_rat", "learning_rate", "recipe.yaml:")),
    "unknown method": (setting("method.name", "smpo_dpo"), ("smpo_dpo",)),
    "another library's name of a method": (setting("method.name", "sigmoid"), ("sigmoid", "dpo")),
    "value out of range": (setting("method.beta", -0.1), ("beta", "-0.1", "> 0", "recipe.yaml:")),
    "value of another type": (setting("train.global_batch_size", "many"), ("global_batch_size", "many")),
    "unused option of the method": (setting("method.gamma_ratio", 0.5), ("gamma_ratio", "recipe.yaml:")),
    "reference for a method without one": (
        lambda case: case.recipe.update(method={"name": "simpo"}, reference={"kind": "frozen"}),
        ("reference",),
    ),
    "best metric without evaluation": (setting("eval.best", "accuracy"), ("eval",)),
    "patience without a metric": (setting("eval.patience", 2), ("patience",)),
    "adapter_off without an adapter": (setting("reference.kind", "adapter_off"), ("adapter",)),
    "no YAML": (lambda case: setattr(case, "text", "model: [unclosed"), ("recipe.yaml",)),
    "a key twice": (
        lambda case: setattr(case, "text", "model: {name: a}\nmodel: {name: b}\n"),
        ("recipe.yaml:2", "model"),
    ),
    "an output folder of somebody else": (foreign_output, ("out",)),
    "another recipe in the same folder": (another_recipe, ("beta",)),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_mistake_gives_a_clear_error(name, made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, words = CASES[name]
    case = Case(tmp_path, made)
    change(case)
    capsys.readouterr()
    assert case.run() == 2
    said = capsys.readouterr().err
    shown = said[said.index("error: ") :]
    assert "Traceback" not in said
    for word in words:
        assert word in shown, shown
    assert len(shown) < 2500


def test_there_are_at_least_25_cases():
    assert len(CASES) >= 25


def test_bad_rows_below_the_limit_are_counted_and_nothing_is_lost(made, tmp_path, capsys):
    case = Case(tmp_path, made)
    case.rows = [dict(row) for row in random_pairs(40, seed=5)]
    case.rows[3]["chosen"] = ""
    case.rows[7]["rejected"] = case.rows[7]["chosen"]
    case.rows[9]["prompt"] = case.rows[9]["prompt"] * 40
    case.recipe["data"]["max_bad_fraction"] = 0.1
    case.recipe["train"].pop("max_steps")
    case.recipe["train"]["save_steps"] = 10
    assert case.run() == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in rejected] == [3, 7, 9]
    manifest = json.loads((tmp_path / "out" / "checkpoint-10" / "manifest.json").read_text())
    train = manifest["info"]["data"]["train"]
    assert train["rows"] == 40 == train["kept"] + train["bad"] + train["dropped"]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(made, tmp_path, capsys, monkeypatch):
    """The second save fails for want of space; the first one stands and the run resumes from it."""
    import errno

    from align.trainers import checkpoints

    case = Case(tmp_path, made)
    real, calls = checkpoints.save_state, []

    def full(folder, *rest):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return real(folder, *rest)

    monkeypatch.setattr(checkpoints, "save_state", full)
    assert case.run() == 2
    said = capsys.readouterr().err
    assert "space" in said and "checkpoint-2" in said and "Traceback" not in said
    assert sorted(p.name for p in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-1"]
    assert case.run() == 0
