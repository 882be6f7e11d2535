"""What a run makes of a loaded model: frozen copies, no dropout, trainable weights in float32."""

from __future__ import annotations

import copy

import torch
from torch import nn

from align.scoring.loading import DTYPES, check_quantization, first_line, load_model, load_tokenizer, refuse_config

__all__ = [
    "DTYPES",
    "check_quantization",
    "disable_dropout",
    "first_line",
    "freeze",
    "frozen_copy",
    "frozen_weights",
    "load_model",
    "load_tokenizer",
    "refuse_config",
    "trainable_in_float32",
]


def frozen_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A second copy in evaluation mode without gradients."""
    return freeze(frozen_weights(copy.deepcopy(model), dtype))


def frozen_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Linear layers' matrices in `dtype`, the rest as it is: what autocast makes of float32 weights, bit for bit.

    Embeddings and norms stay float32, since autocast leaves the residual stream of a float32 policy in float32; in
    half precision they would put a reference 0.01 nats a token away from the policy that it is a copy of.
    """
    if dtype == torch.float32:
        return model
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in shared and not hasattr(module.weight, "ds_id"):
            module.weight.data = module.weight.data.to(dtype)
    return model


def freeze(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Dropout makes h noise at step 0. Adapters keep theirs: it was asked for by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_" not in name:
            module.p = 0.0
    config = getattr(model, "config", None)
    for key in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "classifier_dropout"):
        if config is not None and getattr(config, key, None):
            setattr(config, key, 0.0)
    for name, module in model.named_modules():
        # Many classes copy a rate at construction and pass it to a function.
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and "lora_" not in name and key.endswith(("dropout", "layerdrop", "_pdrop")):
                setattr(module, key, 0.0)


def trainable_in_float32(model: nn.Module) -> None:
    """AdamW on bfloat16 weights at 5e-7 makes 8 % of the change it should; so what is trained is float32."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
