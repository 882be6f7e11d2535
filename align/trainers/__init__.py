"""Trainers: what a TRL user passes, what a recipe builds."""

from __future__ import annotations

from align.trainers.base import AlignTrainer
from align.trainers.config import AlignConfig
from align.trainers.preference import PreferenceTrainer

__all__ = ["AlignConfig", "AlignTrainer", "PreferenceTrainer"]
