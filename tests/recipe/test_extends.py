"""`extends`: what a recipe over another one becomes, where its faults point, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from align.core.errors import ConfigError, ErrorList
from align.core.registry import METHODS
from align.recipe import extends, library, rules, schema

BASE = """\
model: {name: some/model, peft: {r: 8, lora_alpha: 16}}
method: {name: dpo, beta: 0.2}
data:
  train: [a/b, c/d]
  eval: e/f
  max_length: 512
train:
  output_dir: runs/x
  learning_rate: 1e-6
  num_train_epochs: 2
  warmup_steps: 0.2
eval: {every: 0.5, best: accuracy}
provenance: {paper: "1", claim: "of the base"}
"""


def write(folder: Path, **files: str) -> Path:
    """Files by stem; the path of the last."""
    for stem, text in files.items():
        (folder / f"{stem}.yaml").write_text(text)
    return folder / f"{stem}.yaml"


def test_mappings_merge_and_the_rest_replaces(tmp_path: Path) -> None:
    top = write(
        tmp_path,
        base=BASE,
        top="extends: base.yaml\nmodel: {peft: {r: 32}}\ndata: {train: [x/y]}\ntrain: {seed: 7}\n",
    )
    plain, base = extends.read(top).plain(), yaml.safe_load(BASE)
    assert "extends" not in plain
    assert plain["model"] == {"name": "some/model", "peft": {"r": 32, "lora_alpha": 16}}
    assert plain["data"] == {"train": ["x/y"], "eval": "e/f", "max_length": 512}
    assert plain["train"]["seed"] == 7 and plain["train"]["output_dir"] == "runs/x"
    assert plain["method"] == base["method"]


def test_a_chain_and_overrides_on_top(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text(BASE)
    top = write(
        tmp_path,
        middle="extends: below/base.yaml\ntrain: {learning_rate: 2e-6, seed: 1}\n",
        top="extends: ./middle.yaml\ntrain: {seed: 2}\n",
    )
    recipe = schema.load(top, ["train.seed=3", "--method.beta", "0.3"])
    assert (recipe.train.seed, recipe.train.learning_rate, recipe.train.num_train_epochs) == (3, 2e-6, 2.0)
    assert recipe.method.options == {"beta": 0.3}


def test_another_method_replaces_the_whole_method(tmp_path: Path) -> None:
    other = write(tmp_path, base=BASE, top="extends: base.yaml\nmethod: {name: orpo, lambda: 0.2}\n")
    assert schema.load(other).method.options == {"lambda": 0.2}
    same = write(tmp_path, top="extends: base.yaml\nmethod: {name: dpo}\n")
    assert schema.load(same).method.options == {"beta": 0.2}
    short = write(tmp_path, top="extends: base.yaml\nmethod: simpo\n")
    assert schema.load(short).method.name == "simpo"
    bare = write(
        tmp_path, base=BASE.replace("{name: dpo, beta: 0.2}", "dpo"), top="extends: base.yaml\nmethod: {beta: 0.4}\n"
    )
    assert schema.load(bare).method.options == {"beta": 0.4}


def test_provenance_is_not_inherited(tmp_path: Path) -> None:
    assert schema.load(write(tmp_path, base=BASE, top="extends: base.yaml\n")).provenance.claim == ""


def test_null_takes_a_section_out(tmp_path: Path) -> None:
    recipe = schema.load(write(tmp_path, base=BASE, top="extends: base.yaml\nmodel: {peft: null}\n"))
    assert recipe.model.peft is None and recipe.train.learning_rate == 1e-6


@pytest.mark.parametrize("by_override", [False, True])
def test_what_an_option_makes_void_below_is_taken_out(tmp_path: Path, by_override: bool) -> None:
    """Else `max_steps` could never be set over a file that counts in epochs."""
    words = ["train.max_steps=5", "train.lr_scheduler_type=constant", "data.eval=null"]
    if by_override:
        recipe = schema.load(write(tmp_path, base=BASE), words)
    else:
        text = "extends: base.yaml\ntrain: {max_steps: 5, lr_scheduler_type: constant}\ndata: {eval: null}\n"
        recipe = schema.load(write(tmp_path, base=BASE, top=text))
    assert recipe.train.max_steps == 5 and recipe.data.eval == () and recipe.eval.every is None


def test_what_stands_side_by_side_is_still_a_fault(tmp_path: Path) -> None:
    top = write(tmp_path, base=BASE, top="extends: base.yaml\ntrain: {max_steps: 5, num_train_epochs: 3}\n")
    with pytest.raises(ConfigError, match=r"`train.num_train_epochs` is unused"):
        schema.load(top)
    steps = write(
        tmp_path,
        base=BASE.replace("num_train_epochs: 2", "max_steps: 9"),
        top="extends: base.yaml\ntrain: {num_train_epochs: 3}\n",
    )
    with pytest.raises(ConfigError, match=r"`train.num_train_epochs` is unused"):
        schema.load(steps)


def test_faults_point_to_the_file_and_line_where_it_was_written(tmp_path: Path) -> None:
    top = write(
        tmp_path,
        base=BASE.replace("max_length: 512", "max_length: many"),
        top="extends: base.yaml\n\ntrain:\n  sead: 1\n",
    )
    with pytest.raises(ErrorList) as caught:
        schema.load(top)
    said = [str(one) for one in caught.value.errors]
    assert any(one.startswith(f"{tmp_path / 'base.yaml'}:6: ") and "many" in one for one in said)
    assert any(one.startswith(f"{top}:4: ") and "did you mean `seed`" in one for one in said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: [a.yaml, b.yaml]\n", "a base may extend another"),
        ("extends: 3\n", "`extends` is 3"),
        ("extends: ''\n", "`extends` is ''"),
        ("extends: bass.yaml\n", "did you mean `base.yaml`"),
        ("extends: no/such/folder.yaml\n", "correct the path"),
        ("extends: mistral-7b/dpq\n", "did you mean `mistral-7b/dpo`"),
        ("extends: dpo\n", "may be any of"),
        ("extends: top.yaml\n", "goes in a circle"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    top = write(tmp_path, base=BASE, top=text)
    with pytest.raises(ConfigError, match=message) as caught:
        schema.load(top)
    assert str(caught.value).startswith(f"{top}:1: ")


def test_circles_of_several_and_bases_that_are_broken(tmp_path: Path) -> None:
    write(tmp_path, one="extends: two.yaml\n", two="extends: three.yaml\n", three="\nextends: one.yaml\n")
    with pytest.raises(ConfigError, match=r"one.yaml -> .*two.yaml -> .*three.yaml -> .*one.yaml") as caught:
        schema.load(tmp_path / "one.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'three.yaml'}:2: ")
    write(tmp_path, one="extends: two.yaml\n", two="model: [\n")
    with pytest.raises(ConfigError, match=r"two.yaml:\d+: is not YAML"):
        schema.load(tmp_path / "one.yaml")


def test_extends_is_no_override_and_belongs_to_the_top(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE)
    for words in (["extends=x.yaml"], ["--extends", "x.yaml"]):
        with pytest.raises(ConfigError, match="cannot be an override"):
            schema.load(path, words)
    with pytest.raises(ConfigError, match="no option `extends`"):
        schema.load(write(tmp_path, top=BASE.replace("method: {", "method: {extends: x.yaml, ")))


def test_a_resolved_recipe_stands_alone(tmp_path: Path) -> None:
    recipe = schema.load(library.find("qwen3-8b/dpo-qlora").path)
    uses = rules.Uses.of(rules.build_method(METHODS.get(recipe.method.name), recipe.method.options))
    text = rules.to_yaml(recipe, uses)
    assert "extends" not in text
    assert rules.to_yaml(schema.load(write(tmp_path, alone=text)), uses) == text


def test_a_shipped_recipe_as_base(tmp_path: Path) -> None:
    top = write(tmp_path, mine="extends: mistral-7b/dpo\ntrain: {output_dir: runs/mine}\n")
    assert schema.load(top).train.learning_rate == 5e-7


def test_a_shipped_recipe_is_loaded_by_its_full_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert schema.load("mistral-7b/dpo", ["train.seed=1"]).train.seed == 1
    with pytest.raises(ConfigError, match="cannot be read"):
        schema.load("mistral-7b/dpp")
