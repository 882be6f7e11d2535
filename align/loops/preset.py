"""What a loop is: a declaration of what the stages of a round do, over which a recipe lays what it says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

from align.core.registry import LOOPS

__all__ = ["LOOPS", "Preset", "loop"]

P = TypeVar("P", bound="type[Preset]")
Wants = Literal["reward", "preference", "none"]


class Preset:
    """Base of all presets.

    `sample`, `pairs` and `method` hold sections of a recipe as they would be written there; a recipe's own keys win one
    by one. `method` of another name replaces the preset's whole.

    Attributes:
        sample: candidates of a prompt: `n`, `temperature`, `top_p`, ...
        pairs: the rule that makes rows to train on of judged candidates.
        method: `name` and options of the training.
        loop: defaults of the `loop` section: `rounds`, `take`, `reference`, `earlier`, `consistency`.
        feedback: entries of `feedback` where the recipe has none; empty: the recipe must bring its own. A model called
            `policy`, `before`, `initial` or `base` is the round's: who samples, the iterate before it, what the loop
            started from, and what that was trained from.
        wants: what the feedback must give: `reward` or `preference`; `none`: labels by construction.
        asks: options of `loop` that have no default on purpose -> what to choose by.
    """

    id: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    sample: ClassVar[Mapping[str, Any]] = {}
    pairs: ClassVar[Mapping[str, Any]] = {}
    method: ClassVar[Mapping[str, Any]] = {}
    loop: ClassVar[Mapping[str, Any]] = {}
    feedback: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    wants: ClassVar[Wants] = "reward"
    asks: ClassVar[Mapping[str, str]] = {}


def loop(id_: str, *, paper: str = "") -> Callable[[P], P]:
    """Register a preset under an id."""

    def mark(cls: P) -> P:
        cls.id, cls.paper = id_, paper
        return cls

    return mark
