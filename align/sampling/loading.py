"""A model and its tokenizer to sample from: a folder, a hub id, or an adapter over its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from align.core.errors import ConfigError, ModelError
from align.scoring.adapters import ADAPTER_CONFIG, adapter_config, base_of, load_adapter
from align.scoring.loading import DTYPES, load_model, load_tokenizer

Dtype = Literal["auto", "float32", "bfloat16"]
_NAME_IT = "before its adapter: MODEL --adapter DIR"


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in evaluation mode, without gradients, on its device.

    Attributes:
        model: a causal LM, or a `PeftModel` of one.
        tokenizer: the adapter's own where it was saved with one, else the model's.
        name: what was loaded, as the user named it: `MODEL`, or `MODEL + ADAPTER`.
    """

    model: nn.Module
    tokenizer: Any
    name: str


def load(
    model_name: str,
    adapter: str | None = None,
    dtype: Dtype | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load for inference.

    Args:
        model_name: a folder or hub id; or the folder of an adapter, whose base is loaded beneath it.
        adapter: the folder of an adapter over `model_name`.
        dtype: `auto` is float32 on CPU and bfloat16 elsewhere.
        device: by default the GPU where there is one.

    Raises:
        ModelError: missing, pickled, not a causal language model, an adapter of another base.
        ConfigError: two adapters, or an unknown dtype.
    """
    where = _device(device)
    kind = _dtype(dtype, where)
    base, folder = _parts(_expanded(model_name), None if adapter is None else _expanded(adapter))
    try:
        model: nn.Module = load_model(base, kind, trust_remote_code)
    except ModelError as error:
        if folder is None or adapter is not None:
            raise
        raise ModelError(
            f"the base model `{base}`, as the adapter names it, cannot be loaded",
            where=str(folder),
            why=f"{error.what}: {error.why}" if error.why else error.what,
            mend=f"if it was moved, name it {_NAME_IT}",
        ) from error
    own = folder is not None and (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder) if own else base, trust_remote_code)
    if folder is not None:
        model = load_adapter(model, folder, base, _NAME_IT)  # type: ignore[arg-type]
    name = model_name if adapter is None else f"{model_name} + {adapter}"
    return Loaded(model.eval().requires_grad_(False).to(where), tokenizer, name)


def _device(asked: str | torch.device | None) -> torch.device:
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(f"there is no device `{asked}`", mend="write cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device `{asked}`",
            why=f"torch sees {torch.cuda.device_count()} CUDA devices",
            mend="write cpu, or leave the device out",
        )
    return device


def _parts(name: str, adapter: str | None) -> tuple[str, Path | None]:
    """(base model, adapter folder or None)."""
    folder = Path(name)
    if adapter is None:
        if not (folder / ADAPTER_CONFIG).is_file():
            return name, None
        return _expanded(base_of(adapter_config(folder), folder, name_it=_NAME_IT)), folder
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            "the model is an adapter itself",
            where=name,
            why=f"a second one is given: {adapter}",
            mend="give the base model and one adapter, or merge the first: align merge",
        )
    adapter_config(Path(adapter))
    return name, Path(adapter)


def _dtype(dtype: Dtype | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"`dtype` is {dtype!r}", mend="use one of auto, " + ", ".join(DTYPES))
    return DTYPES[dtype]


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name
