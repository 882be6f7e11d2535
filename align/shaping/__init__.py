"""Rewards -> advantages and masks: pure functions over the whole batch of rollouts. Importing this imports no torch."""

from align.shaping.base import SHAPING, Batch, ShapingStage, make, run, shaping

__all__ = ["SHAPING", "Batch", "ShapingStage", "make", "run", "shaping"]
