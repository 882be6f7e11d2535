"""Held-out rows: distinct prompts to sample for, and the preference pairs that come with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.hashing import digest
from align.core.seeds import generator
from align.data.groups import Group, Message, RowId, TokenGroup
from align.data.layout import Winner
from align.data.prepare import SourceSpec, open_sources
from align.data.rejected import RejectedLog
from align.data.rows import BadRow, Row, RowError
from align.data.stream import Hole
from align.data.tokenise import Tokeniser
from align.data.views import check_view
from align.sampling.prompts import PromptEncoder

_BLOCK = 64
_FEEDBACK = frozenset({"prompt", "chosen", "rejected", "completion", "completions", "messages", "prompts", "label"})
"""Columns that a reward function does not get: it would judge completions that it is not asked about."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One distinct prompt.

    Attributes:
        row: where it was first read. prompt: text, or messages. ids: what the policy is asked with.
        columns: the row's other columns, for the reward function.
        pairs: tokens of the preference pairs of all rows with this prompt.
    """

    row: RowId
    prompt: str | tuple[Message, ...]
    tools: Any
    ids: tuple[int, ...]
    columns: Mapping[str, Any]
    pairs: tuple[TokenGroup, ...]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What was read.

    Attributes:
        prompts: distinct, in the order drawn. report: rows, read, repeated, bad, dropped, reasons, read_as.
        fingerprint: of the tokens and texts of all of it.
    """

    prompts: list[Prompt]
    report: Mapping[str, Any]
    fingerprint: str

    @property
    def pairs(self) -> int:
        return sum(len(prompt.pairs) for prompt in self.prompts)


def read_held_out(
    name: Any,
    tokenizer: Any,
    *,
    max_prompts: int | None = None,
    positions: int | None = None,
    max_new_tokens: int = 0,
    seed: int = 0,
    split: str | None = None,
    winner: Winner | None = None,
    chat_template: str | None = None,
    max_bad_fraction: float = 0.01,
) -> HeldOut:
    """Read up to `max_prompts` distinct prompts, in an order drawn from `seed` where there may be more.

    Args:
        name: any source of `data` (file, folder, hub id, list of rows), or a `.txt` file with a prompt a line.
        positions: most tokens of a prompt with an answer. Prompts that leave no room for `max_new_tokens`, and pairs
            that are longer, are dropped and counted.
        split, winner: see `SourceSpec`.

    Raises:
        DataError: nothing there, nothing usable, or too many bad rows.
    """
    lines = isinstance(name, (str, Path)) and str(name).endswith(".txt")
    rows = _lines(Path(name).expanduser()) if lines else name
    (opened,) = open_sources([SourceSpec(rows, split=split, winner=winner)], purpose="eval")
    source, reader = opened.source, opened.reader
    if lines:
        source.rename(str(name))
        source.of_lines = True
    check_view("prompts", (), reader.gives or {""}, source.name, reader.description)
    with_pairs = bool({"preferences", "order"} & reader.gives)
    collected = _Collected(tokenizer, with_pairs, positions, max_new_tokens, chat_template)
    count = len(source)
    drawn = max_prompts is not None and max_prompts < count
    order = generator(seed, "held-out").permutation(count).tolist() if drawn else list(range(count))
    for start in range(0, count, _BLOCK):
        block = order[start : start + _BLOCK]
        for index, row in zip(block, source.read(block), strict=True):
            if max_prompts is not None and len(collected.found) >= max_prompts:
                break
            collected.add(index, source.row_id(index), row, reader)
    log = RejectedLog(None, max_bad_fraction)
    log.looked(source.name, collected.read, collected.holes)
    log.check()
    if not collected.found:
        raise DataError(
            f"none of the {collected.read} rows holds a prompt that can be used",
            where=source.name,
            why="; ".join(f"{number} x {reason}" for reason, number in log.reasons.most_common(5)),
        )
    report = {"rows": count, "read": collected.read, "repeated": collected.repeated, "read_as": reader.description}
    report |= {key: value for key, value in log.report().items() if key != "seen"}
    return HeldOut(collected.prompts(), report, collected.fingerprint())


def _lines(path: Path) -> list[dict[str, str]]:
    try:
        return [{"prompt": line} for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("cannot be read", where=str(path), why=str(error), mend="check the path") from error


class _Collected:
    """Prompts found so far."""

    def __init__(
        self, tokenizer: Any, pairs: bool, positions: int | None, max_new_tokens: int, chat_template: str | None
    ) -> None:
        self.encode = PromptEncoder(tokenizer, chat_template)
        self.tokenise = Tokeniser(tokenizer, "pairs", positions, chat_template=chat_template) if pairs else None
        self.room = None if positions is None else positions - max_new_tokens
        self.found: dict[str, Prompt] = {}
        self.holes: list[Hole] = []
        self.read = self.repeated = 0
        self._pairs: dict[str, list[TokenGroup]] = {}

    def add(self, index: int, row_id: RowId, row: Row | BadRow, reader: Any) -> None:
        self.read += 1
        if isinstance(row, BadRow):
            self.holes.append(Hole(row_id, index, row.field, row.reason))
            return
        try:
            group: Group = reader(row, row_id)
            ids = tuple(self.encode(group.prompt, group.tools))
            if self.room is not None and len(ids) > self.room:
                raise RowError("prompt", "too long for the model and `max_new_tokens`", dropped=True)
        except RowError as error:
            self.holes.append(Hole(row_id, index, error.field, error.reason, error.dropped))
            return
        name = digest(list(ids))
        if name in self.found:
            self.repeated += 1
        else:
            columns = {key: value for key, value in row.items() if key not in _FEEDBACK}
            self.found[name] = Prompt(row_id, group.prompt, group.tools, ids, columns, ())
        self._pair(name, group, index)

    def _pair(self, name: str, group: Group, index: int) -> None:
        if self.tokenise is None:
            return
        try:
            self._pairs.setdefault(name, []).append(self.tokenise(group))
        except RowError as error:
            self.holes.append(Hole(group.row, index, error.field, error.reason, error.dropped))

    def prompts(self) -> list[Prompt]:
        return [
            Prompt(one.row, one.prompt, one.tools, one.ids, one.columns, tuple(self._pairs.get(name, ())))
            for name, one in self.found.items()
        ]

    def fingerprint(self) -> str:
        pairs = [
            [[group.prompt, [answer.ids for answer in group.completions]] for group in self._pairs.get(name, ())]
            for name in self.found
        ]
        return digest([[[str(one.row), list(one.ids), repr(one.columns)] for one in self.found.values()], pairs])
