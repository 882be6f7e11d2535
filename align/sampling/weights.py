"""A policy's weights as an engine reads them: by their names in files, adapters added, shards gathered."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.compat.transformers import stored_weights
from align.core.errors import ModelError
from align.core.files import atomic_directory
from align.scoring.facts import language_model

ADAPTED = "base_layer"


def full_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the whole policy, one at a time, detached; tied matrices once.

    Names and shapes are those of a saved checkpoint. The active adapters of a `PeftModel` are added out of place, in
    float32: W + scaling * B A; the module is read and never written, so an error in the middle leaves it as it was.
    Inside `disable_adapter()` the base alone is given.

    Under ZeRO-3 every weight is gathered as it comes and given as a copy. That is a collective: each rank iterates to
    the end, also where it has no use for the weights.

    Raises:
        ModelError: weights that are stored quantised, an adapter that cannot be added to them, or a tied pair of
            matrices of which an adapter changes one.
    """
    inner = language_model(policy)
    weights = _once(_walk(inner, ""), inner)
    return stored_weights(inner, weights)


def adapter_obstacle(policy: nn.Module, max_rank: int) -> str:
    """Why a policy cannot be pushed as an adapter alone, for an engine of LoRA up to `max_rank`; empty if it can."""
    configs: dict[str, Any] = getattr(policy, "peft_config", {}) or {}
    if not configs:
        return "it has no adapter"
    active: list[str] = list(policy.active_adapters)  # type: ignore[arg-type]
    if len(active) != 1:
        return f"it has {len(active)} active adapters"
    config = configs[active[0]]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    rank = max([int(getattr(config, "r", 0) or 0), *(getattr(config, "rank_pattern", None) or {}).values()])
    targets = {name.rsplit(".", 1)[-1] for name, module in policy.named_modules() if hasattr(module, ADAPTED)}
    found = {
        f"the adapter is {kind}": kind != "LORA",
        "it is DoRA": getattr(config, "use_dora", False),
        "it trains whole modules too": getattr(config, "modules_to_save", None),
        "it trains tokens too": getattr(config, "trainable_token_indices", None),
        "it trains biases": getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False),
        "it is on embeddings or head": targets & {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"},
        "it is on parameters": getattr(config, "target_parameters", None),
        f"its rank {rank} is above {max_rank}": rank > max_rank,
    }
    return next((why for why, holds in found.items() if holds), "")


def save_adapter(policy: Any, folder: Path) -> Path:
    """The active adapter as a folder of its own, there whole or not at all.

    Raises:
        ModelError: the policy is sharded (ZeRO-3).
    """
    if any(_sharded(parameter) for parameter in policy.parameters()):
        raise ModelError("an adapter under ZeRO-3 is not pushed by itself", mend="open the sampler without `lora`")
    (name,) = policy.active_adapters
    with atomic_directory(folder, {"kind": "adapter"}) as partial:
        policy.save_pretrained(partial, selected_adapters=[name])
        if name != "default":  # peft puts any other adapter into a folder of its name
            for file in (partial / name).iterdir():
                file.rename(partial / file.name)
            (partial / name).rmdir()
    return folder


def save_weights(policy: nn.Module, folder: Path, dtype: torch.dtype) -> Path:
    """The whole policy as a folder that an engine can read: weights and configuration, there whole or not at all."""
    from safetensors.torch import save_file

    inner = language_model(policy)
    with atomic_directory(folder, {"kind": "weights"}) as partial:
        inner.config.save_pretrained(partial)
        weights = {name: _in(weight, dtype).contiguous().cpu() for name, weight in full_weights(policy)}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def _in(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _once(weights: Iterable[tuple[str, Tensor]], model: Any) -> Iterator[tuple[str, Tensor]]:
    """Without the second name of a tied matrix."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    head = model.get_output_embeddings()
    own_head = next((f"{name}." for name, module in model.named_modules() if head is not None and module is head), "")
    same = tied and head is not None and _base(head).weight is _base(model.get_input_embeddings()).weight
    for name, weight in weights:
        if tied and own_head and name == f"{own_head}weight":
            if not same or _adapted(head) or _adapted(model.get_input_embeddings()):
                raise ModelError(
                    "an adapter changes one of two tied matrices",
                    why="the engine was started with one matrix for input and output embeddings",
                    mend="leave `embed_tokens` and `lm_head` out of the adapter, or merge it: align merge",
                )
            continue
        yield name, weight


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    kept = _whole_copy(module)
    if kept is not None:
        yield from _walk(kept, prefix)
        return
    if hasattr(module, "token_adapter"):
        module = module.token_adapter  # type: ignore[assignment]
    if _is_adapter(module):
        yield from _added(module, prefix)
        return
    hidden: set[str] = getattr(module, "_non_persistent_buffers_set", set())
    own: list[tuple[str, Tensor]] = list(module.named_parameters(recurse=False))
    own += [(name, value) for name, value in module.named_buffers(recurse=False) if name not in hidden]
    for name, value in own:
        if not value.is_floating_point() and isinstance(value, nn.Parameter):
            raise _quantised(prefix + name)
        with _gathered([value]):
            yield prefix + name, _plain(value)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.")


def _added(layer: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The weights of one layer with its active adapters on them."""
    base = layer.get_base_layer()
    if not hasattr(base, "weight") or not base.weight.is_floating_point():
        raise _quantised(prefix.rstrip("."))
    active = [] if layer.disable_adapters or layer.merged else [a for a in layer.active_adapters if _has(layer, a)]
    with _gathered(layer.parameters()):
        if not active:
            yield from ((prefix + name, _plain(value)) for name, value in _state(base))
            return
        if _is_plain_lora(layer, active):
            weight = base.weight.detach().float()
            for adapter in active:
                weight = weight + _delta(layer, adapter)
            yield f"{prefix}weight", weight
            yield from ((prefix + name, _plain(value)) for name, value in _state(base) if name != "weight")
            return
        if any(_sharded(parameter) for parameter in layer.parameters()):
            raise ModelError(
                "under ZeRO-3 only plain LoRA can be pushed", where=prefix.rstrip("."), mend="use ZeRO-2, or plain LoRA"
            )
        # Any other kind: its own merge, on a copy of this one layer.
        merged = copy.deepcopy(layer).float()
        merged.merge(adapter_names=active)
        yield from ((prefix + name, _plain(value)) for name, value in _state(merged.get_base_layer()))


def _delta(layer: Any, adapter: str) -> Tensor:
    """scaling * B A in float32, in the base weight's layout."""
    if adapter in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return (up.detach().float() @ down.detach().float()).T * layer.scaling[adapter]
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    product = up.detach().float() @ down.detach().float()
    return (product.T if getattr(layer, "fan_in_fan_out", False) else product) * layer.scaling[adapter]


def _is_plain_lora(layer: Any, active: list[str]) -> bool:
    """LoRA on a matrix, without a variant (DoRA, ...) or a bias of its own."""
    variants: Any = getattr(layer, "lora_variant", {})
    biases: Any = getattr(layer, "lora_bias", {})
    return (
        hasattr(layer, "lora_A")
        and layer.get_base_layer().weight.dim() == 2
        and not any(adapter in variants or biases.get(adapter) for adapter in active)
    )


def _whole_copy(module: Any) -> nn.Module | None:
    """The module that is trained in place of this one, or this one as it was (`modules_to_save`)."""
    if not isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
        return None
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    chosen = module.original_module if module.disable_adapters or not active else module.modules_to_save[active[-1]]
    return chosen  # type: ignore[no-any-return]


def _is_adapter(module: Any) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge") and hasattr(module, ADAPTED)


def _has(layer: Any, adapter: str) -> bool:
    return any(adapter in getattr(layer, name, {}) for name in layer.adapter_layer_names)


def _base(module: Any) -> Any:
    while hasattr(module, "original_module") or hasattr(module, ADAPTED):
        module = module.original_module if hasattr(module, "original_module") else module.base_layer
    return module


def _adapted(module: Any) -> bool:
    return _base(module) is not module


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict(keep_vars=True).items())


def _sharded(value: Tensor) -> bool:
    return hasattr(value, "ds_id")


def _gathered(values: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """The whole of these weights on every rank, under ZeRO-3."""
    sharded = [value for value in values if _sharded(value)]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)  # type: ignore[no-any-return]


def _plain(value: Tensor) -> Tensor:
    """Detached, of one piece, and still there after the gathering has ended."""
    whole: Any = value.detach()
    if hasattr(whole, "full_tensor"):
        return whole.full_tensor()  # type: ignore[no-any-return]
    return whole.clone() if _sharded(value) else whole  # type: ignore[no-any-return]


def _quantised(where: str) -> ModelError:
    return ModelError(
        "the weights are stored quantised, and cannot be pushed whole",
        where=where,
        mend="open the sampler with `lora`, so that the adapter alone is pushed",
    )
