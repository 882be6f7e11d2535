"""The value model: where its states stand, its gradients, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from align.core.errors import CheckpointError, ModelError
from align.scoring.attention import TREE
from align.scoring.backends import prepare
from align.scoring.layout import Tree
from align.scoring.value import ValueModel, score_values
from align.testing.tiny import tiny_model
from tests.scoring.golden import curved_loss, gradient_error, gradients, random_trees


def made(seed: int = 0) -> ValueModel:
    model = ValueModel(tiny_model("qwen3", seed=seed))
    nn.init.normal_(model.head.weight, std=0.3)
    nn.init.constant_(model.head.bias, 0.2)
    return model


def golden_values(model: ValueModel, trees: list[Tree]) -> Tensor:
    """V at the last prompt token and at every completion token, one sequence at a time."""
    width = max(max(tree.lengths) for tree in trees)
    rows = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prompt.tolist(), *branch.tolist()]])
            values = model(model.trunk(input_ids=ids).last_hidden_state)[0, len(tree.prompt) - 1 :]
            rows.append(nn.functional.pad(values, (0, width - len(branch))))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["tree", "sdpa", "padded"])
def test_values_stand_before_each_token_and_at_the_end(name: str) -> None:
    model = made()
    backend = prepare(model, name)
    trees = random_trees(1)
    found = score_values(model, backend.pack(trees))["value"]
    found_gradients = gradients(model, curved_loss(found))
    model.trunk.set_attn_implementation("sdpa")
    expected = golden_values(model, trees)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert gradient_error(found_gradients, gradients(model, curved_loss(expected)))[0] <= 1e-5


def test_a_fresh_value_model_says_zero_in_float32_and_learns() -> None:
    model = ValueModel(tiny_model("llama").to(torch.bfloat16))
    assert model.head.weight.dtype == torch.float32
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    value = score_values(model, prepare(model, "auto").pack(random_trees(0)))["value"]
    assert value.dtype == torch.float32
    assert not value.detach().any()
    value.sum().backward()
    assert bool(model.head.weight.grad.any())  # type: ignore[union-attr]


def test_the_probe_finds_a_value_model_that_ignores_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    from align.scoring import attention

    def ignoring(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, tree_layout: Any = None, **kw: Any) -> Any:
        if tree_layout is not None:
            tree_layout.record.append(None)
        return attention.sdpa_attention_forward(module, q, k, v, None, **kw)

    model = made()
    assert prepare(model, "auto").name == "tree"
    monkeypatch.setitem(AttentionInterface._global_mapping, TREE, ignoring)
    with pytest.raises(ModelError, match="differ from single sequences"):
        prepare(model, "tree")


def test_saving_and_loading_gives_the_same_values(tmp_path: Path) -> None:
    model = made(seed=2)
    backend = prepare(model, "tree")
    packed = backend.pack(random_trees(3))
    model.save_pretrained(tmp_path)
    loaded = ValueModel.from_pretrained(tmp_path)
    prepare(loaded, "tree")
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    with torch.no_grad():
        assert torch.equal(score_values(loaded, packed)["value"], score_values(model, packed)["value"])


def test_a_value_model_starts_from_a_saved_policy(tmp_path: Path) -> None:
    policy = tiny_model("llama", seed=4)
    policy.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"value_head\.safetensors"):
        ValueModel.from_pretrained(tmp_path)
    model = ValueModel.from_policy(tmp_path)
    assert torch.equal(model.trunk.embed_tokens.weight, policy.model.embed_tokens.weight)


def test_checkpointing_reaches_the_trunk() -> None:
    model = made()
    model.gradient_checkpointing_enable()
    assert model.trunk.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.trunk.is_gradient_checkpointing
