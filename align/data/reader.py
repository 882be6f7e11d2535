"""A row -> its `Group`, by the layout of its columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from align.data import transcripts as hh
from align.data.filters import Filter
from align.data.groups import CONTRASTS, ROLES, Completion, Group, Preference, RowId, Segment, contrast_role
from align.data.known import Choices, Known
from align.data.layout import ANSWER_REWARDS, STEP_REWARDS, Layout
from align.data.messages import check_order, common_prompt, is_message_list, to_messages
from align.data.parts import (
    Prompt,
    answer_of,
    checked,
    content_of,
    conversation_segments,
    finite,
    plain,
    prompt_of,
    text_of,
    tools_of,
    weight_of,
    yes_or_no,
)
from align.data.rows import Row, RowError

Transcripts = Literal["text", "messages"]
Ties = Literal["drop", "keep"]
Diverging = Literal["keep", "drop"]

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
        layout: what the columns mean, those of `known` once it has shaped them.
        transcripts: HH transcripts stay plain text, or become messages.
        known: the public data set that the rows are of.
        choices: what was chosen where that leaves a choice.
        filters: which rows are wanted.
        ties: `drop` leaves tied pairs out whatever the method reads; None: as the method reads them.
        diverging: what becomes of answers that part before their last turn.
        chat: plain prompts become a user turn, plain answers an assistant's.
    """

    layout: Layout
    transcripts: Transcripts = "text"
    known: Known | None = None
    choices: Choices = field(default_factory=Choices)
    filters: tuple[Filter, ...] = ()
    ties: Ties | None = None
    diverging: Diverging = "keep"
    chat: bool = False

    @property
    def description(self) -> str:
        """One line for the log: what was decided, and what is not used."""
        known = self.known
        text = (
            f"read as: {self.layout.format} of `{known.name}`, {known.direction}" if known else self.layout.describe()
        )
        says = [
            f"axis `{self.choices.axis}`" if self.choices.axis else "",
            "as messages" if self.transcripts == "messages" else "",
            "as a chat" if self.chat else "",
            *(f"rows with `{one.column}` {one.describe()}" for one in self.filters),
            f"ties: {self.ties}" if self.ties else "",
            "answers that part early are dropped" if self.diverging == "drop" else "",
        ]
        return "; ".join([text, *(words for words in says if words)])

    @property
    def gives(self) -> frozenset[str]:
        """The feedback in the rows: `preferences`, `label`, `order`, `reward` or `demonstrations`."""
        return _GIVES[self.layout.format]

    def reading(self, parts: Collection[str]) -> Reader:
        """The reader that also reads these parts of `layout.EXTRAS`, where there are columns for them."""
        return replace(self, layout=self.layout.reading(parts))

    def __call__(self, row: Row, row_id: RowId) -> Group:
        """The group of a row.

        Raises:
            RowError: a part is missing, empty, of the wrong type, or contradicts another; or (`dropped`) the row is
                filtered out.
        """
        for wanted in self.filters:
            wanted(row)
        row = self.shaped(row)
        prompt, completions, preferences = _BUILDERS[self.layout.format](self, row)
        completions += (*_extras(self, row, prompt), *_contrasts(self, row))
        if self.diverging == "drop" and any(_parts_early(completion) for completion in completions):
            raise RowError("", "the answers part before their last turn", dropped=True)
        meta = dict(row["meta"]) if self.known and row.get("meta") else {}
        return Group(
            row=row_id,
            prompt=self.with_system(prompt, row),
            completions=completions,
            preferences=preferences,
            tools=tools_of(self.value(row, "tools")),
            annotator="" if (annotator := self.value(row, "annotator")) is None else str(annotator),
            meta=meta | ({"ties": self.ties} if self.ties else {}),
        )

    def shaped(self, row: Row) -> Row:
        """The row in plain columns, where the data set has its own."""
        if self.known is None:
            return row
        try:
            return self.known.shape(row, self.choices)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise RowError("", f"not of the form of `{self.known.name}` ({type(error).__name__})") from error

    def part(self, row: Row, part: str) -> Any:
        """The value of a part's column; a missing one is an error of the row."""
        column = self.layout.columns[part]
        if row.get(column) is None:
            raise RowError(column, "missing")
        return row[column]

    def value(self, row: Row, part: str) -> Any:
        """The value of an optional part, or None."""
        return row.get(self.layout.optional[part]) if part in self.layout.optional else None

    def number(self, row: Row, part: str) -> float | None:
        """The value of an optional numeric part."""
        value = self.value(row, part)
        return None if value is None else finite(value, self.layout.optional[part])

    def prompt(self, row: Row) -> Prompt:
        """The prompt's column, as a user turn where plain prompts are a chat."""
        prompt = prompt_of(self.part(row, "prompt"), self.layout.columns["prompt"])
        return ({"role": "user", "content": prompt},) if self.chat and isinstance(prompt, str) else prompt

    def with_system(self, prompt: Prompt, row: Row) -> Prompt:
        """The prompt behind the row's system text, if there is any."""
        if self.layout.system is None or isinstance(prompt, str):
            return prompt
        system = row.get(self.layout.system)
        if system is None or (isinstance(system, str) and not system.strip()):
            return prompt
        opening = text_of(system, self.layout.system)
        if prompt and prompt[0]["role"] == "system":
            if prompt[0]["content"] != opening:
                raise RowError(self.layout.system, "differs from the system turn of the conversation")
            return prompt
        return ({"role": "system", "content": opening}, *prompt)


def _extras(reader: Reader, row: Row, prompt: Prompt) -> Iterator[Completion]:
    """The samples and the demonstration of a row, where a method asked for them."""
    for part, role in ROLES.items():
        column = reader.layout.optional.get(part)
        if column is None:
            continue
        values = row.get(column) if part == "samples" else [row.get(column)]
        if not isinstance(values, (list, tuple)) or not values:
            raise RowError(column, "no list of answers")
        for value in values:
            if value is None:
                raise RowError(column, "missing")
            fitting, segments = answer_of(prompt, value, column)
            if isinstance(fitting, str) != isinstance(prompt, str):
                raise RowError(column, "messages beside answers that are text")
            yield Completion(segments, role=role)


def _contrasts(reader: Reader, row: Row) -> Iterator[Completion]:
    """The answers of a row's prompt contrasts, each with a prompt of its own and a role that gives its sign.

    `intra`: +y after the better prompt, -y after the worse. `inter`: +chosen -rejected after the better prompt,
    -chosen +rejected after the worse.
    """
    column = reader.layout.optional.get("contrasts")
    if column is None:
        return
    if not isinstance(row.get(column), (list, tuple)):
        raise RowError(column, "no list of contrasts")
    numbers = dict.fromkeys(CONTRASTS, 0)
    for value in row[column]:
        if not isinstance(value, Mapping) or value.get("kind") not in CONTRASTS:
            raise RowError(column, "a contrast has a `kind`, intra or inter, and prompts `better` and `worse`")
        kind = str(value["kind"])
        if kind == "intra":
            answers = [(1, value.get("completion"))]
        else:
            answers = [(1, reader.part(row, "chosen")), (-1, reader.part(row, "rejected"))]
        for side, way in (("better", 1), ("worse", -1)):
            asked = prompt_of(value.get(side), f"{column}.{side}")
            if reader.chat and isinstance(asked, str):
                asked = ({"role": "user", "content": asked},)
            for sign, answer in answers:
                own, segments = answer_of(asked, answer, column)
                yield Completion(segments, role=contrast_role(kind, numbers[kind], sign * way), prompt=own)
        numbers[kind] += 1


def _parts_early(completion: Completion) -> bool:
    return any(segment.role == "user" for segment in completion.segments)


Built = tuple[Prompt, tuple[Completion, ...], tuple[Preference, ...]]


def _pairs(reader: Reader, row: Row) -> Built:
    chosen, rejected, tie = _chosen_rejected(reader, row)
    if chosen == rejected:
        raise RowError("chosen", "chosen and rejected are identical")
    if reader.layout.transcript:
        prompt, first, second = _split_transcripts(reader, chosen, rejected)
    elif reader.layout.implicit_prompt:
        prompt, first, second = _split_implicit(chosen, rejected)
        if reader.chat and isinstance(prompt, str):
            prompt = ({"role": "user", "content": prompt},)
            first, second = (_spoken(segments) for segments in (first, second))
    else:
        prompt = reader.prompt(row)
        prompt, first = answer_of(prompt, chosen, "chosen")
        prompt, second = answer_of(prompt, rejected, "rejected")
    if content_of(first) == content_of(second):
        raise RowError("chosen", "chosen and rejected are identical")
    earned = [_step_rewards(reader, row, part) for part in STEP_REWARDS]
    rewards = [reader.number(row, part) for part in ANSWER_REWARDS]
    answers = (
        Completion(first, reward=rewards[0], step_rewards=earned[0]),
        Completion(second, reward=rewards[1], step_rewards=earned[1]),
    )
    return prompt, answers, (_preference(reader, row, tie, rewards),)


def _step_rewards(reader: Reader, row: Row, part: str) -> tuple[float, ...] | None:
    values = reader.value(row, part)
    if values is None:
        return None
    column = reader.layout.optional[part]
    if not isinstance(values, (list, tuple)):
        raise RowError(column, f"not a list but {type(values).__name__}")
    return tuple(finite(value, column) for value in values)


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


def _preference(reader: Reader, row: Row, tie: bool, rewards: Sequence[float | None]) -> Preference:
    margin, (won, lost) = reader.number(row, "margin"), rewards
    if margin is None and won is not None and lost is not None:
        margin = won - lost
    probability, weight = reader.number(row, "probability"), reader.number(row, "weight")
    if probability is not None and not 0 <= probability <= 1:
        raise RowError(reader.layout.optional["probability"], "not between 0 and 1")
    if (tied := reader.value(row, "tie")) is not None:
        tie = tie or yes_or_no(tied, reader.layout.optional["tie"])
    return Preference(
        winner=0,
        loser=1,
        probability=0.5 if tie else probability,
        margin=margin,
        weight=weight_of(weight),
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
        checked(hh.answer_segments(first[shared:], "chosen"), "chosen"),
        checked(hh.answer_segments(second[shared:], "rejected"), "rejected"),
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


def _spoken(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Plain text as a turn of the assistant."""
    said = "".join(segment.text for segment in segments).strip()
    return conversation_segments(({"role": "assistant", "content": said},), "chosen")


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
    return prompt, (Completion(segments, label=label, weight=weight_of(reader.number(row, "weight"))),), ()


def _rated(reader: Reader, row: Row) -> Built:
    prompt, segments = _prompt_and_answer(reader, row)
    reward = finite(reader.part(row, "reward"), reader.layout.columns["reward"])
    return prompt, (Completion(segments, reward=reward, weight=weight_of(reader.number(row, "weight"))),), ()


def _demonstration(reader: Reader, row: Row) -> Built:
    prompt, segments = _prompt_and_answer(reader, row)
    return prompt, (Completion(segments, weight=weight_of(reader.number(row, "weight"))),), ()


def _prompt_and_answer(reader: Reader, row: Row) -> tuple[Prompt, tuple[Segment, ...]]:
    columns = reader.layout.columns
    prompt = reader.prompt(row)
    return answer_of(prompt, reader.part(row, "completion"), columns["completion"])


def _scored(reader: Reader, row: Row) -> Built:
    columns = reader.layout.columns
    part = "scores" if "scores" in columns else "ranks"
    prompt = reader.prompt(row)
    answers, marks = reader.part(row, "completions"), reader.part(row, part)
    for name, value in ((columns["completions"], answers), (columns[part], marks)):
        if not isinstance(value, (list, tuple)):
            raise RowError(name, f"not a list but {type(value).__name__}")
    if len(answers) != len(marks):
        raise RowError(columns[part], "of another length than the completions")
    if not answers:
        raise RowError(columns["completions"], "an empty list")
    weight = weight_of(reader.number(row, "weight"))
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
    return messages[:first], (Completion(segments, weight=weight_of(reader.number(row, "weight"))),), ()


def _text(reader: Reader, row: Row) -> Built:
    text = text_of(reader.part(row, "text"), reader.layout.columns["text"])
    if not text.strip():
        raise RowError(reader.layout.columns["text"], "empty")
    segments = (Segment("assistant", text),)
    return "", (Completion(segments, weight=weight_of(reader.number(row, "weight"))),), ()


def _prompt_only(reader: Reader, row: Row) -> Built:
    return reader.prompt(row), (), ()


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
