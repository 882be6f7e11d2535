"""Sourced warnings: when each speaks, what it says, that none stops a run, and that shipped recipes need none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.core.registry import METHODS
from align.recipe import library, schema
from align.recipe.advice import LOG_RATIO_BETAS, OTHER_SCALES, Advice, Facts, advise, facts_of
from tests.kinds import for_method

BASE = """\
model: {name: some/model}
method: {name: METHOD}
data:
  train: [{name: some/data, split: train}]
  eval: [{name: some/data, split: test}]
train:
  output_dir: runs/x
"""


def advice(tmp_path: Path, *words: str, method: str = "dpo", facts: Facts | None = None) -> list[Advice]:
    path = tmp_path / "recipe.yaml"
    path.write_text(for_method(BASE.replace("METHOD", method), method))
    recipe, given = schema.read(path, words)
    return advise(recipe, given, facts)


@pytest.mark.parametrize("method", sorted(METHODS.entries()))
@pytest.mark.parametrize("adapter", [False, True])
def test_defaults_need_no_advice(tmp_path: Path, method: str, adapter: bool) -> None:
    words = ["model.peft={r: 8}"] if adapter else []
    words += ["reference.guide=some/guide"] if "anchor.guide" in METHODS.get(method)().requires() else []
    assert advice(tmp_path, *words, method=method, facts=Facts(60_000, 0.01, True, 100, 90)) == []


PUBLISHED = [one.name for one in library.shipped() if not one.name.startswith("demo/")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_recipes_need_no_advice(name: str) -> None:
    recipe, given = schema.read(library.find(name).path)
    assert advise(recipe, given, Facts(rows=61_000, too_long=0.0, chat_template=True)) == []


def test_every_method_is_classed() -> None:
    """A new method must say whether its beta is one on summed log-ratios."""
    assert set(METHODS.entries()) <= LOG_RATIO_BETAS | OTHER_SCALES
    assert not LOG_RATIO_BETAS & OTHER_SCALES


LORA = "model.peft={r: 8}"
CASES: list[tuple[str, list[str], Facts | None, str, str]] = [
    # method, overrides, facts, key, a word of it
    ("dpo", ["train.learning_rate=5e-5"], None, "train.learning_rate", "SimPO's authors"),
    ("dpo", ["train.learning_rate=2.1e-6"], None, "train.learning_rate", "above"),
    ("dpo", ["train.learning_rate=9e-8"], None, "train.learning_rate", "below"),
    ("tdpo", ["train.learning_rate=3e-6"], None, "train.learning_rate", "1e-07 to 2e-06"),
    ("orpo", ["train.learning_rate=6e-6"], None, "train.learning_rate", "Mistral-ORPO"),
    ("kto", ["train.learning_rate=6e-6"], None, "train.learning_rate", "HALOs"),
    ("dpo", [LORA, "train.learning_rate=2e-4"], None, "train.learning_rate", "axolotl"),
    ("dpo", [LORA, "train.learning_rate=5e-7"], None, "train.learning_rate", "below"),
    ("dpo", ["method.beta=0.6"], None, "method.beta", "length-normalised"),
    ("dpo", ["method.beta=0.0005"], None, "method.beta", "drift"),
    ("rpo", ["method.beta=2"], None, "method.beta", "hardly moves"),
    ("simpo", ["method.beta=0.1"], None, "method.beta", "SimPO README"),
    ("dpo", ["train.global_batch_size=31"], None, "train.global_batch_size", "128"),
    ("kto", ["train.global_batch_size=8"], None, "train.global_batch_size", "reference point"),
    ("dpo", ["train.num_train_epochs=4"], Facts(rows=60_000), "train.num_train_epochs", "60,000 rows"),
    ("dpo", ["train.max_steps=6000"], Facts(rows=60_000), "train.max_steps", "max_steps: 938"),
    ("dpo", [], Facts(too_long=0.06), "data.max_length", "6.0%"),
    ("dpo", [], Facts(chat_template=False), "data.chat_template", "base model"),
    ("dpo", ["data.train.0.split=test_prefs"], None, "data.train.0", "alignment handbook"),
    ("dpo", ["data.train.0.split=test"], None, "data.train.0", "evaluated on"),
    ("kto", [], Facts(desirable=300, undesirable=100), "method.desirable_weight", "desirable_weight: 0.333"),
    ("kto", [], Facts(desirable=90, undesirable=100), "method.desirable_weight", "90 desirable"),
]


@pytest.mark.parametrize(("method", "words", "facts", "key", "word"), CASES)
def test_what_is_said(tmp_path: Path, method: str, words: list[str], facts: Facts | None, key: str, word: str) -> None:
    (one,) = advice(tmp_path, *words, method=method, facts=facts)
    assert one.key == key and word in str(one)
    assert one.what and one.why and one.mend
    where = f"argument {words[-1]}" if words else str(tmp_path / "recipe.yaml:")
    assert str(one).startswith(f"warning: {where}")


@pytest.mark.parametrize(
    ("method", "words", "facts"),
    [
        ("dpo", ["train.learning_rate=2e-6"], None),
        ("dpo", ["train.learning_rate=1e-7"], None),
        ("dpo", [LORA, "train.learning_rate=5e-5"], None),
        ("dpo", ["method.beta=0.5"], None),
        ("dpo", ["method.beta=0.001"], None),
        ("simpo", ["method.beta=1"], None),
        ("ipo", ["method.tau=1"], None),
        ("dpo", ["train.global_batch_size=32"], None),
        ("kto", ["train.global_batch_size=16"], None),
        ("dpo", ["train.num_train_epochs=3"], Facts(rows=60_000)),
        ("dpo", ["train.num_train_epochs=4"], Facts(rows=100_000)),
        ("orpo", ["train.num_train_epochs=5"], Facts(rows=60_000)),
        ("dpo", ["train.num_train_epochs=9"], None),  # rows are not known
        ("dpo", ["train.max_steps=2800"], Facts(rows=60_000)),
        ("dpo", [], Facts(too_long=0.05)),
        ("dpo", ["data.train.0.split=latest"], None),
        ("sft", ["train.learning_rate=1e-3"], None),
        ("kto", ["method.desirable_weight=0.4"], Facts(desirable=300, undesirable=100)),
    ],
)
def test_at_the_edge_nothing_is_said(tmp_path: Path, method: str, words: list[str], facts: Facts | None) -> None:
    assert advice(tmp_path, *words, method=method, facts=facts) == []


def test_facts_of_a_report() -> None:
    report: dict[str, Any] = {
        "rows": 500,
        "looked": 200,
        "reasons": {"too long for `max_length`": {"count": 20, "rows": []}, "empty": {"count": 7, "rows": []}},
    }

    class Tokenizer:
        chat_template = None

    assert facts_of(report, Tokenizer(), "model") == Facts(500, 0.1, False)
    assert facts_of(report, Tokenizer(), "mine.jinja").chat_template is True


def test_train_prints_them_once_on_stderr_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.testing.tiny import random_pairs, save_tiny

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in random_pairs(8, seed=1)))
    recipe: dict[str, Any] = {
        "model": {"name": str(save_tiny(tmp_path / "model"))},
        "method": "dpo",
        "data": {"train": str(rows), "max_length": 256},
        "train": {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-3, "global_batch_size": 4, "max_steps": 8},
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr()
    assert "warning" not in said.out
    assert said.err.count("warning: ") == 3
    assert f"warning: {path}:" in said.err and "a learning rate of 0.001" in said.err
    assert "4 passes over 8 rows" in said.err and "a global batch of 4" in said.err


def test_batches_of_prompts_and_held_out_prompts(tmp_path: Path) -> None:
    """A group of answers is no pair: its batch and its epochs are not measured by those of pairs; its splits are."""
    few = Facts(rows=100)
    words = ["train.global_batch_size=8", "train.num_train_epochs=20"]
    assert advice(tmp_path, *words, method="grpo", facts=few) == []
    assert [one.key for one in advice(tmp_path, *words, method="online_dpo", facts=few)] == ["train.global_batch_size"]
    (one,) = advice(tmp_path, "data.prompts=[{name: some/data, split: test}]", method="grpo")
    assert one.key == "data.prompts.0" and "trained on and evaluated on" in one.what
