"""Models and tokenizers from folders and hub ids: what is loaded, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from align.compat import bitsandbytes
from align.core.errors import ConfigError, ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            "the tokenizer cannot be loaded", where=name, why=_why(name, error), mend=_mend(error)
        ) from error


def load_model(
    name: str, dtype: torch.dtype, trust_remote_code: bool = False, quantization: Any = None, device: Any = None
) -> PreTrainedModel:
    """A causal language model from a folder or hub id, from safetensors only.

    Args:
        quantization: a `BitsAndBytesConfig` of 4 bits; weights are quantised while they are loaded.
        device: where quantised weights go; they are not moved later.

    Raises:
        ModelError: missing, pickled, a vision or encoder-decoder model, or one that needs its own code.
        MissingExtra: quantised weights without bitsandbytes.
        ConfigError: a quantisation that cannot be trained over exactly.
    """
    _check_folder(name)
    extra: dict[str, Any] = {}
    if quantization is not None:
        check_quantization(quantization, dtype)
        extra = {"quantization_config": copy.deepcopy(quantization), "device_map": {"": device or "cpu"}}
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        refuse_config(config, name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError("the model cannot be loaded", where=name, why=_why(name, error), mend=_mend(error)) from error
    return model if quantization is None else bitsandbytes.one_kernel(model)


def check_quantization(quantization: Any, dtype: torch.dtype) -> None:
    """Refuse what cannot be trained over exactly.

    Raises:
        MissingExtra: bitsandbytes is not installed.
        ConfigError: 8 bits, another library's quantisation, another compute dtype, or weights that ZeRO-3 would cut.
    """
    bitsandbytes.require()
    if not getattr(quantization, "load_in_4bit", False):
        raise ConfigError(
            "the quantisation is not bitsandbytes' 4 bits",
            why="8-bit layers look for outliers in the whole batch, so results would depend on packing",
            mend="use BitsAndBytesConfig(load_in_4bit=True)",
        )
    if quantization.bnb_4bit_compute_dtype != dtype:
        raise ConfigError(
            f"`bnb_4bit_compute_dtype` is {quantization.bnb_4bit_compute_dtype}, and the run computes in {dtype}",
            mend="make them the same",
        )
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "4-bit weights under ZeRO-3", why="it would cut packed weights", mend="use ZeRO-2 or plain data parallelism"
        )


def refuse_config(config: Any, name: str) -> None:
    """Vision and encoder-decoder models are refused with a sentence."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("this is an encoder-decoder model", where=name, mend="align trains decoder-only models")
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise ModelError("this model reads images or sound", where=name, mend="align trains text models")


def _check_folder(name: str) -> None:
    folder = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not folder.exists():
        if looks_like_path:
            raise ModelError("there is no such model folder", where=name, mend="give a folder or a hub id `owner/name`")
        return
    if not (folder / "config.json").is_file():
        inside = folder / "policy"
        if (inside / "config.json").is_file() or (inside / "adapter_config.json").is_file():
            raise ModelError("this is a run, not a model", where=name, mend=f"its model is `{inside}`")
        raise ModelError("there is no config.json in it", where=name, mend="give the folder of a saved model")
    if not list(folder.glob("*.safetensors")) and (list(folder.glob("*.bin")) or list(folder.glob("*.pt"))):
        raise ModelError(
            "the weights are pickled",
            where=name,
            why="loading a pickle runs whatever code is in it",
            mend="convert them: model.save_pretrained(folder) writes safetensors",
        )


def first_line(error: BaseException) -> str:
    """Of another library's message, which may run over many lines."""
    return str(error).strip().split("\n", 1)[0]


def _why(name: str, error: BaseException) -> str:
    """The library's first line; before it, that a bare word is no folder here, which is what it mostly should be."""
    here = (
        "" if "/" in name or Path(name).exists() else f"there is no folder `{name}` here, so it is taken for a hub id; "
    )
    return here + first_line(error)


def _mend(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "read the code that the model brings, then set `model.trust_remote_code: true`"
    return "check the path or id; hub models must be in the local cache when offline"
