"""Names of transformers that are not promised to stay. Checked with 5.17 and, where said, 5.23."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping  # 5.17
from transformers.core_model_loading import revert_weight_conversion  # 5.17: what `save_pretrained` calls
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # 5.17, 5.23: not in the public index
from transformers.masking_utils import sdpa_mask  # 5.17, 5.23

__all__ = [
    "attention_of",
    "can_set_attention",
    "register_attention",
    "sdpa_attention_forward",
    "set_attention",
    "stored_weights",
]


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Register an attention function; outside of our own calls it masks as `sdpa` does (padded `generate`)."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation in force. `_attn_implementation` is the only place it can be read (5.17, 5.23)."""
    return str(model.config._attn_implementation)


def can_set_attention(model: PreTrainedModel) -> bool:
    """Whether the model's code goes through the attention interface.

    `_can_set_attn_implementation` reads the source of the model's module (5.17, 5.23); `set_attn_implementation`
    only warns where it says no.
    """
    return bool(model._can_set_attn_implementation())


def set_attention(model: PreTrainedModel, name: str) -> bool:
    """Set the attention implementation; false, with the model unchanged, if it refuses."""
    if attention_of(model) == name:
        return True
    if not can_set_attention(model):
        return False
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError):
        return False
    return attention_of(model) == name


def stored_weights(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names in a module, by their names and shapes in files (fused experts become single ones).

    Where the two are the same, one at a time; else all are held at once, as `save_pretrained` does.
    """
    known = getattr(model, "_weight_conversions", None)
    if known is None:
        known = get_model_conversion_mapping(model, add_legacy=False)
    if not known:
        yield from weights
        return
    yield from revert_weight_conversion(model, dict(weights)).items()
