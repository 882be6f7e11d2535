"""4-bit weights under an adapter: step zero, the reference, two steps, and what is refused; bitsandbytes on CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.cli.main import main
from align.core.errors import ConfigError, MissingExtra
from align.recipe import run, schema
from align.testing.tiny import random_pairs, save_tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install .[quantized]"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("quantized") / "model", hidden_size=64, num_attention_heads=4)


def write(folder: Path, weights: Path, /, **changes: dict[str, Any]) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in random_pairs(16, seed=3)))
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name": str(weights), "peft": {"r": 4, "lora_alpha": 8}, "quantization": {"load_in_4bit": True}},
        "method": {"name": "dpo"},
        "data": {"train": str(rows), "max_length": 200},
        "train": {"learning_rate": 1e-2, "global_batch_size": 8, "max_steps": 2, "output_dir": str(folder / "out")},
    }
    for section, values in changes.items():
        recipe.setdefault(section, {}).update(values)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_zero_holds_and_two_steps_train(model: Path, tmp_path: Path, dtype: str) -> None:
    recipe = schema.load(
        write(tmp_path, model, model={"dtype": dtype}, train={"logging_steps": 1, "lr_scheduler_type": "constant"})
    )
    trainer = run.prepare(recipe)
    policy = trainer.model.policy
    layers = [module for module in policy.modules() if type(module).__module__ == "bitsandbytes.nn.modules"]
    assert len(layers) == 14 and all(layer.weight.dtype == torch.uint8 for layer in layers)
    before = {name: value.clone() for name, value in policy.named_parameters()}
    assert trainer.reference.kind == "adapter_off" and trainer.expect_equal
    trainer.train()  # step zero is asserted inside: policy and reference are one model in 4 bits
    after = dict(policy.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all("lora_" in name for name in moved)
    assert all(after[name].dtype == torch.float32 for name in moved)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=2e-3) and losses[1] != losses[0]
    assert (tmp_path / "out" / "policy" / "adapter_model.safetensors").is_file()


def test_the_kernel_that_repacks_weights_would_break_step_zero(model: Path) -> None:
    """What `one_kernel` is for: in evaluation mode a layer must give what it gives in training mode."""
    from transformers import BitsAndBytesConfig

    from align.trainers.loading import load_model

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = load_model(str(model), torch.float32, quantization=config)
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        training, evaluation = loaded.train()(ids).logits, loaded.eval()(ids).logits
    assert torch.equal(training, evaluation)
    plain = load_model(str(model), torch.float32)
    with torch.no_grad():
        assert not torch.allclose(plain(ids).logits, evaluation, atol=1e-3)  # it is quantised


def test_a_frozen_reference_is_quantised_like_the_policy(model: Path, tmp_path: Path) -> None:
    recipe = schema.load(write(tmp_path, model, reference={"kind": "frozen"}))
    trainer = run.prepare(recipe)
    assert trainer.expect_equal
    trainer.train()


def test_the_cache_tells_quantised_references_from_plain_ones(model: Path, tmp_path: Path) -> None:
    kept = {"kind": "cached", "cache_dir": str(tmp_path / "cache")}
    for bits in (True, False):
        folder = tmp_path / str(bits)
        folder.mkdir()
        path = write(folder, model, reference=kept, model={"quantization": {"load_in_4bit": bits}})
        run.prepare(schema.load(path)).train()  # the second fails step zero where the first one's numbers are read
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_training_resumes_in_the_middle(model: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    settings = {"save_steps": 1, "lr_scheduler_type": "constant"}
    run.prepare(schema.load(write(whole, model, train={"max_steps": 2, **settings}))).train()
    run.prepare(schema.load(write(parts, model, train={"max_steps": 2, **settings}))).train()
    import shutil

    from safetensors.torch import load_file

    shutil.rmtree(parts / "out" / "checkpoint-2")
    shutil.rmtree(parts / "out" / "policy")
    trainer = run.prepare(schema.load(parts / "recipe.yaml"))
    trainer.train()
    first, second = (load_file(folder / "out" / "policy" / "adapter_model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_python_arguments_are_checked_before_data_are_read(model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from align.trainers import AlignConfig, PreferenceTrainer

    adapter = LoraConfig(task_type="CAUSAL_LM", r=4)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"quantization_config": four}, "without `peft_config`"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "peft_config": adapter}, "4 bits"),
        (
            {
                "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16),
                "peft_config": adapter,
            },
            "bnb_4bit_compute_dtype",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            PreferenceTrainer(
                str(model),
                "dpo",
                AlignConfig(output_dir=str(tmp_path / "o"), report_to="none"),
                train_dataset="nowhere.jsonl",
                **arguments,
            )


def test_without_bitsandbytes_the_extra_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest)
    )
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "align-lm[quantized]" in said and "recipe.yaml:" in said
    from transformers import BitsAndBytesConfig

    from align.trainers.loading import check_quantization

    with pytest.raises(MissingExtra, match="quantized"):
        check_quantization(BitsAndBytesConfig(load_in_8bit=True), torch.float32)
