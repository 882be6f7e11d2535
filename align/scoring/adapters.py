"""Adapters: what is in their folder, which base they are of, and the two together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from align.core.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"


def adapter_config(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a folder; a `ModelError` that says what the folder is where there is none."""
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise ModelError(
            "there is no such adapter folder", where=str(folder), mend="give the folder of a saved adapter"
        )
    if not path.is_file():
        inside = folder / "policy"
        if (inside / ADAPTER_CONFIG).is_file():
            raise ModelError("this is a run, not an adapter", where=str(folder), mend=f"its adapter is `{inside}`")
        if (folder / "config.json").is_file() or (inside / "config.json").is_file():
            raise ModelError(
                "this is a whole model, not an adapter",
                where=str(folder),
                why="it has a config.json and no adapter_config.json",
                mend="nothing needs to be merged: use the folder as it is",
            )
        raise ModelError("there is no adapter_config.json in it", where=str(folder), mend="give a saved adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("not valid JSON", where=str(path), why=str(error), mend="save the adapter again") from error
    if not isinstance(config, dict):
        raise ModelError("not a JSON object", where=str(path), mend="save the adapter again")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ModelError(
            "the adapter's weights are pickled" if pickled else "there is no adapter_model.safetensors in it",
            where=str(folder),
            why="loading a pickle runs whatever code is in it" if pickled else "",
            mend="save the adapter again with `save_pretrained`",
        )
    return config


def base_of(
    config: Mapping[str, Any], folder: Path, given: str | None = None, name_it: str = "with --base MODEL"
) -> str:
    """The base model: as given, else as the adapter names it. `name_it`: how a user gives it, for the error."""
    if given is not None:
        return str(Path(given).expanduser()) if given.startswith("~") else given
    name = config.get("base_model_name_or_path")
    if not name:
        raise ModelError(
            "the adapter does not say what its base model is",
            where=str(folder / ADAPTER_CONFIG),
            mend=f"name the base {name_it}",
        )
    return str(name)


def load_adapter(model: PreTrainedModel, folder: Path, base: str, name_it: str = "with --base MODEL") -> nn.Module:
    """The model with the adapter on it, untied first where the adapter changes one of two tied matrices.

    Raises:
        ModelError: the adapter is of another base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
        _resize(model, {key: file.get_slice(key).get_shape() for key in saved})
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise _other_base(folder, base, " ".join(str(error).split())[:300], name_it) from error
    own = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    missing = sorted(own - saved)
    extra = sorted(key for key in saved - own if "embed" not in key and "lm_head" not in key)
    if missing or extra:
        why = f"it lacks {missing[:2]}" if missing else f"it has {extra[:2]}, which the base has no place for"
        raise _other_base(folder, base, why, name_it)
    return wrapped.eval()


def _resize(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> None:
    """Rows of the embeddings that the adapter was saved with, where tokens were added to the base's."""
    rows = {
        shape[0]
        for key, shape in shapes.items()
        if len(shape) == 2 and "lora_" not in key and key.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    if rows and max(rows) != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(rows), mean_resizing=False)


def _other_base(folder: Path, base: str, why: str, name_it: str) -> ModelError:
    return ModelError(
        f"the adapter does not fit the base model `{base}`",
        where=str(folder),
        why=why,
        mend=f"name the model that it was trained on {name_it}",
    )
