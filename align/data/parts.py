"""The parts of a row: prompts, answers as segments, numbers and marks, checked one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from align.data import transcripts as hh
from align.data.groups import Message, Segment
from align.data.messages import check_order, is_message_list, to_messages
from align.data.rows import RowError

Prompt = str | tuple[Message, ...]


def prompt_of(value: Any, field: str) -> Prompt:
    """Text, or messages that end in a turn to be answered."""
    if isinstance(value, str) and not is_message_list(value):
        if not value.strip():
            raise RowError(field, "empty")
        return value
    if not isinstance(value, (str, list, tuple)):
        raise RowError(field, f"neither text nor messages but {type(value).__name__}")
    messages = to_messages(value, field)
    check_order(messages, field)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(field, f"wrong role order: the prompt ends in a turn of the {messages[-1]['role']}")
    return messages


def answer_of(prompt: Prompt, value: Any, field: str) -> tuple[Prompt, tuple[Segment, ...]]:
    """(the prompt, in the form that fits the answer; the answer's segments)."""
    if isinstance(value, (list, tuple)) or (isinstance(value, str) and is_message_list(value)):
        messages = to_messages(value, field)
        if isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt},)
        if len(messages) > len(prompt) and messages[: len(prompt)] == prompt:
            messages = messages[len(prompt) :]
        return prompt, conversation_segments(messages, field)
    text = text_of(value, field)
    if not isinstance(prompt, str):
        return prompt, conversation_segments(({"role": "assistant", "content": text},), field)
    if prompt.endswith(hh.ASSISTANT) and hh.has_mark(text):
        return prompt, checked(hh.continuation(text, field), field)
    return prompt, plain(text, field)


def conversation_segments(messages: Sequence[Message], field: str) -> tuple[Segment, ...]:
    """The turns of an answer: from assistant to assistant, with what users and tools said between."""
    if messages[0]["role"] != "assistant":
        raise RowError(field, f"wrong role order: the answer starts with a turn of the {messages[0]['role']}")
    if messages[-1]["role"] != "assistant":
        raise RowError(field, "wrong role order: the last turn is not the assistant's")
    check_order(({"role": "user", "content": ""}, *messages), field)
    segments, step = [], -1
    for message in messages:
        scored = message["role"] == "assistant"
        step += scored
        segments.append(Segment(message["role"], message["content"], scored=scored, step=step, message=message))
    return checked(tuple(segments), field)


def plain(text: str, field: str) -> tuple[Segment, ...]:
    return checked((Segment("assistant", text),), field)


def finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(name, f"not a number but {type(value).__name__}")
    if not math.isfinite(value):
        raise RowError(name, "not a finite number")
    return float(value)


def text_of(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"not text but {type(value).__name__}")
    return value


def yes_or_no(value: Any, field: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
        return bool(value)
    raise RowError(field, "neither true nor false")


def checked(segments: tuple[Segment, ...], field: str) -> tuple[Segment, ...]:
    last = segments[-1]
    if not last.text.strip() and not (last.message or {}).get("tool_calls"):
        raise RowError(field, "empty")
    if any(hh.has_mark(segment.text) for segment in segments if segment.role == "assistant"):
        raise RowError(field, "holds the role mark of a transcript")
    return segments


def content_of(segments: tuple[Segment, ...]) -> list[Any]:
    return [(segment.role, segment.text, segment.message) for segment in segments]


def weight_of(value: float | None) -> float:
    if value is not None and value < 0:
        raise RowError("weight", "negative")
    return 1.0 if value is None else value


def tools_of(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise RowError("tools", "not valid JSON") from None
