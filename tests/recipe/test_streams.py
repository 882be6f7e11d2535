"""Streams of a recipe: how their rows are read, mixed by weight, and every fault with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.core.errors import AlignError, ConfigError, DataError, ErrorList
from align.core.registry import METHODS
from align.data.prepare import open_sources, prepare_data
from align.data.tokenise import Tokeniser
from align.recipe import rules, run, schema
from align.recipe.sections import Recipe
from align.testing.tiny import random_pairs, tiny_tokenizer
from tests.data.known_rows import NECTAR, PKU_ROW, SHP

HEAD = """\
model: some/model
method: dpo
train: {output_dir: runs/x, learning_rate: 1e-6}
data:
  train:
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(*streams: str, base: str = HEAD) -> Path:
        path = tmp_path / "recipe.yaml"
        text = base.replace("model: some/model", "model: {name: some/model}")
        path.write_text(text + "".join(f"    - {stream}\n" for stream in streams), encoding="utf-8")
        return path

    return to_file


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str, list[Any]], Path]:
    def to_file(name: str, values: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, values)) + "\n")
        return path

    return to_file


def faults(path: Path, *overrides: str) -> list[AlignError]:
    with pytest.raises(ConfigError) as caught:
        schema.load(path, overrides)
    error = caught.value
    return list(error.errors) if isinstance(error, ErrorList) else [error]


def plain(recipe: Recipe) -> Any:
    uses = rules.Uses.of(rules.build_method(METHODS.get(recipe.method.name), recipe.method.options))
    return rules.to_yaml(recipe, uses)


def test_every_option_is_read_and_the_resolved_recipe_gives_the_same(write: Write, tmp_path: Path) -> None:
    recipe = schema.load(
        write(
            "{name: a/b, split: s, config: c, data_dir: d, revision: r, columns: {prompt: task, margin: gap}, "
            "winner: {column: label, values: {true: x, false: y}, tie: [same]}, transcripts: messages, chat: true, "
            "ties: drop, diverging: drop, filters: {score: '>= 8', lang: [en, de]}, max_rows: 7, weight: 0.25}",
            "{name: PKU-Alignment/PKU-SafeRLHF, format: pku_saferlhf, axis: safer, filters: recommended}",
        )
    )
    first, second = recipe.data.train
    assert first.columns == {"prompt": "task", "margin": "gap"}
    assert first.winner == {"column": "label", "values": {"true": "x", "false": "y"}, "tie": ["same"]}
    assert (first.ties, first.diverging, first.weight, first.chat) == ("drop", "drop", 0.25, True)
    assert (second.format, second.axis, second.weight) == ("pku_saferlhf", "safer", 1.0)
    assert first.where.endswith("recipe.yaml:6")
    text = plain(recipe)
    assert "where" not in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert schema.load(again) == recipe
    assert yaml.safe_load(text)["data"]["train"][0]["weight"] == 0.25


@pytest.mark.parametrize(
    ("stream", "what", "mend"),
    [
        ("{name: a/b, columns: [prompt]}", "`data.train.0.columns` is ['prompt']", "{PART: COLUMN}"),
        ("{name: a/b, columns: {promt: x}}", "names the part `promt`", "did you mean `prompt`"),
        ("{name: a/b, columns: {prompt: 3}}", "`data.train.0.columns.prompt` is 3", "name of a column"),
        ("{name: a/b, winner: {column: x}}", "`data.train.0.winner` is {'column': 'x'}", "values: {VALUE: COLUMN"),
        ("{name: a/b, winner: 3}", "`data.train.0.winner` is 3", "write a column"),
        ("{name: a/b, winner: {column: x, values: {a: y}}}", "names 1 answer columns, not two", "write a column"),
        ("{name: a/b, format: nectr}", "there is no data format `nectr`", "did you mean `nectar`"),
        ("{name: a/b, format: shp, winner: x}", "`data.train.0.winner` is unused", "`format: columns`"),
        ("{name: a/b, filters: [x]}", "`data.train.0.filters` is ['x']", "column: condition"),
        ("{name: a/b, filters: {x: '>= many'}}", "the condition of `x` is `>= many`", "operator"),
        ("{name: a/b, ties: keepp}", "`ties` is 'keepp'", "'drop', 'keep'"),
        ("{name: a/b, diverging: no}", "`diverging` is 'no'", "'keep', 'drop'"),
        ("{name: a/b, weight: 2}", "`data.train.0.weight` is unused", "remove it"),
        ("{name: a/b, weigth: 2}", "no option `weigth`", "did you mean `weight`"),
        ("{name: DATA, revision: main}", "`data.train.0.revision` is unused", "remove it"),
    ],
)
def test_a_fault_names_its_line_and_the_mend(
    write: Write, rows: Callable[[str, list[Any]], Path], stream: str, what: str, mend: str
) -> None:
    path = write(stream.replace("DATA", str(rows("rows.jsonl", random_pairs(2)))))
    (error,) = faults(path)
    assert what in error.what
    assert mend in error.mend
    assert error.where == f"{path}:6"


def test_faults_of_free_mappings_point_at_their_own_lines(write: Write) -> None:
    path = write("name: a/b\n      columns:\n        prompt: x\n        promt: y\n      filters:\n        n: '>= x'")
    assert [error.where for error in faults(path)] == [f"{path}:9", f"{path}:11"]


def test_evaluation_streams_have_no_weight(write: Write) -> None:
    path = write("{name: a/b}")
    (error,) = faults(path, "data.eval=[{name: c/d, weight: 2}, {name: e/f}]")
    assert "`data.eval.0.weight` is unused" in error.what


def test_all_data_faults_at_once_with_recipe_line_and_file(write: Write, rows: Any) -> None:
    nectar, pku = rows("nectar.jsonl", [NECTAR]), rows("pku.jsonl", [PKU_ROW])
    unknown = rows("unknown.jsonl", [{"prompt": "q", "answer_a": "a", "answer_b": "b", "better": 1}])
    recipe = schema.load(write(f"{{name: {pku}}}", f"{{name: {nectar}}}", f"{{name: {unknown}}}"))
    with pytest.raises(ErrorList) as caught:
        open_sources(run.streams(recipe.data.train), "pairs")
    first, second = caught.value.errors
    assert first.where.endswith(f"recipe.yaml:6: {pku}")
    assert "`axis` does not say which" in first.what
    assert second.where.endswith(f"recipe.yaml:8: {unknown}")
    assert "no name tells which wins" in second.what
    assert "better: int 1" in second.why
    assert "winner: {column: LABEL" in second.mend
    missing = schema.load(write("{name: no/such-set}"))
    with pytest.raises(DataError, match=r"recipe.yaml:6: (.|\n)*cannot be loaded from the hub"):
        open_sources(run.streams(missing.data.train))


def test_a_recipe_reads_known_sets_and_mixes_them(write: Write, rows: Any) -> None:
    shp = rows("shp.jsonl", [{**SHP, "history": f"q{n}", "score_ratio": 1.0 + n} for n in range(30)])
    pairs = rows("pairs.jsonl", random_pairs(90, seed=1))
    recipe = schema.load(
        write(f"{{name: {shp}, weight: 1, filters: recommended}}", f"{{name: {pairs}, weight: 3, chat: true}}")
    )
    prepared = prepare_data(run.streams(recipe.data.train), Tokeniser(tiny_tokenizer(), "pairs"))
    assert prepared.mixture is not None
    assert prepared.mixture.counts == (30, 90)
    assert prepared.report["reasons"] == {
        "`score_ratio`: filtered out: not >= 2": {"count": 1, "rows": [f"{shp}:1"]},
    }
    for batch in list(prepared.sampler(8, seed=0))[:-1]:
        assert abs(sum(row < 30 for row in batch) - 2) <= 1
    described = prepared.report["read_as"]
    assert described[str(shp)].startswith("read as: pairs of `shp`, `labels` 1: `human_ref_A` is better")


def test_streams_of_a_base_recipe_are_inherited(write: Write, tmp_path: Path) -> None:
    write("{name: a/b, columns: {prompt: task}, winner: {chosen: x, rejected: y}}")
    path = tmp_path / "own.yaml"
    path.write_text("extends: recipe.yaml\ntrain: {output_dir: runs/y}\n")
    (stream,) = schema.load(path).data.train
    assert stream.winner == {"chosen": "x", "rejected": "y"}
    assert stream.where.endswith("recipe.yaml:6")
