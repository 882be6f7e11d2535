"""What we use of peft beyond its documented calls. Checked with 0.21.2."""

from __future__ import annotations

from typing import Any

from torch import nn


def without_adapter_wrapper(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, with its adapters in place; any other model as it is.

    Recognised by `get_base_model` and `peft_config`, so that peft need not be imported (0.21.2).
    """
    inner: Any = model
    if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        inner = inner.get_base_model()
    return inner  # type: ignore[no-any-return]


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether the adapter prepends virtual tokens, which no packed layout can carry (`is_prompt_learning`, 0.21.2)."""
    configs: Any = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "is_prompt_learning", False) for config in configs.values())
