"""What is pushed into an engine: equal to saved checkpoints and to peft's own merge, and nothing of it left behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.core.errors import ModelError
from align.sampling.weights import adapter_obstacle, full_weights, save_adapter, save_weights
from align.testing.tiny import tiny_model

LORA = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}
KINDS = {
    "lora": LORA,
    "rslora": LORA | {"use_rslora": True},
    "ranks": LORA | {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    "dora": LORA | {"use_dora": True},
    "bias": LORA | {"lora_bias": True},
    "embeddings": LORA | {"target_modules": ["embed_tokens", "q_proj"]},
    "modules": LORA | {"modules_to_save": ["lm_head"]},
    "tokens": LORA | {"trainable_token_indices": [5, 9]},
}


def adapted(family="qwen3", seed=0, base=None, **lora):
    """A tiny model with a random adapter that changes it."""
    model = base or tiny_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "phi", "mixtral", "qwen3_moe", "gpt_neox"])
def test_a_plain_model_gives_what_its_saved_folder_holds(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    given = dict(full_weights(model))
    assert set(given) == set(saved)
    assert all(torch.equal(given[name], saved[name]) for name in saved)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_added_as_peft_merges_it_and_the_module_stays_bit_for_bit(kind):
    family = "phi" if kind == "bias" else "qwen3"  # a bias can be merged into a bias only
    model = adapted(family, **KINDS[kind])
    bare = dict(full_weights(tiny_model(family)))
    before, training = snapshot(model), [module.training for module in model.modules()]
    given = {name: weight.clone() for name, weight in full_weights(model)}
    assert snapshot(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert training == [module.training for module in model.modules()]
    with model.disable_adapter():
        off = dict(full_weights(model))
    assert off.keys() >= bare.keys() and all(torch.equal(off[name], bare[name]) for name in bare)
    merged = model.merge_and_unload().state_dict()
    assert set(given) == set(merged)
    assert max(float((given[name] - merged[name]).abs().max()) for name in merged) < 1e-6
    assert max(float((given[name] - bare[name]).abs().max()) for name in bare) > 0.01


def test_two_active_adapters_and_transposed_matrices():
    model = adapted("gpt2", r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    given = {name: weight.clone() for name, weight in full_weights(model)}
    merged = model.merge_and_unload(adapter_names=["default", "other"]).state_dict()
    assert max(float((given[name] - merged[name]).abs().max()) for name in given) < 1e-6


def test_bfloat16_bases_lose_nothing_on_the_way():
    model = adapted(base=tiny_model("qwen3").bfloat16(), **LORA)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    down, up = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    wanted = layer.base_layer.weight.detach().double() + layer.scaling["default"] * (up @ down).detach()
    given = dict(full_weights(model))["model.layers.0.mlp.up_proj.weight"]
    assert given.dtype == torch.float32
    assert float((given.double() - wanted).abs().max()) < 1e-6


def test_an_error_in_the_middle_leaves_the_policy_as_it_was():
    model = adapted(**KINDS["dora"])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="engine"):
        for number, _ in enumerate(full_weights(model)):
            if number == 7:
                raise RuntimeError("the engine died")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_matrices_go_once_and_cannot_be_torn_apart():
    tied = tiny_model("qwen3", tie_word_embeddings=True)
    assert "lm_head.weight" not in dict(full_weights(tied))
    assert "lm_head.weight" not in dict(full_weights(adapted(base=tied, **LORA)))
    torn = adapted(base=tiny_model("qwen3", tie_word_embeddings=True), **KINDS["embeddings"])
    with pytest.raises(ModelError, match="one of two tied matrices"):
        list(full_weights(torn))
    torn = adapted(base=tiny_model("qwen3", tie_word_embeddings=True), **LORA | {"target_modules": ["lm_head"]})
    with pytest.raises(ModelError, match="one of two tied matrices"):
        list(full_weights(torn))


def test_a_saved_folder_is_the_policy(tmp_path):
    model = adapted(**LORA)
    save_weights(model, tmp_path / "whole", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    ids = torch.tensor([[1, 60, 70, 80]])
    with torch.no_grad():
        assert float((loaded(ids).logits - model(ids).logits).abs().max()) < 1e-5
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("name", ["default", "second"])
def test_a_saved_adapter_is_the_active_one(name, tmp_path):
    model = adapted(**LORA)
    if name != "default":
        model.add_adapter(name, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter(name)
    folder = save_adapter(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model("qwen3"), str(folder))
    ids = torch.tensor([[1, 60, 70, 80]])
    with torch.no_grad():
        assert float((again(ids).logits - model(ids).logits).abs().max()) < 1e-5


def test_what_cannot_go_as_an_adapter_says_why():
    found = {
        kind: adapter_obstacle(adapted("phi" if kind == "bias" else "qwen3", **lora), 8) for kind, lora in KINDS.items()
    }
    assert found["lora"] == found["rslora"] == found["ranks"] == ""
    assert found["dora"] == "it is DoRA" and found["bias"] == "it trains biases"
    assert found["modules"] == "it trains whole modules too" and found["tokens"] == "it trains tokens too"
    assert found["embeddings"] == "it is on embeddings or head"
    assert adapter_obstacle(adapted(**KINDS["ranks"]), 6) == "its rank 7 is above 6"
    assert adapter_obstacle(tiny_model("qwen3"), 8) == "it has no adapter"


def test_weights_that_are_stored_quantised_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model("qwen3")
    layer = model.model.layers[0].mlp.up_proj
    packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
    packed.load_state_dict(layer.state_dict())
    model.model.layers[0].mlp.up_proj = packed.to("cpu")
    with pytest.raises(ModelError, match="stored quantised"):
        list(full_weights(model))
