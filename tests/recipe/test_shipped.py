"""Every shipped recipe: found, resolved, sourced, and run for two steps on a tiny model of its architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import ConfigError
from align.recipe import library, run, schema
from align.testing.tiny import random_pairs, save_tiny

FAMILIES = {
    "gemma-2-9b-it": "gemma2",
    "llama-3-8b": "llama",
    "llama-3-8b-instruct": "llama",
    "mistral-7b": "mistral",
    "mistral-7b-instruct": "mistral",
    "pythia-2.8b": "gpt_neox",
    "qwen2.5-0.5b-instruct": "qwen2",
    "qwen2.5-7b-instruct": "qwen2",
    "qwen3-8b": "qwen3",
    "smollm2-1.7b": "llama",
    "smollm2-360m": "llama",
}
BATCH = 4
"""Instead of the published 32 to 128, which would take minutes in bfloat16 on a CPU."""
NAMES = [one.name for one in library.shipped() if not one.name.startswith("demo/")]
"""Those with published numbers; `align demo` runs its own."""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ultrafeedback(row: dict[str, Any], number: int) -> dict[str, Any]:
    chosen, rejected = ([user(row["prompt"]), assistant(row[name])] for name in ("chosen", "rejected"))
    scores = {"score_chosen": 8.5, "score_rejected": 6.0}
    return {
        "prompt": row["prompt"],
        "prompt_id": str(number),
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        **scores,
    }


def generated(row: dict[str, Any], number: int) -> dict[str, Any]:
    texts = [row["chosen"], row["rejected"]]
    return {
        "prompt_id": str(number),
        "prompt": row["prompt"],
        "all_generated_responses": texts,
        "all_rm_scores": [0.5, 0.25],
        "chosen": [user(row["prompt"]), assistant(texts[0])],
        "rejected": [user(row["prompt"]), assistant(texts[1])],
    }


def argilla(row: dict[str, Any], number: int) -> dict[str, Any]:
    made = ultrafeedback(row, number)
    kept = {name: made[name] for name in ("prompt", "chosen", "rejected")}
    ratings = {"chosen-rating": 5.0, "rejected-rating": 4.0}
    return {"source": "sharegpt", **kept, **ratings, "chosen-model": "a", "rejected-model": "b"}


def hh(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[name]}" for name in ("chosen", "rejected")}


def kto_mix(row: dict[str, Any], number: int) -> dict[str, Any]:
    good = number % 2 == 0
    answer = row["chosen" if good else "rejected"]
    return {"prompt": [user(row["prompt"])], "completion": [assistant(answer)], "label": good}


COLUMNS = {
    "HuggingFaceH4/ultrafeedback_binarized": ultrafeedback,
    "princeton-nlp/llama3-ultrafeedback": generated,
    "princeton-nlp/llama3-ultrafeedback-armorm": generated,
    "princeton-nlp/mistral-instruct-ultrafeedback": generated,
    "princeton-nlp/gemma2-ultrafeedback-armorm": generated,
    "argilla/ultrafeedback-binarized-preferences-cleaned": argilla,
    "Anthropic/hh-rlhf": hh,
    "trl-lib/kto-mix-14k": kto_mix,
}
"""Data set -> a made-up row in its own columns."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(root / family, family) for family in set(FAMILIES.values())}


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    published = schema.load(library.find(name).path)
    made = [
        COLUMNS[published.data.train[0].name](row, number) for number, row in enumerate(random_pairs(2 * BATCH, seed=2))
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    words = [
        f"model.name={models[FAMILIES[name.partition('/')[0]]]}",
        f"data.train=[{rows}]",
        f"train.output_dir={tmp_path / 'out'}",
        "train.max_steps=2",
        f"train.global_batch_size={BATCH}",
        "data.eval=null",
    ]
    recipe = schema.load(library.find(name).path, words)
    assert recipe.train.learning_rate == published.train.learning_rate and recipe.method == published.method
    trainer = run.prepare(recipe)
    trainer.train()
    assert trainer.state.global_step == 2
    assert (tmp_path / "out" / "policy" / "config.json").is_file() or recipe.model.peft is not None
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert losses and all(0 < loss < 100 for loss in losses)


def test_a_null_takes_out_what_the_base_has() -> None:
    recipe = schema.load(library.find("mistral-7b/dpo-qlora").path)
    assert recipe.model.quantization is not None and recipe.model.quantization.load_in_4bit
    assert recipe.model.peft is not None and recipe.model.peft.r == 128
    plain = schema.load(library.find("mistral-7b/dpo-lora").path)
    assert plain.model.quantization is None and plain.model.peft == recipe.model.peft


@pytest.mark.parametrize("name", NAMES)
def test_provenance_is_the_files_own(name: str) -> None:
    """A claim is of one recipe's numbers; and what shipped says of itself must be there."""
    one = library.find(name)
    recipe, given = schema.read(one.path)
    assert recipe.provenance.paper and recipe.provenance.claim and recipe.provenance.checked
    assert given["provenance.claim"].startswith(str(one.path))
    assert one.title.endswith(".") and len(one.title) < 120
    assert recipe.train.output_dir == "runs/" + name.replace("/", "-")
    for stream in recipe.data.train:
        assert stream.name in COLUMNS and "test" not in (stream.split or "")


@pytest.mark.parametrize("path", library.launchers(), ids=lambda path: path.stem)
def test_accelerate_takes_the_launchers(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes, config.use_cpu) == (1, 8, False)
    words = ["--config_file", str(path), "-m", "align", "train", "x.yaml"]
    given, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert given.num_processes == 8 and given.mixed_precision == "no"
    assert given.multi_gpu == (path.stem == "ddp") and given.use_deepspeed == (path.stem != "ddp")
    if path.stem != "ddp":
        assert given.zero_stage == int(path.stem[-1]) and str(given.gradient_clipping) == "auto"
        if path.stem == "zero3":
            assert given.zero3_save_16bit_model is True  # else no model file would be written, and the run is refused


def test_names(tmp_path: Path) -> None:
    assert library.find("kto-lora").name == "qwen2.5-0.5b-instruct/kto-lora"
    with pytest.raises(ConfigError, match="may be any of"):
        library.find("dpo")
    with pytest.raises(ConfigError, match="did you mean `llama-3-8b/simpo`"):
        library.find("llama-3-8b/simp")
    with pytest.raises(ConfigError, match="recipes list"):
        library.find("zzz")


def test_recipes_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import align

    installed = tmp_path / "align"
    (installed / "recipes" / "accelerate").mkdir(parents=True)
    (installed / "recipes" / "mine.yaml").write_text("# Mine.\n")
    monkeypatch.setattr(align, "__file__", str(installed / "__init__.py"))
    assert [one.name for one in library.shipped()] == ["mine"]
    monkeypatch.setattr(align, "__file__", str(tmp_path / "elsewhere" / "align" / "__init__.py"))
    with pytest.raises(ConfigError, match="install the package again"):
        library.shipped()
