"""Content hashes of a model: its weights and that part of its configuration which determines its numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.core.errors import ModelError
from align.core.files import atomic_write

_DIGEST_BYTES = 16
_CHUNK = 16 * 2**20
_NO_EFFECT = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "base_model_name_or_path",
        "inference_mode",
        "task_specific_params",
    }
)
"""Configuration entries that do not change a log-prob, or that the store's key holds apart (dtype, attention)."""


def folder_hash(folder: str | os.PathLike[str], memo: str | os.PathLike[str] | None = None) -> str:
    """Hash of a folder's safetensors files and of its `config.json` or `adapter_config.json`.

    Args:
        folder: a model or adapter folder.
        memo: folder for a note of file hashes by (path, size, time of change), so that large files are read once.

    Raises:
        ModelError: there is no safetensors file in it.
    """
    path = Path(folder)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError("no safetensors file to hash", where=str(path), mend="save the model with `save_pretrained`")
    with ThreadPoolExecutor(max_workers=min(4, len(files))) as pool:
        digests = list(pool.map(lambda file: _file_hash(file, None if memo is None else Path(memo)), files))
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for file, content in zip(files, digests, strict=True):
        digest.update(f"{file.name}:{content}\n".encode())
    for name in ("config.json", "adapter_config.json"):
        if (path / name).is_file():
            digest.update(_config_text(json.loads((path / name).read_text())).encode())
    return digest.hexdigest()


def module_hash(module: nn.Module) -> str:
    """Hash of a module's parameters and buffers in memory (name, dtype, shape, bytes) and of its configuration.

    Weights must be whole: a sharded module (ZeRO-3, FSDP) has no hash of its own; hash the folder it came from.
    """
    digest = blake2b(digest_size=_DIGEST_BYTES)
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(_config_text(config.to_dict()).encode())
    digest.update(tensors_hash(module.state_dict()).encode())
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named tensors: names in sorted order, dtypes, shapes and bytes. An adapter's `state_dict` for example."""
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for name in sorted(tensors):
        tensor = tensors[name]
        if hasattr(tensor, "to_local") or hasattr(tensor, "ds_id"):
            raise ModelError(
                f"`{name}` is sharded; its bytes are not whole here", mend="hash the model's folder instead"
            )
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        whole = tensor.detach().to("cpu").contiguous().reshape(-1)
        if whole.numel():
            digest.update(whole.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config_text(config: Any) -> str:
    return json.dumps(_without_effectless(config), sort_keys=True, separators=(",", ":"), default=str)


def _without_effectless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_effectless(item) for key, item in value.items() if key not in _NO_EFFECT}
    if isinstance(value, (list, tuple)):
        return [_without_effectless(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    return value


def _file_hash(file: Path, memo: Path | None) -> str:
    real = file.resolve()
    stat = real.stat()
    stamp = f"{real}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    note = None if memo is None else memo / blake2b(stamp.encode(), digest_size=_DIGEST_BYTES).hexdigest()
    if note is not None and note.is_file():
        written = note.read_text()
        if len(written) == 2 * _DIGEST_BYTES:
            return written
    digest = blake2b(digest_size=_DIGEST_BYTES)
    with open(real, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    if note is not None:
        atomic_write(note, digest.hexdigest())
    return digest.hexdigest()
