"""Recipes: what is filled in, and every fault at once with its line and its mending."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from align.core.errors import ConfigError, ErrorList
from align.core.registry import METHODS
from align.recipe import rules, schema
from align.recipe.sections import Recipe
from tests.kinds import for_method

GOOD = """\
model:
  name: some/model
  peft: {r: 8, lora_alpha: 16}
method: {name: dpo, beta: 2e-1}
data:
  train:
    - some/data
    - {name: other/data, split: train, max_rows: 100}
  eval: some/held-out
train:
  learning_rate: 1e-6
  global_batch_size: 16
  output_dir: runs/x
eval: {every: 0.5, best: loss, patience: 3}
provenance: {paper: 2405.10470, claim: none}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str = GOOD) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return to_file


def uses(recipe: Recipe) -> rules.Uses:
    return rules.Uses.of(rules.build_method(METHODS.get(recipe.method.name), recipe.method.options))


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        schema.load(path, overrides)
    error = caught.value
    return [str(one) for one in (error.errors if isinstance(error, ErrorList) else (error,))]


def test_a_good_recipe(write: Write) -> None:
    recipe = schema.load(write())
    assert recipe.model.peft is not None
    assert (recipe.model.peft.r, recipe.model.peft.lora_alpha, recipe.model.peft.target_modules) == (
        8,
        16,
        "all-linear",
    )
    assert recipe.method.options == {"beta": 0.2}
    assert [(stream.name, stream.split, stream.max_rows) for stream in recipe.data.train] == [
        ("some/data", None, None),
        ("other/data", "train", 100),
    ]
    assert [stream.name for stream in recipe.data.eval] == ["some/held-out"]
    assert (recipe.train.learning_rate, recipe.train.global_batch_size) == (1e-6, 16)
    assert (recipe.eval.every, recipe.eval.best, recipe.eval.patience) == (0.5, "loss", 3)
    assert recipe.provenance.paper == "2405.10470"


def test_overrides_in_every_spelling(write: Write) -> None:
    words = ["train.seed=7", "--train.max_steps", "3", "--model.peft=null", "data.train.1.max_rows=5", "method.beta=1"]
    recipe = schema.load(write(), words)
    assert (recipe.train.seed, recipe.train.max_steps, recipe.model.peft) == (7, 3, None)
    assert (recipe.data.train[1].max_rows, recipe.method.options) == (5, {"beta": 1.0})


def guide_for(name: str) -> list[str]:
    """The override that a method which needs a guide cannot do without."""
    return ["reference.guide=some/guide"] if "anchor.guide" in METHODS.get(name)().requires() else []


def test_a_method_with_a_guide_asks_for_it_and_others_refuse_it(write: Write) -> None:
    (fault,) = faults(write(GOOD.replace("{name: dpo, beta: 2e-1}", "tgdpo")))
    assert "needs a trained policy as its guide" in fault
    (fault,) = faults(write(), "reference.guide=some/guide")
    assert "`dpo` has no guide" in fault


@pytest.mark.parametrize("name", sorted(METHODS.entries()))
def test_a_resolved_recipe_gives_itself(write: Write, name: str) -> None:
    text = for_method(GOOD.replace("{name: dpo, beta: 2e-1}", name), name)
    recipe = schema.load(write(text), guide_for(name))
    again = schema.load(write(rules.to_yaml(recipe, uses(recipe))))
    assert rules.to_yaml(again, uses(again)) == rules.to_yaml(recipe, uses(recipe))
    assert (again.train, again.data, again.model, again.eval) == (recipe.train, recipe.data, recipe.model, recipe.eval)


def test_learning_rates_by_method_and_adapter(write: Write) -> None:
    text = GOOD.replace("  learning_rate: 1e-6\n", "")
    full = {
        name: schema.load(
            write(for_method(text.replace("{name: dpo, beta: 2e-1}", name), name)),
            ["model.peft=null", *guide_for(name)],
        ).train.learning_rate
        for name in METHODS.entries()
    }
    assert (full["dpo"], full["simpo"], full["orpo"], full["sft"]) == (5e-7, 1e-6, 5e-6, 2e-5)
    assert all(rate is not None and 1e-7 <= rate <= 2e-5 for rate in full.values())
    assert schema.load(write(text)).train.learning_rate == pytest.approx(5e-6)


def test_all_faults_at_once_with_their_lines(write: Write) -> None:
    path = write("""\
        model:
          nme: x
          dtype: float8
        metod: dpo
        method:
          name: dpo
          beta: -1
          gamma_ratio: 0.3
        data:
          train: [{name: a, splt: train}]
          max_length: many
        train:
          lr: 1e-6
          seed: 1.5
          gradient_accumulation_steps: 4
    """)
    found = faults(path)
    expected = {
        2: "did you mean `name`",
        1: "`model` needs `name`",
        3: "'bfloat16'",
        4: "did you mean `method`",
        7: "> 0",
        8: "an option of `simpo`",
        10: "did you mean `split`",
        11: "type int",
        12: "`train` needs `output_dir`",
        13: "has no option `lr`",
        14: "type int",
        15: "train.global_batch_size",
    }
    assert len(found) == len(expected)
    for line, text in expected.items():
        assert any(one.startswith(f"{path}:{line}: ") and text in one for one in found), (line, text, found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.name=dapo"], "online"),
        (["method.name=simp"], "did you mean `simpo`"),
        (["method=null"], "the section `method` is missing"),
        (["method.name=3"], "`method.name` is missing"),
        (["method.name=no_such_module:M"], "cannot import"),
        (["method.label_smoothing=0.1"], "`dpo` does not use `label_smoothing`"),
        (["method.learning_rate=1"], "`learning_rate` belongs to `train`"),
        (["train.beta=1"], "option of a method"),
        (["train.learning_rate=0"], "> 0"),
        (["train.learning_rate=nan"], "finite"),
        (["train.learning_rate=fast"], "type float"),
        (["train.global_batch_size=0"], ">= 1"),
        (["train.global_batch_size=true"], "type int"),
        (["train=null"], "the section `train` is missing"),
        (["train=5"], "not a mapping"),
        (["train.lr_scheduler_type=cosin"], "'cosine'"),
        (["train.resume=nowhere"], "no checkpoint folder"),
        (["train.warmup_ratio=0.1"], "share of the run"),
        (["train.report_to=wandbb"], "'wandb'"),
        (["train.report_to=clearml"], "`clearml` is not installed"),
        (["model.peft.lora_alfa=8"], "did you mean `lora_alpha`"),
        (["model.peft.target_modules=[1]"], "list of module names"),
        (["model.peft.r=0"], ">= 1"),
        (["model.peft=8"], "not a mapping"),
        (["model.name=./nowhere"], "no model folder"),
        (["data.train=[]"], "is empty"),
        (["data.train=null"], "`data.train` is missing"),
        (["data.train=nowhere.jsonl"], "there is no `nowhere.jsonl`"),
        (["data.train.0=./nowhere"], "there is no `./nowhere`"),
        (["data.train.1.weight=0"], "> 0"),
        (["data.train.1.max_rows=0"], ">= 1"),
        (["data.chat_template=nowhere.jinja"], "no chat template"),
        (["data.max_bad_fraction=2"], "<= 1"),
        (["reference.kind=adapter_off", "model.peft=null"], "without an adapter"),
        (["rollout.prompts=3"], "`rollout` is unused"),
        (["rolout.prompts=3"], "unknown section `rolout`"),
    ],
)
def test_faults(write: Write, overrides: list[str], message: str) -> None:
    assert any(message in one for one in faults(write(), *overrides))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["method=simpo", "reference.kind=frozen"], "reference.kind"),
        (["reference.decay=0.5"], "reference.decay"),
        (["reference.kind=frozen", "reference.every=5"], "reference.every"),
        (["reference.cache_dir=x"], "reference.cache_dir"),
        (["reference.kind=ema", "reference.model=x"], "reference.model"),
        (["train.max_steps=5", "train.num_train_epochs=2"], "train.num_train_epochs"),
        (["train.lr_scheduler_type=constant", "train.warmup_steps=5"], "train.warmup_steps"),
        (["train.value_learning_rate=1e-4"], "train.value_learning_rate"),
        (["method=kto", "data.pairs=all"], "data.pairs"),
        (["eval.best=null"], "eval.patience"),
        (["eval.every=null"], "data.eval"),
    ],
)
def test_what_nothing_reads_is_an_error(write: Write, overrides: list[str], key: str) -> None:
    assert any(f"`{key}` is unused" in one for one in faults(write(), *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["reference.kind=ema", "reference.decay=0.5", "reference.every=5"],
        ["reference.kind=cached", "reference.cache_dir=x", "reference.model=y"],
        ["method=tdpo", "reference.kind=frozen"],
        ["method=dro_v", "train.value_learning_rate=1e-4"],
        ["data.pairs=all"],
        ["train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=5"],
    ],
)
def test_what_something_reads_is_not(write: Write, overrides: list[str]) -> None:
    schema.load(write(), overrides)


def test_a_revision_of_a_folder_is_unused(write: Write, tmp_path: Path) -> None:
    assert "model.revision" in faults(write(), f"model.name={tmp_path}", "model.revision=main")[0]


def test_a_method_from_outside(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_method.py").write_text(
        "from align.methods.base import Method, method, option\n"
        '@method("own", view="pairs")\n'
        "class Own(Method):\n"
        "    '''Own.'''\n"
        '    weight: float = option(1.0, above=0, doc="weight")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write(GOOD.replace("{name: dpo, beta: 2e-1}", "{name: 'own_method:Own', weight: 2}"))
    assert schema.load(path).method.options == {"weight": 2.0}
    assert "did you mean `weight`" in faults(path, "method.wieght=3")[0]
