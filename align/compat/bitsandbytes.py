"""What we use of bitsandbytes beyond transformers' loading. Checked with 0.50.2; imported late, as it is optional."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from torch import nn

from align.core.errors import MissingExtra

# At import (which peft does by itself) it advises a package that fetches kernels, on CPUs with AVX512-BF16 (0.50.2).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def require() -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        MissingExtra: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(
            "4-bit weights need bitsandbytes, which is not installed",
            mend='pip install "align-lm[quantized]", or load the model without quantisation',
        )


def one_kernel(model: nn.Module) -> nn.Module:
    """Make 4-bit layers compute alike in training and in evaluation mode, on every device.

    On a CPU with AVX512-BF16 a layer repacks its weights at its first evaluation and from then on computes in
    bfloat16 with rounded scales, whatever its compute dtype: the reference (adapter off, evaluation mode) would no
    longer be the policy at step zero, and layers of fewer than 64 inputs fail (`Linear4bit.forward`, 0.50.2).
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quantisation_of(model: nn.Module) -> Any:
    """The `BitsAndBytesConfig` that a model was loaded with, or None; adapters may lie over it."""
    config = getattr(model, "config", None)
    found = getattr(config, "quantization_config", None)
    return found if getattr(found, "load_in_4bit", False) else None
