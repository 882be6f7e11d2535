"""What the engine must know about a model: its trunk, head, windows, and what happens to its logits."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from align.compat.peft import is_prompt_learning, without_adapter_wrapper
from align.core.errors import ModelError

FULL, SLIDING = "full_attention", "sliding_attention"
MASKED_TYPES = frozenset({FULL, SLIDING})


@dataclass(frozen=True)
class LogitTransform:
    """What becomes of a head's output: z -> cap * tanh(scale * z / cap), or scale * z without a cap, which are the
    model's own, and then / temperature, which is that of the sampling."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Windows:
    """Attention types of the layers.

    Attributes:
        window: tokens a windowed layer sees, itself included; None where all layers see everything.
        mixed: whether windowed and full layers alternate, so that a mask per type is needed.
        layers: number of windowed layers, where the configuration says.
        other: types that no mask of ours describes (linear, chunked, convolution).
    """

    window: int | None = None
    mixed: bool = False
    layers: int | None = None
    other: tuple[str, ...] = ()


def language_model(model: nn.Module) -> Any:
    """The transformers model inside adapters and wrappers of ours. Raises `ModelError` for kinds we cannot score."""
    if is_prompt_learning(model):
        raise ModelError(
            "prompt learning adapters prepend virtual tokens", mend="use LoRA or another adapter inside the layers"
        )
    inner: Any = without_adapter_wrapper(model)
    if not hasattr(inner, "config") or not hasattr(inner, "base_model"):
        raise ModelError(f"{type(inner).__name__} is not a transformers model", mend="give a causal language model")
    return inner


def refuse_unsuitable(model: nn.Module) -> None:
    """Raise `ModelError` for vision, audio and encoder-decoder models."""
    config = language_model(model).config
    name = type(language_model(model)).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model", mend="give a decoder-only (causal) language model")
    for part in ("vision_config", "audio_config", "vision_tower_config", "image_size"):
        if getattr(config, part, None) is not None:
            raise ModelError(
                f"{name} reads more than text (`{part}` in its configuration)",
                mend="give the text-only causal model of the family, for example `Gemma3ForCausalLM`",
            )


def trunk_of(model: nn.Module) -> Any:
    """The module that turns token ids into hidden states."""
    inner = language_model(model)
    trunk = inner.base_model
    if trunk is inner:
        raise ModelError(f"{type(inner).__name__} has no language-model head", mend="load it with AutoModelForCausalLM")
    return trunk


def attention_owner(model: nn.Module) -> PreTrainedModel:
    """The transformers model whose attention implementation is set: the causal LM, or a value model's trunk."""
    inner = language_model(model)
    return inner if isinstance(inner, PreTrainedModel) else inner.base_model  # type: ignore[no-any-return]


def head_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits (with an adapter on it, the adapter's module)."""
    inner = language_model(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(inner).__name__} has no language-model head", mend="load it with AutoModelForCausalLM")
    return head  # type: ignore[no-any-return]


def logit_transform(model: nn.Module) -> LogitTransform:
    """Soft cap and scale of the final logits, read from the configuration (Gemma, Cohere, Granite)."""
    config = language_model(model).config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, None if cap is None else float(cap))


def windows_of(model: nn.Module) -> Windows:
    """Window and layer types from the configuration."""
    config = language_model(model).config
    types = list(getattr(config, "layer_types", None) or [])
    other = tuple(sorted(set(types) - MASKED_TYPES))
    window = getattr(config, "sliding_window", None)
    sliding = types.count(SLIDING) if types else None
    if window is None or sliding == 0:
        return Windows(other=other)
    return Windows(int(window), bool(types) and sliding != len(types), sliding, other)


def caps_scores(model: nn.Module) -> bool:
    """Whether attention scores are soft-capped, which transformers' `sdpa` drops without a word (5.17)."""
    return getattr(language_model(model).config, "attn_logit_softcapping", None) is not None


@cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def accepts(module: nn.Module, name: str) -> bool:
    """Whether the module's forward names this argument."""
    kind: Any = type(module)
    return name in _parameters(kind)
