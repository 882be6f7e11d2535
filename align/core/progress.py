"""Telling how far a long piece of work has come, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]
"""Called with the number of units (completions, rows, ...) that were done since the last call."""


def silent(done: int) -> None:
    """Nobody listens."""
