"""Packed scoring against one sequence at a time, over families and back ends: log-probabilities and gradients."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from align.core.errors import ModelError
from align.scoring.backends import Backend, prepare
from align.scoring.engine import score
from align.scoring.layout import Tree
from align.testing.tiny import FAMILIES, tiny_model
from tests.scoring.golden import (
    GRADIENT_BAR,
    LOGP_BAR,
    NORM_FLOOR,
    curved_loss,
    golden_logp,
    gradient_error,
    gradients,
    random_trees,
    routing_gap,
)

ATTENTION_FAMILIES = [family for family in FAMILIES if family != "mamba"]
MOE = {"mixtral", "qwen3_moe"}


def golden_twin(model: nn.Module) -> nn.Module:
    """A copy under plain attention, which for Gemma 2 is `eager`: transformers' `sdpa` drops its soft cap."""
    twin = copy.deepcopy(model)
    base = twin.get_base_model() if hasattr(twin, "get_base_model") else twin
    base.set_attn_implementation("eager" if getattr(base.config, "attn_logit_softcapping", None) else "sdpa")
    return twin


def assert_exact(
    model: nn.Module, backend: Backend, trees: list[Tree], twin: nn.Module, floor: float = NORM_FLOOR
) -> None:
    expected = golden_logp(twin, trees)
    found = score(model, backend.pack(trees))["logp"]
    assert float((found - expected).detach().abs().max()) <= LOGP_BAR
    error, name = gradient_error(gradients(model, curved_loss(found)), gradients(twin, curved_loss(expected)), floor)
    assert error <= GRADIENT_BAR, name


def draw(model: nn.Module, family: str, seed: int, **shape: object) -> list[Tree]:
    """Random trees; for a mixture of experts, redrawn while rounding could change an expert's choice."""
    for attempt in range(100):
        trees = random_trees(seed + 1000 * attempt, **shape)  # type: ignore[arg-type]
        if family not in MOE or routing_gap(model, trees) >= 1e-4:
            return trees
    raise AssertionError("no trees with a routing gap")


@pytest.mark.parametrize("name", ["tree", "sdpa", "padded"])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_every_family_is_exact(family: str, name: str) -> None:
    model = tiny_model(family, seed=3)
    twin = golden_twin(model)
    backend = prepare(model, name)
    shape = {"branches": (1, 3), "longest": 24} if family in MOE else {}
    for seed in range(2):
        assert_exact(model, backend, draw(twin, family, seed, **shape), twin)


@pytest.mark.parametrize("family", ["gpt_oss", "cohere2", "granite", "deepseek_v3"])
def test_sinks_logit_scales_and_latent_attention_are_exact(family: str) -> None:
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
        "vocab_size": 320,
        "pad_token_id": 0,
    }
    own = {
        "gpt_oss": {"head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": 8},
        "cohere2": {"num_key_value_heads": 2, "sliding_window": 8, "sliding_window_pattern": 2, "logit_scale": 0.3},
        "granite": {"num_key_value_heads": 2, "logits_scaling": 3.0, "attention_multiplier": 0.2},
        "deepseek_v3": {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(common | own[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    twin = copy.deepcopy(model)
    backend = prepare(model, "auto")
    assert backend.name == "tree"
    assert_exact(model, backend, random_trees(5, branches=(2, 3), longest=20), twin)


def test_a_recurrent_model_falls_back_to_padded_and_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("mamba", seed=2)
    backend = prepare(model, "auto")
    assert backend.name == "padded"
    assert len([r for r in caplog.records if r.name.startswith("align")]) == 1
    assert "linear_attention" in caplog.text
    assert_exact(model, backend, random_trees(1, branches=(1, 3), longest=12), copy.deepcopy(model))


lengths = st.integers(1, 40)
shapes = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=6)), min_size=1, max_size=3)


@cache
def prepared(family: str, name: str) -> tuple[nn.Module, nn.Module, Backend]:
    model = tiny_model(family, seed=11)
    twin = golden_twin(model)
    return model, twin, prepare(model, name)


@pytest.mark.parametrize("name", ["tree", "sdpa", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(shape=shapes, seed=st.integers(0, 2**16))
def test_any_trees_are_exact(family: str, name: str, shape: list[tuple[int, list[int]]], seed: int) -> None:
    model, twin, backend = prepared(family, name)
    rng = np.random.default_rng(seed)
    trees = [
        Tree.of(rng.integers(0, 320, prompt).tolist(), [rng.integers(0, 320, n).tolist() for n in branches])
        for prompt, branches in shape
    ]
    # Among all shapes are trees in which whole parameters have no gradient (one scored token after one prompt token
    # attends to itself alone): there the difference must stay below 1e-7, one float32 epsilon, of the whole gradient.
    assert_exact(model, backend, trees, twin, floor=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "phi"])  # the others compute their norms in float32 whatever the dtype
@pytest.mark.parametrize("name", ["tree", "sdpa", "padded"])
def test_in_float64_nothing_but_rounding_is_left(name: str, family: str) -> None:
    model = tiny_model(family, seed=4).double()
    twin = golden_twin(model)
    backend = prepare(model, name)
    trees = random_trees(9)
    found, expected = score(model, backend.pack(trees))["logp"], golden_logp(twin, trees)
    assert found.dtype == torch.float64
    assert float((found - expected).detach().abs().max()) <= 1e-12
    error, parameter = gradient_error(gradients(model, curved_loss(found)), gradients(twin, curved_loss(expected)))
    assert error <= 1e-12, parameter


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["tree", "sdpa"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    model = tiny_model("mistral", seed=6)
    backend = prepare(model, name)
    packed = backend.pack(random_trees(2))
    expected = gradients(model, curved_loss(score(model, packed)["logp"]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    calls = []
    handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda *a: calls.append(1))
    found = gradients(model, curved_loss(score(model, packed)["logp"]))
    handle.remove()
    assert len(calls) == 2, "the layer was not computed again, so nothing was tested"
    assert gradient_error(found, expected)[0] <= 1e-6


@pytest.mark.parametrize("name", ["tree", "sdpa", "padded"])
def test_a_lora_policy_is_exact(name: str) -> None:
    model = get_peft_model(tiny_model("qwen3", seed=8), LoraConfig(r=4, target_modules="all-linear"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    twin = golden_twin(model)
    backend = prepare(model, name)
    trees = random_trees(4)
    assert_exact(model, backend, trees, twin)
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        found, expected = score(model, backend.pack(trees))["logp"], golden_logp(twin, trees)
    assert float((found - expected).abs().max()) <= LOGP_BAR
    assert float((found - score(model, backend.pack(trees))["logp"]).detach().abs().max()) > 0.1


@pytest.mark.parametrize("name", ["tree", "sdpa", "padded"])
def test_bfloat16_autocast_stays_near_and_sums_in_float32(name: str) -> None:
    model = tiny_model("llama", seed=1)
    backend = prepare(model, name)
    trees = random_trees(7)
    exact = score(model, backend.pack(trees))["logp"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = score(model, backend.pack(trees))["logp"]
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).detach().abs()
    assert 1e-4 < float(difference.max()) < 0.3, "either autocast had no effect or the sums are rounded"
    error, _ = gradient_error(gradients(model, rounded.sum()), gradients(model, exact.sum()))
    assert error < 0.2


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_flex_forward_is_exact_and_refuses_gradients(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:  # compiling takes a minute or two on CPU; the same rule runs in plain PyTorch
        monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        monkeypatch.setattr("transformers.integrations.flex_attention.WrappedFlexAttention", _Uncompiled)
    model = tiny_model("gemma3_text", seed=5)
    twin = golden_twin(model)
    backend = prepare(model, "flex")
    trees = random_trees(3, count=3)
    packed = backend.pack(trees)
    assert packed.input_ids.shape[1] % 128 == 0
    with torch.no_grad():
        assert float((score(model, packed)["logp"] - golden_logp(twin, trees)).abs().max()) <= LOGP_BAR
    with pytest.raises(ModelError, match="no gradients on CPU"):
        score(model, packed)


class _Uncompiled:
    """Stands in for transformers' singleton that compiles flex attention."""

    def __init__(self, training: bool) -> None:
        pass

    def __call__(self) -> object:
        return flex_attention
