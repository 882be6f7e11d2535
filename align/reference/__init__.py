"""Reference and other frozen policies as named columns, and the on-disk cache of their log-probs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.reference.columns import AdapterOff, Cached, Column, Ema, Frozen, supplied
    from align.reference.store import LogpStore, MemoryStore, StoreKey, default_cache_dir, entry_key, store_key
    from align.reference.weights_hash import folder_hash, module_hash, tensors_hash

__all__ = [
    "AdapterOff",
    "Cached",
    "Column",
    "Ema",
    "Frozen",
    "LogpStore",
    "MemoryStore",
    "StoreKey",
    "default_cache_dir",
    "entry_key",
    "folder_hash",
    "module_hash",
    "store_key",
    "supplied",
    "tensors_hash",
]


def __getattr__(name: str) -> Any:
    # On demand: the store needs no torch, and a tool that looks into a cache should not wait for it.
    if name in __all__:
        for module in ("store", "weights_hash", "columns"):
            found = import_module(f"align.reference.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module `align.reference` has no attribute `{name}`")
