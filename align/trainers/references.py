"""Which frozen policy a run compares with, and as which column it comes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.compat.accelerate import is_deepspeed
from align.compat.bitsandbytes import quantisation_of
from align.core.errors import ConfigError
from align.core.hashing import digest
from align.methods.base import Method
from align.reference import (
    AdapterOff,
    Cached,
    Column,
    Ema,
    Frozen,
    LogpStore,
    default_cache_dir,
    folder_hash,
    module_hash,
    store_key,
)
from align.scoring.assemble import columns_needed
from align.scoring.backends import Backend, prepare
from align.trainers.config import AlignConfig
from align.trainers.loading import DTYPES, freeze, frozen_copy, frozen_weights, load_model

logger = logging.getLogger(__name__)

GUIDE, PREVIOUS = "anchor.guide", "anchor.previous"
MOVING = ("ema", "previous_epoch")


@dataclass(eq=False)
class Reference:
    """What was decided before the run: the kind, and the second model where there is one.

    Attributes:
        kind: frozen, adapter_off, ema, or previous_epoch (an ema that takes the whole policy at each epoch's end);
            `cached` wraps one of them.
        model: the second copy, or None.
        cached: whether log-probs are kept on disk.
        starts_equal: whether it is the starting policy, so that every log-ratio is 0 at step zero.
        source: folder of the weights, where they come from one.
    """

    kind: str
    model: nn.Module | None
    cached: bool
    starts_equal: bool
    source: str | None = None


def choose(method: Method, args: AlignConfig, policy: nn.Module, name: str | None) -> Reference | None:
    """The reference of a run, or None for a method without one. `policy` still has its starting weights.

    Raises:
        ConfigError: a reference is configured that the method does not use, or cannot use.
    """
    needed = columns_needed(method)
    if not needed.reference and not needed.live_reference:
        if args.reference != "auto" or args.reference_model is not None:
            raise ConfigError(
                f"method `{method.id}` has no reference, and `reference` is set", mend="remove the reference options"
            )
        return None
    adapter = hasattr(policy, "peft_config")
    _refuse(method, args, adapter, needed.live_reference)
    kind = args.reference if args.reference in ("frozen", "adapter_off", "ema") else ""
    if not kind and method.teacher:
        kind = method.teacher
    if not kind:
        kind = "adapter_off" if adapter and not needed.live_reference and args.reference_model is None else "frozen"
    if kind == "adapter_off":
        _refuse_moving_base(policy)
        return Reference(kind, None, args.reference == "cached", _adapter_is_zero(policy), name)
    source = args.reference_model or name
    return Reference(
        kind,
        _second_model(args, policy, source, kind),
        args.reference == "cached",
        args.reference_model is None,
        source,
    )


def check_guide(method: Method, args: AlignConfig) -> None:
    """Refuse a guide that the method does not read, and a method that lacks its guide."""
    needed = GUIDE in columns_needed(method).anchors
    if needed != (args.guide_model is not None):
        raise ConfigError(
            f"method `{method.id}` needs a trained policy as its guide"
            if needed
            else f"method `{method.id}` has no guide, and `guide_model` is set",
            mend="set `guide_model` (`reference.guide` in a recipe)" if needed else "remove it",
        )
    if args.previous_model is not None and PREVIOUS not in columns_needed(method).anchors:
        raise ConfigError(f"method `{method.id}` has no previous policy, and `previous_model` is set", mend="remove it")


def previous(method: Method, args: AlignConfig, policy: nn.Module, name: str | None) -> nn.Module | None:
    """The policy as it is now, frozen, for a method that reads `anchor.previous`; None for others."""
    if PREVIOUS not in columns_needed(method).anchors:
        return None
    source = args.previous_model or name
    if source is None:
        return frozen_copy(policy, DTYPES[args.dtype])
    return freeze(frozen_weights(load_model(source, torch.float32, args.trust_remote_code), DTYPES[args.dtype]))


def guides(args: AlignConfig, backend: Backend, accelerator: Any, before: nn.Module | None = None) -> dict[str, Column]:
    """The frozen policies beside the reference, by the names of their `anchor.` columns."""
    found: dict[str, nn.Module] = {}
    if args.guide_model is not None:
        model = load_model(args.guide_model, torch.float32, args.trust_remote_code)
        found["guide"] = freeze(frozen_weights(model, DTYPES[args.dtype]))
    if before is not None:
        found["previous"] = before
    for model in found.values():
        prepare(model.to(accelerator.device), backend.name, probe=False)
    return {name: Frozen(_sharded_like(model, accelerator), name=name) for name, model in found.items()}


def _refuse(method: Method, args: AlignConfig, adapter: bool, live: bool) -> None:
    if args.reference_cache is not None and args.reference != "cached":
        raise ConfigError(
            f"`reference_cache` with reference `{args.reference}`", mend="use reference `cached`, or remove it"
        )
    if args.reference == "adapter_off" and not adapter:
        raise ConfigError(
            "reference `adapter_off` without an adapter", mend="add `peft` to the model, or use reference `frozen`"
        )
    if args.reference == "adapter_off" and args.reference_model is not None:
        raise ConfigError("`reference_model` with reference `adapter_off`", mend="use reference `frozen`")
    moving = "ema" if args.reference == "ema" else method.teacher if args.reference == "auto" else ""
    if moving and adapter:
        raise ConfigError(
            f"reference `{moving}` with an adapter",
            why="the base weights do not move",
            mend="train all weights, or use another",
        )
    if live and args.reference in ("cached", "adapter_off"):
        raise ConfigError(
            f"method `{method.id}` compares whole vocabularies, which reference `{args.reference}` cannot give",
            mend="use reference `frozen`",
        )


def _second_model(args: AlignConfig, policy: nn.Module, source: str | None, kind: str) -> nn.Module:
    # An EMA of a small weight would not move in bfloat16.
    dtype = torch.float32 if kind in MOVING else DTYPES[args.dtype]
    quantization = quantisation_of(policy)
    if quantization is not None and source is not None and args.reference_model is None:
        # The starting policy is the quantised model; as it was before, it would be another one.
        return freeze(load_model(source, dtype, args.trust_remote_code, quantization, args.device))
    if source is not None:
        return freeze(frozen_weights(load_model(source, torch.float32, args.trust_remote_code), dtype))
    if hasattr(policy, "peft_config"):
        raise ConfigError(
            "a frozen reference beside an adapter needs a model that can be loaded again",
            mend="give `model` as a folder or hub id, or use reference `adapter_off`",
        )
    return frozen_copy(policy, dtype)


def _refuse_moving_base(policy: Any) -> None:
    """With the adapter off, what it left in the base remains: trained biases, or weights that PiSSA took apart."""
    for config in policy.peft_config.values():
        start = getattr(config, "init_lora_weights", True)
        bias = getattr(config, "bias", "none") != "none"
        if bias or (isinstance(start, str) and start.split("_")[0] in ("pissa", "olora", "corda", "loftq")):
            raise ConfigError(
                "with this adapter switched off the model is not the base model",
                why="`bias` trains the base's own biases" if bias else f"`init_lora_weights: {start}` changes the base",
                mend="use reference `frozen`",
            )


def _adapter_is_zero(policy: Any) -> bool:
    """LoRA starts with B = 0; a loaded adapter does not."""
    found = [p for name, p in policy.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(found) and all(not p.any() for p in found)


def build_column(
    reference: Reference,
    args: AlignConfig,
    roles: Any,
    backend: Backend,
    accelerator: Any,
    any_rank: Callable[[bool], bool],
    steps_per_epoch: int = 1,
) -> Column:
    """The column a run asks for `ref_logp`, prepared for the same back end as the policy and for sharding."""
    column: Column
    if reference.kind == "adapter_off":
        column = AdapterOff(roles.policy)
    else:
        if reference.model is None:
            raise ConfigError(f"reference `{reference.kind}` without a model")
        reference.model.to(accelerator.device)
        prepare(reference.model, backend.name, probe=False)
        model = _sharded_like(reference.model, accelerator)
        if reference.kind in MOVING and model is not reference.model:
            raise ConfigError(
                f"reference `{reference.kind}` under ZeRO-3",
                why="each rank would save a shard of it, and one rank's would be kept",
                mend="use ZeRO-2 or plain data parallelism",
            )
        if reference.kind == "previous_epoch":
            column = Ema(model, 1.0, steps_per_epoch)
        else:
            column = Ema(model, args.ema_decay, args.ema_every) if reference.kind == "ema" else Frozen(model)
    if not reference.cached:
        return column
    weights = _weights(reference, roles)
    quantization = quantisation_of(roles.policy)
    if quantization is not None and args.reference_model is None:
        weights = digest([weights, quantization.to_dict()])
    key = store_key(weights, dtype=args.dtype, backend=backend.name)
    store = LogpStore(args.reference_cache or default_cache_dir(), key)
    logger.info("reference log-probs are cached in %s (%d there)", store.path, len(store))
    return Cached(store, live=column, pack=lambda trees: backend.pack(trees, accelerator.device), any_rank=any_rank)


def _weights(reference: Reference, roles: Any) -> str:
    source = reference.source
    if source is not None and Path(source).is_dir():
        return folder_hash(source, memo=default_cache_dir().parent / "hashes")
    if reference.model is not None:
        return module_hash(reference.model)
    with roles.policy.disable_adapter():
        return module_hash(roles.policy.get_base_model())


def _sharded_like(model: Any, accelerator: Any) -> Any:
    if not is_deepspeed(accelerator):
        return model
    plugin = accelerator.state.deepspeed_plugin
    if plugin.deepspeed_config["zero_optimization"]["stage"] != 3:
        return model
    from trl.models import prepare_deepspeed

    return prepare_deepspeed(model, accelerator).module
