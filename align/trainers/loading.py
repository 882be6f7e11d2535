"""Models and tokenizers: what is loaded, in which dtype, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from align.core.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError("the tokenizer cannot be loaded", where=name, why=first_line(error)) from error


def load_model(name: str, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model from a folder or hub id, from safetensors only.

    Raises:
        ModelError: missing, pickled, a vision or encoder-decoder model, or one that needs its own code.
    """
    _check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        refuse_config(config, name)
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError("the model cannot be loaded", where=name, why=first_line(error), mend=_mend(error)) from error


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
        raise ModelError("there is no config.json in it", where=name, mend="give the folder of a saved model")
    if not list(folder.glob("*.safetensors")) and (list(folder.glob("*.bin")) or list(folder.glob("*.pt"))):
        raise ModelError(
            "the weights are pickled",
            where=name,
            why="loading a pickle runs whatever code is in it",
            mend="convert them: model.save_pretrained(folder) writes safetensors",
        )


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


def first_line(error: BaseException) -> str:
    """Of another library's message, which may run over many lines."""
    return str(error).strip().split("\n", 1)[0]


def _mend(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "read the code that the model brings, then set `model.trust_remote_code: true`"
    return "check the path or id; hub models must be in the local cache when offline"
