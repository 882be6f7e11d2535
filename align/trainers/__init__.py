"""Trainers: what a TRL user passes, what a recipe builds. Names are imported when first read."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.trainers.base import AlignTrainer
    from align.trainers.config import AlignConfig
    from align.trainers.online import OnlineTrainer
    from align.trainers.online_config import OnlineConfig
    from align.trainers.preference import PreferenceTrainer

__all__ = ["AlignConfig", "AlignTrainer", "OnlineConfig", "OnlineTrainer", "PreferenceTrainer"]

_HOME = {
    "AlignConfig": "config",
    "AlignTrainer": "base",
    "OnlineConfig": "online_config",
    "OnlineTrainer": "online",
    "PreferenceTrainer": "preference",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"align.trainers.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
