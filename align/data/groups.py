"""One prompt, its completions and the feedback on them: as text (`Group`) and as tokens (`TokenGroup`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Message = Mapping[str, Any]
"""A chat message: `role`, `content`, and whatever else the chat template reads (for example `tool_calls`)."""


@dataclass(frozen=True, slots=True)
class RowId:
    """Where a row was read: the source as the user named it, and the row's number from 0."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a completion by one role. User, tool and system turns are never scored."""

    role: str
    text: str
    scored: bool = True
    step: int = 0
    message: Message | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its segments and the absolute feedback on it."""

    segments: tuple[Segment, ...]
    label: bool | None = None
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    weight: float = 1.0
    role: str = ""
    model: str = ""

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Preference:
    """`winner` and `loser` index the completions of the group. A tie has `probability` 0.5 and `tie` set."""

    winner: int
    loser: int
    probability: float | None = None
    margin: float | None = None
    weight: float = 1.0
    tie: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """One row. `prompt` is text, or messages that end in a non-assistant turn."""

    row: RowId
    prompt: str | tuple[Message, ...]
    completions: tuple[Completion, ...]
    preferences: tuple[Preference, ...] = ()
    tools: Any = None
    annotator: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


@dataclass(frozen=True, slots=True, eq=False)
class TokenCompletion:
    """A completion as tokens.

    Attributes:
        ids: int64 [T], with the end token where the completion is finished.
        mask: bool [T], true where a token is scored.
        step: int64 [T], the step (or turn) a token belongs to.
        finished: whether `ids` ends in an end token; false where the end was cut.
    """

    ids: np.ndarray
    mask: np.ndarray
    step: np.ndarray
    finished: bool = True
    label: bool | None = None
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    weight: float = 1.0
    role: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """A group as tokens: prompt ids int64 [P] (made once), completions, preferences by index.

    For the `pairs` view `preferences` lists the pairs to train on. For `singles` every completion is a unit, and
    `mismatched[i]`, where filled in by `data.partners`, is another row's completion scored after this prompt
    (KTO's KL estimate). For `lists` the whole group is a unit.
    """

    row: RowId
    prompt: np.ndarray
    completions: tuple[TokenCompletion, ...]
    preferences: tuple[Preference, ...] = ()
    mismatched: tuple[TokenCompletion, ...] = ()

    @property
    def tokens(self) -> int:
        """Unique tokens: the prompt once and every branch."""
        branches = (*self.completions, *self.mismatched)
        return len(self.prompt) + sum(len(branch) for branch in branches)
