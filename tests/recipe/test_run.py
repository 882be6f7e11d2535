"""What a recipe becomes: every option reaches the trainer's arguments, and values that libraries refuse are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.core.errors import ConfigError
from align.core.options import declared
from align.data.prepare import SourceSpec
from align.recipe import run
from align.recipe.sections import Data, Eval, MethodChoice, Model, Peft, Recipe, Reference, Stream, Train

CHANGED: dict[str, Any] = {
    "model": Model(name="m", dtype="bfloat16", backend="padded", gradient_checkpointing=True, trust_remote_code=True),
    "data": Data(
        train=(Stream(name="d"),),
        eval=(Stream(name="e"),),
        score="all",
        chat_template="t.jinja",
        max_length=77,
        truncation="cut_prompt",
        pairs="all",
        max_bad_fraction=0.5,
        shuffle=False,
    ),
    "reference": Reference(kind="ema", model="r", guide="g", previous="v", cache_dir="c", decay=0.25, every=9),
    "eval": Eval(every=0.25, best="accuracy", patience=4),
}
TRAIN: dict[str, Any] = {
    "learning_rate": 3e-4,
    "global_batch_size": 24,
    "num_train_epochs": 2.5,
    "max_steps": 11,
    "warmup_steps": 3.0,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.2,
    "max_grad_norm": 0.7,
    "optim": "adafactor",
    "seed": 5,
    "tokens_per_micro_batch": 333,
    "value_learning_rate": 1e-3,
    "value_max_grad_norm": 0.3,
    "logging_steps": 2.0,
    "save_steps": 3.0,
    "save_total_limit": 1,
    "resume": "never",
    "report_to": "none",
}
RENAMED = {
    "reference.kind": "reference",
    "reference.model": "reference_model",
    "reference.guide": "guide_model",
    "reference.previous": "previous_model",
    "reference.cache_dir": "reference_cache",
    "reference.decay": "ema_decay",
    "reference.every": "ema_every",
    "eval.every": "eval_every",
    "eval.best": "best_metric",
}
ELSEWHERE = {"model.name", "model.revision"}


def recipe(folder: Path, **train: Any) -> Recipe:
    chosen = MethodChoice(name="dpo", options={"beta": 0.1})
    return Recipe(method=chosen, train=Train(output_dir=str(folder), **(TRAIN | train)), **CHANGED)


def test_every_option_reaches_the_arguments(tmp_path: Path) -> None:
    given = recipe(tmp_path)
    made = run.arguments(given)
    for section in ("model", "data", "reference", "train", "eval"):
        for name, *_ in declared(type(getattr(given, section))):
            key = f"{section}.{name}"
            if key not in ELSEWHERE:
                found = getattr(made, RENAMED.get(key, name))
                found = getattr(found, "value", found)
                value = getattr(getattr(given, section), name)
                assert found in (value, [] if value == "none" else value), key


def test_the_test_changes_every_option(tmp_path: Path) -> None:
    """Else an option that is dropped would keep its default and go unnoticed."""
    given = recipe(tmp_path)
    for section in ("model", "data", "reference", "train", "eval"):
        for name, field, *_ in declared(type(getattr(given, section))):
            if f"{section}.{name}" not in {*ELSEWHERE, "train.report_to"}:
                assert getattr(getattr(given, section), name) != field.default, f"{section}.{name}"


def test_a_constant_rate_has_no_warm_up(tmp_path: Path) -> None:
    made = run.arguments(recipe(tmp_path, lr_scheduler_type="constant", warmup_steps=0.1))
    assert made.warmup_steps == 0


def test_what_transformers_refuses_is_a_configuration_error(tmp_path: Path) -> None:
    given = recipe(tmp_path, optim="adamw_torhc")
    with pytest.raises(ConfigError, match="adamw_torhc"):
        run.arguments(given)


def test_processes_that_do_not_see_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.trainers.AlignConfig", lambda **values: SimpleNamespace(world_size=1, **values))
    assert run.arguments(recipe(tmp_path)).use_cpu is False
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched"):
        run.arguments(recipe(tmp_path))


def test_every_adapter_option_reaches_peft() -> None:
    changed = Peft(
        r=4,
        lora_alpha=9.0,
        lora_dropout=0.1,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        bias="all",
        use_rslora=True,
    )
    made = run._peft(changed)
    for field in dataclasses.fields(Peft):
        value = getattr(changed, field.name)
        assert value != field.default
        found = getattr(made, field.name)
        assert (sorted(found) if isinstance(found, set) else found) == value, field.name
    assert run._peft(None) is None


def test_every_stream_option_reaches_the_trainer() -> None:
    stream = Stream(name="~/d", split="s", winner="w", max_rows=3)
    made = run._stream(stream)
    assert made == {**dataclasses.asdict(stream), "name": str(Path("~/d").expanduser())}
    assert set(made) == set(SourceSpec.__dataclass_fields__)
    assert {field.name for field in dataclasses.fields(Stream)} == set(made)
