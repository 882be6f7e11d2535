"""Files -> prompts to sample for, with an account of the rows that hold none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from align.core.errors import DataError, suggestion
from align.data.groups import Group, Message, RowId
from align.data.messages import check_order, to_messages
from align.data.parts import prompt_of
from align.data.prepare import SourceSpec, open_sources
from align.data.reader import Reader
from align.data.rejected import RejectedLog
from align.data.rows import BadRow, Row, RowError
from align.data.sources import Source
from align.data.stream import Hole
from align.sampling.prompts import PromptEncoder

_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt: where it was read, text or messages, and the ids a model is asked with.

    `columns`, `group`: the row as it was read, and what it gave besides the prompt; of `read_streams` only.
    """

    row: RowId
    prompt: str | tuple[Message, ...]
    tools: Any
    ids: tuple[int, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    group: Group | None = None


@dataclass(eq=False)
class PromptSet:
    """Prompts in the order of the rows; `rejected` counts the rows that gave none; `read_as` says what was read."""

    prompts: list[Asked]
    rejected: RejectedLog
    read_as: str = ""
    _source: str = field(default="", repr=False)

    def encode(self, encoder: PromptEncoder, room: int | None = None) -> PromptSet:
        """The prompts with their ids; those that fail or exceed `room` tokens are rejected.

        Raises:
            DataError: none is left.
            ModelError: messages, and no chat template that keeps prefixes.
        """
        kept, holes = [], []
        for number, asked in enumerate(self.prompts):
            try:
                ids = encoder(asked.prompt, asked.tools)
                if room is not None and len(ids) > room:
                    raise RowError("prompt", "too long for the model with `max_new_tokens`", dropped=True)
                kept.append(replace(asked, ids=tuple(ids)))
            except RowError as error:
                holes.append(Hole(asked.row, number, error.field, error.reason, error.dropped))
        self.rejected.looked(self._source, 0, holes)
        made = PromptSet(kept, self.rejected, self.read_as, self._source)
        made.check()
        return made

    def check(self) -> None:
        """Raise `DataError` where no prompt is left."""
        if self.prompts:
            return
        reasons = [
            f"{count} x {reason} ({', '.join(self.rejected.examples[reason])})"
            for reason, count in self.rejected.reasons.most_common(5)
        ]
        long = any("too long" in reason for reason in reasons)
        mend = "set --max-new-tokens lower, or shorten the prompts" if long else "look at the rows named"
        raise DataError("no row gives a prompt", where=self._source, why="; ".join(reasons), mend=mend)


def read_prompts(
    name: str, split: str | None = None, max_prompts: int | None = None, column: str | None = None
) -> PromptSet:
    """The prompt of every row of a file, folder or hub id.

    Read are a `.txt` file, a prompt a line, and every format of `align.data`: of pairs, lists and demonstrations the
    prompt; of `messages` those before the first answer, or all where the last one asks.

    Args:
        split: see `SourceSpec`.
        max_prompts: stop after so many prompts.
        column: the prompt's column, where the names do not tell; nothing else of a row is then read.

    Raises:
        DataError: nothing is there, it holds no prompts, or no row gives one.
    """
    if max_prompts is not None and max_prompts < 1:
        raise DataError(f"`max_prompts` is {max_prompts}", mend="use 1 or more")
    if name.endswith(".txt"):
        read_as, rows = "a prompt a line", _lines(name)
    elif column is not None:
        read_as, rows = f"prompt = column `{column}`", _column(name, split, column)
    else:
        read_as, rows = _any_format(name, split)
    prompts: list[Asked] = []
    holes: list[Hole] = []
    read = 0
    for item in rows:
        read += 1
        if isinstance(item, Hole):
            holes.append(item)
        else:
            prompts.append(item)
            if len(prompts) == max_prompts:
                break
    rejected = RejectedLog(None, 1.0)
    rejected.looked(name, read, holes)
    found = PromptSet(prompts, rejected, read_as, name)
    found.check()
    return found


def read_streams(streams: Sequence[SourceSpec | Mapping[str, Any] | Any], max_prompts: int | None = None) -> PromptSet:
    """The prompts of several sources in their order, with the row and the group that each was read from.

    Args:
        streams: as for `open_sources`.
        max_prompts: stop after so many prompts.

    Raises:
        DataError: nothing is there, it holds no prompts, or no row gives one.
    """
    rejected = RejectedLog(None, 1.0)
    prompts: list[Asked] = []
    read_as: list[str] = []
    for opened in open_sources(streams):
        if opened.reader.layout.format == "text":
            raise _whole_texts(opened.source.name, opened.reader.description)
        name, read = opened.source.name, 0
        holes: list[Hole] = []
        read_as.append(f"{name}: {opened.reader.description}")
        for item in _rows(opened.source, partial(_asked, reader=opened.reader, whole=True)):
            if max_prompts is not None and len(prompts) == max_prompts:
                break
            read += 1
            if isinstance(item, Hole):
                holes.append(item)
            else:
                prompts.append(item)
        rejected.looked(name, read, holes)
    found = PromptSet(prompts, rejected, "; ".join(read_as), ", ".join(line.split(":")[0] for line in read_as))
    found.check()
    return found


def given_prompts(texts: Sequence[str]) -> PromptSet:
    """Prompts given on the command line."""
    prompts = [Asked(RowId("-p", number, line=number + 1), text, None) for number, text in enumerate(texts)]
    return PromptSet(prompts, RejectedLog(None, 1.0), "given prompts", "-p")


def as_chat(found: PromptSet, system: str | None = None) -> PromptSet:
    """Plain prompts become a user's message; `system`, where given, comes first in place of a prompt's own."""
    prompts = []
    for asked in found.prompts:
        messages: tuple[Message, ...]
        messages = ({"role": "user", "content": asked.prompt},) if isinstance(asked.prompt, str) else asked.prompt
        if system is not None:
            turns = tuple(message for message in messages if message["role"] not in ("system", "developer"))
            messages = ({"role": "system", "content": system}, *turns)
        prompts.append(replace(asked, prompt=messages))
    return PromptSet(prompts, found.rejected, found.read_as, found._source)


def _any_format(name: str, split: str | None) -> tuple[str, Iterator[Asked | Hole]]:
    opened = open_sources([SourceSpec(name, split=split)])[0]
    reader = opened.reader
    if reader.layout.format == "text":
        raise _whole_texts(name, reader.description)
    return reader.description, _rows(opened.source, partial(_asked, reader=reader))


def _whole_texts(name: str, read_as: str) -> DataError:
    return DataError(
        "the rows hold whole texts, not prompts",
        where=name,
        why=read_as,
        mend="rename the column to `prompt`, or name it: --prompt-column, or `columns: {prompt: NAME}` in a recipe",
    )


def _column(name: str, split: str | None, column: str) -> Iterator[Asked | Hole]:
    source = SourceSpec(name, split=split).open()
    sample = source.read(range(min(len(source), _BLOCK)))
    names = list(dict.fromkeys(key for row in sample if not isinstance(row, BadRow) for key in row))
    if column not in names:
        raise DataError(
            f"there is no column `{column}`",
            where=name,
            why="the columns are " + ", ".join(f"`{key}`" for key in names),
            mend=suggestion(column, names),
        )

    def asked(row: Row, row_id: RowId) -> Asked:
        if row.get(column) is None:
            raise RowError(column, "missing")
        return Asked(row_id, prompt_of(row[column], column), None)

    return _rows(source, asked)


def _rows(source: Source, asked: Callable[[Row, RowId], Asked]) -> Iterator[Asked | Hole]:
    for start in range(0, len(source), _BLOCK):
        numbers = range(start, min(start + _BLOCK, len(source)))
        for number, row in zip(numbers, source.read(numbers), strict=True):
            row_id = source.row_id(number)
            if isinstance(row, BadRow):
                yield Hole(row_id, number, row.field, row.reason)
                continue
            try:
                yield asked(row, row_id)
            except RowError as error:
                yield Hole(row_id, number, error.field, error.reason, error.dropped)


def _asked(row: Row, row_id: RowId, reader: Reader, whole: bool = False) -> Asked:
    column = reader.layout.columns.get("messages") if reader.layout.format == "messages" else None
    if column and row.get(column) is not None:
        messages = to_messages(row[column], column)
        if messages[-1]["role"] in ("user", "tool"):  # nothing is answered yet, so a reader has no use for it
            check_order(messages, column)
            return Asked(row_id, messages, row.get("tools"), columns=row if whole else {})
    group = reader(row, row_id)
    if whole:
        return Asked(row_id, group.prompt, group.tools, columns=row, group=group)
    return Asked(row_id, group.prompt, group.tools)


def _lines(name: str) -> Iterator[Asked | Hole]:
    path = Path(name).expanduser()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError("cannot be read", where=name, why=str(error), mend="check the path") from error
    if not lines:
        raise DataError("there are no rows", where=name)
    for number, line in enumerate(lines):
        row_id = RowId(name, number, line=number + 1)
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError:
            yield Hole(row_id, number, "", "not valid UTF-8")
            continue
        yield Asked(row_id, text, None) if text.strip() else Hole(row_id, number, "", "an empty line", True)
