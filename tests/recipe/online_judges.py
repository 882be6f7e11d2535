"""Reward functions that recipes of the tests name."""

from __future__ import annotations

from typing import Any


def share_of_a(prompts: list[Any], completions: list[Any], wanted: list[str], **columns: Any) -> list[float]:
    """The share of an answer's characters that are the wanted one; a column of the row says which."""
    assert len(prompts) == len(completions) == len(wanted)
    return [text.count(letter) / max(len(text), 1) for text, letter in zip(completions, wanted, strict=True)]


def length(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]
