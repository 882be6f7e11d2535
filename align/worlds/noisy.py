"""Worlds of faulty annotators: `style`, compared by people who flip labels, who prefer length, and who come in groups.

`noisy` has all of them; `flipped` and `length_biased` have one fault each.
"""

from __future__ import annotations

from dataclasses import dataclass

from align.core.options import option
from align.worlds.base import world
from align.worlds.style import Style


@world("noisy")
@dataclass(frozen=True, kw_only=True)
class Noisy(Style):
    """`style` with annotators of three groups: careful, hasty (flips labels), and fond of long answers."""

    careful: int = option(4, at_least=0, doc="annotators who follow the gold reward")
    hasty: int = option(4, at_least=0, doc="annotators who say the opposite with chance `flip`")
    lengthy: int = option(2, at_least=0, doc="annotators who prefer the answer of more words")


@world("flipped")
@dataclass(frozen=True, kw_only=True)
class Flipped(Style):
    """`style` with hasty annotators only: three labels in ten are the opposite of the gold preference."""

    hasty: int = option(4, at_least=0, doc="annotators who say the opposite with chance `flip`")


@world("length_biased")
@dataclass(frozen=True, kw_only=True)
class LengthBiased(Style):
    """`style` where half of the annotators follow the gold reward, and half prefer the answer of more words."""

    careful: int = option(4, at_least=0, doc="annotators who follow the gold reward")
    lengthy: int = option(4, at_least=0, doc="annotators who prefer the answer of more words")


def gold_reward(prompts: list, completions: list, **columns: object) -> list[float]:
    """The gold reward of `style`: the noise is in the annotators, not in what is wanted."""
    from align.worlds import style

    return style.gold_reward(prompts, completions, **columns)


def gold_preference(prompts: list, first: list, second: list, **columns: object) -> list[float]:
    """The gold preference of `style`, for the same reason."""
    from align.worlds import style

    return style.gold_preference(prompts, first, second, **columns)
