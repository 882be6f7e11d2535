"""Rounds: what happens between two trainings."""

from align.loops.sera import (
    Drawn,
    Sera,
    bootstrap,
    ensemble,
    largest,
    log_ratios,
    pair_margins,
    select_round,
)

__all__ = [
    "Drawn",
    "Sera",
    "bootstrap",
    "ensemble",
    "largest",
    "log_ratios",
    "pair_margins",
    "select_round",
]
