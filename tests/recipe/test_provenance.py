"""What a run's folder keeps, and which folders a run may use."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import CheckpointError, ConfigError
from align.recipe import provenance, rules, schema
from align.recipe.sections import Data, MethodChoice, Model, Recipe, Stream, Train

USES = rules.Uses(view="pairs", reference=True, value=False)


def recipe_in(folder: Path, **train: Any) -> Recipe:
    return Recipe(
        model=Model(name="some/model"),
        method=MethodChoice(name="dpo", options={"beta": 0.1}),
        data=Data(train=(Stream(name="some/data"),)),
        train=Train(output_dir=str(folder), learning_rate=1e-6, **train),
    )


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint."""
    folder = tmp_path / "run"
    provenance.save(recipe_in(folder), USES)
    (folder / "checkpoint-5").mkdir()
    return folder


def test_records_repeat_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = recipe_in(folder)
    provenance.check_output(recipe, USES)
    provenance.save(recipe, USES)
    again = schema.load(folder / "recipe.yaml")
    assert rules.to_yaml(again, USES) == rules.to_yaml(recipe, USES)
    record = json.loads((folder / "provenance.json").read_text())
    assert record["versions"]["torch"].startswith("2.")
    assert record["git"]["align"] is None or len(record["git"]["align"]["commit"]) == 40
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "provenance.json"}


def test_git_state_outside_a_repository(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) is None


def test_the_same_recipe_continues(used: Path) -> None:
    provenance.check_output(recipe_in(used), USES)


@pytest.mark.parametrize(
    "change", [{"tokens_per_micro_batch": 512}, {"logging_steps": 1.0}, {"report_to": "wandb"}], ids=str
)
def test_what_may_change(used: Path, change: dict[str, Any]) -> None:
    provenance.check_output(recipe_in(used, **change), USES)


@pytest.mark.parametrize(
    "change", [{"global_batch_size": 32}, {"seed": 1}, {"max_steps": 9}, {"save_steps": 5.0}], ids=str
)
def test_what_may_not(used: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"train.{next(iter(change))}"):
        provenance.check_output(recipe_in(used, **change), USES)


def test_every_difference_is_listed(used: Path) -> None:
    other = dataclasses.replace(recipe_in(used, seed=3), method=MethodChoice(name="simpo", options={"beta": 2.0}))
    with pytest.raises(ConfigError) as caught:
        provenance.check_output(other, USES)
    for text in ("`method.name`: 'dpo' there, 'simpo' now", "`method.beta`: 0.1 there, 2.0 now", "train.seed"):
        assert text in str(caught.value)
    assert "learning_rate" not in str(caught.value)


def test_a_run_without_a_checkpoint_may_begin_anew(used: Path) -> None:
    (used / "checkpoint-5").rmdir()
    provenance.check_output(recipe_in(used, seed=3), USES)


def test_never_refuses_a_used_folder(used: Path) -> None:
    with pytest.raises(ConfigError, match="is used"):
        provenance.check_output(recipe_in(used, resume="never"), USES)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"used and is not a run[\s\S]*recipe.yaml"):
        provenance.check_output(recipe_in(tmp_path), USES)
    with pytest.raises(ConfigError, match="is a file"):
        provenance.check_output(recipe_in(tmp_path / "thesis.tex"), USES)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("recipe.yaml", "train: {seed: 4}\n", "does not match"),
        ("provenance.json", "{", "cannot be read"),
        ("provenance.json", "{}", "does not match"),
        ("recipe.yaml", "a: [", "cannot be read"),
    ],
)
def test_changed_records_are_refused(used: Path, name: str, text: str, message: str) -> None:
    (used / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        provenance.check_output(recipe_in(used), USES)


def test_resuming_from_elsewhere_needs_the_same_recipe(used: Path, tmp_path: Path) -> None:
    elsewhere = recipe_in(tmp_path / "new", resume=str(used / "checkpoint-5"))
    provenance.check_output(elsewhere, USES)
    with pytest.raises(ConfigError, match=r"train\.seed"):
        provenance.check_output(recipe_in(tmp_path / "new", resume=str(used / "checkpoint-5"), seed=9), USES)


def test_leftovers_of_a_killed_save_do_not_make_a_folder_used(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-3.partial").mkdir()
    (tmp_path / ".recipe.yaml.tmp-00").write_text("half")
    provenance.check_output(recipe_in(tmp_path), USES)


def test_every_recipe_key_that_may_change_exists() -> None:
    known = {f"train.{field.name}" for field in dataclasses.fields(Train)}
    assert {key for key in provenance.MAY_CHANGE if key.startswith("train.")} <= known
