"""Rows -> `Group`: one reader a source, made for the layout of its columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.data import transcripts as hh
from align.data.groups import Completion, Group, Message, Preference, RowId, Segment
from align.data.layout import Layout, Winner, find_layout
from align.data.messages import check_order, common_prompt, is_message_list, to_messages
from align.data.rows import Row, RowError

Transcripts = Literal["text", "messages"]
Prompt = str | tuple[Message, ...]

_GIVES: dict[str, frozenset[str]] = {
    "pairs": frozenset({"preferences"}),
    "unpaired": frozenset({"label"}),
    "scored": frozenset({"order"}),
    "rated": frozenset({"reward"}),
    "demonstrations": frozenset({"demonstrations"}),
    "messages": frozenset({"demonstrations"}),
    "text": frozenset({"demonstrations"}),
    "prompts": frozenset(),
}


@dataclass(frozen=True)
class Reader:
    """Turns rows into groups.

    Attributes:
        layout: what the columns mean.
        transcripts: HH transcripts stay plain text, or become messages.
    """

    layout: Layout
    transcripts: Transcripts = "text"

    @property
    def description(self) -> str:
        """One line for the log, with the columns that are not used."""
        return self.layout.describe()

    @property
    def gives(self) -> frozenset[str]:
        """The feedback in the rows: `preferences`, `label`, `order`, `reward` or `demonstrations`."""
        return _GIVES[self.layout.format]

    def __call__(self, row: Row, row_id: RowId) -> Group:
        """The group of a row.

        Raises:
            RowError: a part is missing, empty, of the wrong type, or contradicts another.
        """
        prompt, completions, preferences = _BUILDERS[self.layout.format](self, row)
        return Group(
            row=row_id,
            prompt=prompt,
            completions=completions,
            preferences=preferences,
            tools=_tools(row.get("tools")) if "tools" in self.layout.optional else None,
            annotator=str(row.get("annotator") or "") if "annotator" in self.layout.optional else "",
        )

    def part(self, row: Row, part: str) -> Any:
        """The value of a part's column; a missing one is an error of the row."""
        column = self.layout.columns[part]
        if row.get(column) is None:
            raise RowError(column, "missing")
        return row[column]

    def number(self, row: Row, name: str) -> float | None:
        """The value of an optional numeric column."""
        if name not in self.layout.optional or row.get(name) is None:
            return None
        return finite(row[name], name)


def reader_for(
    sample: Sequence[Row],
    winner: Winner | None = None,
    where: str = "",
    columns: Mapping[str, str] | None = None,
    transcripts: Transcripts = "text",
) -> Reader:
    """The reader for rows like `sample`; see `find_layout` for `winner`, `columns` and errors."""
    return Reader(find_layout(sample, winner, columns, where), transcripts)


def finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(name, f"not a number but {type(value).__name__}")
    if not math.isfinite(value):
        raise RowError(name, "not a finite number")
    return float(value)


Built = tuple[Prompt, tuple[Completion, ...], tuple[Preference, ...]]


def _pairs(reader: Reader, row: Row) -> Built:
    chosen, rejected, tie = _chosen_rejected(reader, row)
    if chosen == rejected:
        raise RowError("chosen", "chosen and rejected are identical")
    if reader.layout.transcript:
        prompt, first, second = _split_transcripts(reader, chosen, rejected)
    elif reader.layout.implicit_prompt:
        prompt, first, second = _split_implicit(chosen, rejected)
    else:
        prompt = prompt_of(reader.part(row, "prompt"), reader.layout.columns["prompt"])
        prompt, first = answer_of(prompt, chosen, "chosen")
        prompt, second = answer_of(prompt, rejected, "rejected")
    if _content(first) == _content(second):
        raise RowError("chosen", "chosen and rejected are identical")
    return prompt, (Completion(first), Completion(second)), (_preference(reader, row, tie),)


def _chosen_rejected(reader: Reader, row: Row) -> tuple[Any, Any, bool]:
    """(winning value, losing value, whether the label says that they tie)."""
    choice = reader.layout.choice
    chosen, rejected = reader.part(row, "chosen"), reader.part(row, "rejected")
    if choice is None:
        return chosen, rejected, False
    if row.get(choice.column) is None:
        raise RowError(choice.column, "missing")
    winner = choice.winner(row[choice.column])
    if winner is None:
        raise RowError(choice.column, f"`winner` says nothing of the value {str(row[choice.column])[:40]!r}")
    if winner == "":
        return chosen, rejected, True
    return (chosen, rejected, False) if winner == reader.layout.columns["chosen"] else (rejected, chosen, False)


def _preference(reader: Reader, row: Row, tie: bool) -> Preference:
    probability, weight = reader.number(row, "probability"), reader.number(row, "weight")
    if probability is not None and not 0 <= probability <= 1:
        raise RowError("probability", "not between 0 and 1")
    if "tie" in reader.layout.optional and row.get("tie") is not None:
        tie = tie or yes_or_no(row["tie"], "tie")
    return Preference(
        winner=0,
        loser=1,
        probability=0.5 if tie else probability,
        margin=reader.number(row, "margin"),
        weight=_weight(weight),
        tie=tie,
    )


def _split_transcripts(reader: Reader, chosen: Any, rejected: Any) -> tuple[Prompt, Any, Any]:
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str):
            raise RowError(name, f"not text but {type(value).__name__}")
    first, second = hh.turns_of(chosen, "chosen"), hh.turns_of(rejected, "rejected")
    shared = hh.common_turns(first, second)
    if reader.transcripts == "messages":
        return (
            hh.to_chat(first[:shared]),
            conversation_segments(hh.to_chat(first[shared:]), "chosen"),
            conversation_segments(hh.to_chat(second[shared:]), "rejected"),
        )
    return (
        hh.prompt_text(first[:shared]),
        _checked(hh.answer_segments(first[shared:], "chosen"), "chosen"),
        _checked(hh.answer_segments(second[shared:], "rejected"), "rejected"),
    )


def _split_implicit(chosen: Any, rejected: Any) -> tuple[Prompt, Any, Any]:
    if is_message_list(chosen) or is_message_list(rejected):
        first, second = to_messages(chosen, "chosen"), to_messages(rejected, "rejected")
        check_order(first, "chosen")
        check_order(second, "rejected")
        shared = common_prompt(first, second)
        if not shared:
            raise RowError("chosen", "chosen and rejected share no prompt")
        return (
            first[:shared],
            conversation_segments(first[shared:], "chosen"),
            conversation_segments(second[shared:], "rejected"),
        )
    first_text, second_text = text_of(chosen, "chosen"), text_of(rejected, "rejected")
    shared = _common_words(first_text, second_text)
    if not first_text[:shared].strip():
        raise RowError("chosen", "chosen and rejected share no prompt")
    return first_text[:shared], plain(first_text[shared:], "chosen"), plain(second_text[shared:], "rejected")


def _common_words(first: str, second: str) -> int:
    """Length of the common beginning, up to the end of its last whole word (TRL may cut within a word)."""
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    while shared and not (first[shared : shared + 1].isspace() and not first[shared - 1].isspace()):
        shared -= 1
    return shared


def _unpaired(reader: Reader, row: Row) -> Built:
    prompt, segments = _prompt_and_answer(reader, row)
    label = yes_or_no(reader.part(row, "label"), reader.layout.columns["label"])
    return prompt, (Completion(segments, label=label, weight=_weight(reader.number(row, "weight"))),), ()


def _rated(reader: Reader, row: Row) -> Built:
    prompt, segments = _prompt_and_answer(reader, row)
    reward = finite(reader.part(row, "reward"), reader.layout.columns["reward"])
    return prompt, (Completion(segments, reward=reward, weight=_weight(reader.number(row, "weight"))),), ()


def _demonstration(reader: Reader, row: Row) -> Built:
    prompt, segments = _prompt_and_answer(reader, row)
    return prompt, (Completion(segments, weight=_weight(reader.number(row, "weight"))),), ()


def _prompt_and_answer(reader: Reader, row: Row) -> tuple[Prompt, tuple[Segment, ...]]:
    columns = reader.layout.columns
    prompt = prompt_of(reader.part(row, "prompt"), columns["prompt"])
    return answer_of(prompt, reader.part(row, "completion"), columns["completion"])


def _scored(reader: Reader, row: Row) -> Built:
    columns = reader.layout.columns
    part = "scores" if "scores" in columns else "ranks"
    prompt = prompt_of(reader.part(row, "prompt"), columns["prompt"])
    answers, marks = reader.part(row, "completions"), reader.part(row, part)
    for name, value in ((columns["completions"], answers), (columns[part], marks)):
        if not isinstance(value, (list, tuple)):
            raise RowError(name, f"not a list but {type(value).__name__}")
    if len(answers) != len(marks):
        raise RowError(columns[part], "of another length than the completions")
    if not answers:
        raise RowError(columns["completions"], "an empty list")
    weight = _weight(reader.number(row, "weight"))
    completions = []
    for answer, mark in zip(answers, marks, strict=True):
        prompt, segments = answer_of(prompt, answer, columns["completions"])
        value = finite(mark, columns[part])
        if part == "scores":
            completions.append(Completion(segments, reward=value, weight=weight))
        elif value < 1 or not value.is_integer():
            raise RowError(columns[part], "not a whole number from 1")
        else:
            completions.append(Completion(segments, rank=int(value), weight=weight))
    return prompt, tuple(completions), ()


def _messages(reader: Reader, row: Row) -> Built:
    column = reader.layout.columns["messages"]
    messages = to_messages(reader.part(row, "messages"), column)
    check_order(messages, column)
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise RowError(column, "no assistant turn")
    if messages[-1]["role"] != "assistant":
        raise RowError(column, "wrong role order: the last turn is not the assistant's")
    segments = conversation_segments(messages[first:], column)
    return messages[:first], (Completion(segments, weight=_weight(reader.number(row, "weight"))),), ()


def _text(reader: Reader, row: Row) -> Built:
    text = text_of(reader.part(row, "text"), reader.layout.columns["text"])
    if not text.strip():
        raise RowError(reader.layout.columns["text"], "empty")
    segments = (Segment("assistant", text),)
    return "", (Completion(segments, weight=_weight(reader.number(row, "weight"))),), ()


def _prompt_only(reader: Reader, row: Row) -> Built:
    return prompt_of(reader.part(row, "prompt"), reader.layout.columns["prompt"]), (), ()


_BUILDERS: dict[str, Callable[[Reader, Row], Built]] = {
    "pairs": _pairs,
    "unpaired": _unpaired,
    "rated": _rated,
    "scored": _scored,
    "demonstrations": _demonstration,
    "messages": _messages,
    "text": _text,
    "prompts": _prompt_only,
}


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
        return prompt, _checked(hh.continuation(text, field), field)
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
    return _checked(tuple(segments), field)


def plain(text: str, field: str) -> tuple[Segment, ...]:
    return _checked((Segment("assistant", text),), field)


def text_of(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"not text but {type(value).__name__}")
    return value


def yes_or_no(value: Any, field: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, (int, float)) and value in (0, 1)):
        return bool(value)
    raise RowError(field, "neither true nor false")


def _checked(segments: tuple[Segment, ...], field: str) -> tuple[Segment, ...]:
    last = segments[-1]
    if not last.text.strip() and not (last.message or {}).get("tool_calls"):
        raise RowError(field, "empty")
    if any(hh.has_mark(segment.text) for segment in segments if segment.role == "assistant"):
        raise RowError(field, "holds the role mark of a transcript")
    return segments


def _content(segments: tuple[Segment, ...]) -> list[Any]:
    return [(segment.role, segment.text, segment.message) for segment in segments]


def _weight(value: float | None) -> float:
    if value is not None and value < 0:
        raise RowError("weight", "negative")
    return 1.0 if value is None else value


def _tools(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise RowError("tools", "not valid JSON") from None
