"""Transcripts of the form `\\n\\nHuman: ...\\n\\nAssistant: ...` (Anthropic HH).

Only the two-newline form is a mark: the words `Human:` and `Assistant:` also stand in ordinary text.
"""

from __future__ import annotations

import re

from align.data.groups import Message, Segment
from align.data.messages import merged
from align.data.rows import RowError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARK = re.compile(r"\n\n(Human|Assistant):")

Turn = tuple[str, str]
"""("Human" or "Assistant", the text after the mark, spaces included)."""


def is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.startswith(HUMAN) and ASSISTANT in value


def has_mark(text: str) -> bool:
    return _MARK.search(text) is not None


def turns_of(text: str, field: str) -> list[Turn]:
    marks = list(_MARK.finditer(text))
    if not marks or marks[0].start() != 0:
        raise RowError(field, "not a transcript: it does not start with a role mark")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [(mark.group(1), text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]


def common_turns(chosen: list[Turn], rejected: list[Turn]) -> int:
    """How many turns are the prompt: the longest common run that ends in a human turn and that both answer.

    Raises:
        RowError: the two do not share a first human turn.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    for length in range(min(shared, len(chosen) - 1, len(rejected) - 1), 0, -1):
        answered = chosen[length][0] == rejected[length][0] == "Assistant"
        if answered and chosen[length - 1][0] == "Human":
            return length
    raise RowError("chosen", "chosen and rejected share no prompt")


def prompt_text(turns: list[Turn]) -> str:
    """The turns as they stood, and the mark that asks for an answer."""
    return "".join(f"\n\n{role}:{text}" for role, text in turns) + ASSISTANT


def answer_segments(turns: list[Turn], field: str) -> tuple[Segment, ...]:
    """A completion after `prompt_text`: assistant texts without marks, and between them what the user said.

    A human turn keeps the marks around it in its own, unscored segment, so that the texts join to the original.
    """
    if turns[-1][0] != "Assistant":
        raise RowError(field, "the last turn is not the assistant's")
    segments: list[Segment] = []
    step = 0
    for place, (role, text) in enumerate(turns):
        if role == "Assistant":
            if place and turns[place - 1][0] == "Assistant":
                segments.append(Segment("user", ASSISTANT, scored=False, step=step))
                step += 1
            segments.append(Segment("assistant", text, step=step))
        else:
            answered = place + 1 < len(turns) and turns[place + 1][0] == "Assistant"
            segments.append(Segment("user", f"{HUMAN}{text}{ASSISTANT if answered else ''}", scored=False, step=step))
            step += answered
    return tuple(segments)


def continuation(text: str, field: str) -> tuple[Segment, ...]:
    """The segments of a plain completion whose prompt ends in the assistant's mark."""
    return answer_segments(turns_of(ASSISTANT + text, field), field)


def to_chat(turns: list[Turn]) -> tuple[Message, ...]:
    """The turns as messages; neighbours of one role are one message."""
    names = {"Human": "user", "Assistant": "assistant"}
    return merged([{"role": names[role], "content": text.strip()} for role, text in turns])
