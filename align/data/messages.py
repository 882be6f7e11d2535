"""Chat messages in their dialects, brought to `role` and `content`, and the order of their turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.groups import Message
from align.data.rows import RowError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_OPENING = {"system", "developer"}


def is_message_list(value: Any) -> bool:
    """Whether a value is a list of messages, or JSON text of one."""
    items = _from_json(value) if isinstance(value, str) else value
    return (
        isinstance(items, (list, tuple))
        and len(items) > 0
        and all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in items)
    )


def to_messages(value: Any, field: str) -> tuple[Message, ...]:
    """Messages with `role` and text `content`.

    Raises:
        RowError: not a list of messages, an unknown role, content that is no text, an image.
    """
    items = _from_json(value) if isinstance(value, str) else value
    if items is None:
        raise RowError(field, "missing")
    if not isinstance(items, (list, tuple)):
        raise RowError(field, f"not a list of messages but {type(value).__name__}")
    if not items:
        raise RowError(field, "an empty list of messages")
    return tuple(_message(item, field) for item in items)


def check_order(messages: Sequence[Message], field: str) -> None:
    """System turns first, a user turn before the first assistant turn, no two assistant turns in a row."""
    before = ""
    for message in messages:
        role = message["role"]
        if role in _OPENING and before not in ("", *_OPENING):
            raise RowError(field, "wrong role order: a system turn after the conversation began")
        if role == "assistant" and before in ("", *_OPENING):
            raise RowError(field, "wrong role order: an assistant turn before any user turn")
        if role == "assistant" and before == "assistant":
            raise RowError(field, "wrong role order: two assistant turns in a row")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(field, "wrong role order: a tool turn without an assistant turn before it")
        before = role


def common_prompt(first: Sequence[Message], second: Sequence[Message]) -> int:
    """Length of the longest common prefix after which both go on with an assistant turn; 0 where there is none.

    In the order that `check_order` asks for, such a prefix does not end in an assistant turn.
    """
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    for length in range(min(shared, len(first) - 1, len(second) - 1), 0, -1):
        if first[length]["role"] == second[length]["role"] == "assistant":
            return length
    return 0


def merged(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Neighbouring turns of one role joined by a newline (an empty line could make a transcript mark of a text)."""
    out: list[dict[str, Any]] = []
    for message in messages:
        if out and out[-1]["role"] == message["role"]:
            out[-1]["content"] += "\n" + message["content"]
        else:
            out.append(dict(message))
    return tuple(out)


def _message(item: Any, field: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(field, f"a message is not an object but {type(item).__name__}")
    # Arrow gives every message the keys of all of them, with None where one had none.
    given = {key: value for key, value in item.items() if value is not None}
    name = given.pop("role", None) or given.pop("from", None)
    given.pop("from", None)
    if not isinstance(name, str):
        raise RowError(field, "a message without a role")
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise RowError(field, f"unknown role `{name}`")
    content = given.pop("content", None)
    if content is None:
        content = given.pop("value", None)
    if content is None and given.get("tool_calls"):
        content = ""
    return {"role": role, "content": _text(content, field), **given}


def _text(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        return "".join(_part(part, field) for part in content)
    if content is None:
        raise RowError(field, "a message without content")
    raise RowError(field, f"content is not text but {type(content).__name__}")


def _part(part: Any, field: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type", "object") if isinstance(part, Mapping) else type(part).__name__
    raise RowError(field, f"content holds a part that is not text but {kind}")


def _from_json(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
