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
    """Where a row was read: the source as the user named it, and the row's number from 0.

    `line` and `file` are for people, and no part of what makes a row the same: the line of a text file where the row
    stands, from 1 as editors count, and that file where it is not `source`.
    """

    source: str
    row: int
    line: int | None = field(default=None, compare=False)
    file: str = field(default="", compare=False)

    def __str__(self) -> str:
        """`pairs.jsonl:13`, a line; `set.parquet row 12` of what has no lines, as `dataset[12]` reads it."""
        return f"{self.source} row {self.row}" if self.line is None else f"{self.file or self.source}:{self.line}"

    def place(self) -> dict[str, str | int]:
        """The same as JSON: `{"file", "line"}` or `{"file", "row"}`."""
        if self.line is None:
            return {"file": self.source, "row": self.row}
        return {"file": self.file or self.source, "line": self.line}


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
    """One answer: its segments and the absolute feedback on it; `prompt` where it answers another than the group's."""

    segments: tuple[Segment, ...]
    label: bool | None = None
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    rank: int | None = None
    weight: float = 1.0
    role: str = ""
    model: str = ""
    step_rewards: tuple[float, ...] | None = None
    prompt: str | tuple[Message, ...] | None = None

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


ROLES = {"samples": "sample", "baseline": "demonstration"}
"""What a method asks for beside the answers that are judged -> the `role` of these completions."""
CONTRASTS = ("intra", "inter")
"""Kinds of prompt contrasts: one answer after two prompts, and a pair after two prompts."""


def contrast_role(kind: str, number: int, sign: int) -> str:
    """The role of a completion that enters contrast `number` of its pair with this sign: `intra:0:+`."""
    return f"{kind}:{number}:{'+' if sign > 0 else '-'}"


def beside(role: str) -> bool:
    """Whether a completion of this role stands beside the judged answers: a sample, a demonstration, of a contrast."""
    return role in ROLES.values() or role.partition(":")[0] in CONTRASTS


@dataclass(frozen=True, slots=True)
class Preference:
    """`winner` and `loser` index the completions of the group. A tie has `probability` 0.5 and `tie` set.

    `marks`, in token groups of a method that needs them: which tokens of the winner and of the loser differ, bool.
    """

    winner: int
    loser: int
    probability: float | None = None
    margin: float | None = None
    weight: float = 1.0
    tie: bool = False
    marks: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False)


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
        step_rewards: one number for each step, earned at its last scored token.
        columns: float [T] each, numbers that came with the tokens: `sampler_logp`, `old_logp`, `advantage`.
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
    step_rewards: tuple[float, ...] | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A prompt as it was read, for those who answer and judge: text or messages, and the row's columns."""

    prompt: str | tuple[Message, ...]
    tools: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class TokenGroup:
    """A group as tokens: prompt ids int64 [P] (made once), completions, preferences by index.

    For the `pairs` view `preferences` lists the pairs to train on. For `singles` every completion is a unit, and
    `mismatched[i]`, where filled in by `data.partners`, is another row's completion scored after this prompt
    (KTO's KL estimate). For `lists` the whole group is a unit. `contexts` are other prompts, by name, after which a
    method wants the reference's log-probs of the same completions. For `prompts` there are no completions, and
    `question` is what the row asks.
    """

    row: RowId
    prompt: np.ndarray
    completions: tuple[TokenCompletion, ...]
    preferences: tuple[Preference, ...] = ()
    mismatched: tuple[TokenCompletion, ...] = ()
    contexts: Mapping[str, np.ndarray] = field(default_factory=dict)
    question: Question | None = None

    @property
    def tokens(self) -> int:
        """Unique tokens: the prompt once and every branch."""
        branches = (*self.completions, *self.mismatched)
        return len(self.prompt) + sum(len(branch) for branch in branches)
