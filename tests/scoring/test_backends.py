"""Choosing a back end: the probe, refusals, fallbacks, and what must be left as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from align.core.errors import ConfigError, ModelError
from align.scoring import attention
from align.scoring.backends import prepare
from align.scoring.engine import score
from align.testing.tiny import tiny_model
from tests.scoring.golden import golden_logp, random_trees


def ignoring(original: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function as a model would have it that accepts the layout and does nothing with it."""

    def function(*args: Any, tree_layout: object = None, **kwargs: Any) -> Any:
        args = (*args[:4], None if tree_layout is not None else args[4], *args[5:])
        return original(*args, **kwargs)

    return function


@pytest.fixture
def layout_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.TREE, ignoring(attention.sdpa_attention_forward))


@pytest.mark.usefixtures("layout_ignored")
@pytest.mark.parametrize("spread", [0.1, 0.005])
def test_a_model_that_ignores_the_layout_is_found_out(spread: float, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", initializer_range=spread)
    backend = prepare(model, "auto")
    assert backend.name == "padded"
    (record,) = [r for r in caplog.records if r.name.startswith("align")]
    assert record.levelno == logging.WARNING
    assert "attention interface" in record.getMessage()
    with pytest.raises(ModelError, match="`tree` back end does not fit LlamaForCausalLM"):
        prepare(model, "tree")


@pytest.mark.parametrize("spread", [0.1, 0.005])
def test_wrong_numbers_alone_are_found_out(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that lets a branch see one key too many; the layout is used, so only the comparison can tell."""
    right = attention.branch_mask

    def leaky(*args: Any) -> Any:
        mask = right(*args)
        return mask if mask is None else mask.roll(1, dims=1)

    model = tiny_model("llama", initializer_range=spread)
    monkeypatch.setattr(attention, "branch_mask", leaky)
    with pytest.raises(ModelError, match="differ from single sequences"):
        prepare(model, "tree")
    assert model.config._attn_implementation == "sdpa", "a refusal must leave the attention as it was"
    assert prepare(model, "auto").name == "padded"


def test_a_window_that_the_model_does_not_tell_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mistral", sliding_window=4096)
    right = attention.Terms
    monkeypatch.setattr(attention, "Terms", lambda **kwargs: right(**(kwargs | {"window": None})))
    with pytest.raises(ModelError, match="0 of 2 sliding-window layers"):
        prepare(model, "tree")


def test_a_head_that_does_something_unknown_to_its_logits_is_refused() -> None:
    model = tiny_model("llama")
    plain = model.forward

    def bent(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = bent  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be scored"):
        prepare(model, "auto")


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_families_outside_the_attention_interface_fall_back_and_are_exact(family: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, initializer_range=0.1, hidden_dropout=0.0, attention_dropout=0.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    backend = prepare(model, "auto")
    assert backend.name == "padded"
    trees = random_trees(2)
    with torch.no_grad():
        torch.testing.assert_close(
            score(model, backend.pack(trees))["logp"], golden_logp(model, trees), rtol=0, atol=1e-5
        )


def test_encoder_decoder_and_vision_models_are_refused() -> None:
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        prepare(t5)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text | {"vocab_size": 64}, vision_config=vision)
    with pytest.raises(ModelError, match="more than text"):
        prepare(AutoModelForImageTextToText.from_config(config))


def test_a_module_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="not a transformers model"):
        prepare(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="no language-model head"):
        prepare(tiny_model("llama").model)


def test_a_misspelt_back_end_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean `padded`"):
        prepare(tiny_model("llama"), "paded")  # type: ignore[arg-type]


def test_preparing_leaves_random_states_training_flags_and_gradients_alone() -> None:
    model = tiny_model("mixtral").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prepare(model, "auto")
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_changed_behind_the_back_end_is_refused() -> None:
    model = tiny_model("llama")
    packed = prepare(model, "tree").pack(random_trees(1))
    sharing = AutoModelForCausalLM.from_config(model.config)
    assert sharing.config is model.config
    prepare(sharing, "padded")
    with pytest.raises(ModelError, match=r"attention is `sdpa`, the batch was packed for `align_tree`"):
        score(model, packed)


def test_without_a_probe_no_forward_runs() -> None:
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *a: pytest.fail("a forward ran"))
    model.model.register_forward_pre_hook(lambda *a: pytest.fail("a forward ran"))
    assert prepare(model, "auto", probe=False).name == "tree"
    assert prepare(tiny_model("mamba"), "auto", probe=False).name == "padded"


def test_a_prepared_model_generates_and_saves_as_before(tmp_path: Any) -> None:
    model = tiny_model("mistral", seed=3)
    plain = copy.deepcopy(model)
    prepare(model, "tree")
    ids = torch.tensor([[0, 0, 0, 17, 30, 41], [5, 6, 7, 8, 9, 10]])
    arguments = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 12,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    found, expected = model.generate(ids, **arguments), plain.generate(ids, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "align_tree" not in (tmp_path / "config.json").read_text()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), PreTrainedModel)


def test_the_tree_back_end_makes_no_mask_of_the_whole_row() -> None:
    model = tiny_model("gemma3_text")
    seen: list[torch.Size] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["attention_mask"].shape)

    backend = prepare(model, "tree")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    score(model, backend.pack(random_trees(1)))
    assert set(seen) == {torch.Size([1, 1, 1, 1])}


def test_a_batch_of_inference_mode_serves_a_backward_too() -> None:
    model = tiny_model("llama")
    packed = prepare(model, "tree").pack(random_trees(1))
    with torch.inference_mode():
        reference = score(model, packed)["logp"].clone()
    logp = score(model, packed)["logp"]
    logp.sum().backward()
    assert torch.equal(logp.detach(), reference)


def test_a_batch_without_scored_tokens_still_reaches_every_parameter() -> None:
    model = tiny_model("llama")
    trees = random_trees(1)
    unscored = [type(t)(t.prompt, t.branches, tuple(flags & False for flags in t.scored)) for t in trees]
    logp = score(model, prepare(model, "tree").pack(unscored))["logp"]
    assert not logp.detach().any()
    logp.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
