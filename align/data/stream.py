"""The order of an epoch, the rows of a step, and rows on demand: nothing here grows with the data."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, overload

import numpy as np

from align.core import seeds
from align.data.groups import Group, Question, RowId, TokenGroup
from align.data.reader import Reader
from align.data.rows import BadRow, RowError
from align.data.sources import Source

BLOCK = 4096
WINDOW = 16
"""Blocks that are mixed with one another."""


class EpochOrder(Sequence[int]):
    """The order of the rows in one epoch: blocks of 4,096 rows permuted, rows mixed within windows of 16 blocks.

    A function of (number of rows, seed, epoch, name) alone. Each window is computed when it is first read; two are
    kept. `name` tells streams apart that are shuffled each by itself.
    """

    def __init__(self, n_rows: int, seed: int, epoch: int, shuffle: bool = True, name: tuple[Any, ...] = ()) -> None:
        self.n_rows, self.seed, self.epoch, self.shuffle, self.name = n_rows, seed, epoch, shuffle, name
        blocks = -(-n_rows // BLOCK)
        order = np.arange(blocks)
        if shuffle:
            order = seeds.generator(seed, *name, "epoch", epoch, "blocks").permutation(blocks)
        self._windows = [order[start : start + WINDOW] for start in range(0, blocks, WINDOW)]
        self._ends = np.cumsum([self._size(window) for window in self._windows]).tolist()
        self._made: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.n_rows

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self.n_rows)
            return self.rows(start, stop)[::step] if step > 0 else [self[i] for i in range(start, stop, step)]
        place = index + self.n_rows if index < 0 else index
        if not 0 <= place < self.n_rows:
            raise IndexError(index)
        return self.rows(place, place + 1)[0]

    def __iter__(self) -> Iterator[int]:
        for window in range(len(self._windows)):
            yield from self._window(window).tolist()

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows at places start..stop of the order."""
        found: list[int] = []
        while start < stop:
            window = bisect.bisect_right(self._ends, start)
            base = self._ends[window - 1] if window else 0
            part = self._window(window)[start - base : stop - base]
            found.extend(part.tolist())
            start += len(part)
        return found

    def _window(self, index: int) -> np.ndarray:
        if index not in self._made:
            blocks = self._windows[index]
            rows = np.concatenate([np.arange(block * BLOCK, min((block + 1) * BLOCK, self.n_rows)) for block in blocks])
            if self.shuffle:
                mixer = seeds.generator(self.seed, *self.name, "epoch", self.epoch, "window", index)
                rows = mixer.permutation(rows)
            while len(self._made) >= 2:
                self._made.pop(next(iter(self._made)))
            self._made[index] = rows
        return self._made[index]

    def _size(self, blocks: np.ndarray) -> int:
        return sum(min(BLOCK, self.n_rows - int(block) * BLOCK) for block in blocks)


def epoch_order(n_rows: int, seed: int, epoch: int, shuffle: bool = True) -> EpochOrder:
    """The order of epoch `epoch`; without `shuffle`, that of the file."""
    return EpochOrder(n_rows, seed, epoch, shuffle)


class RowOrder(Protocol):
    """The rows of one epoch by their places."""

    epoch: int

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> list[int]: ...


class GlobalBatchSampler:
    """Yields the rows of each step of an epoch, the same on every rank.

    The last batch of an epoch may be smaller. `set_epoch` chooses the epoch; `start` the step at which the next
    iteration begins (a resumed run), once.

    Args:
        n_rows: rows of an epoch that takes every row once.
        repeat: steps in a row that get the same rows (a batch of rollouts feeds several).
        orders: epoch -> its order, where epochs are made otherwise (a mixture).
    """

    def __init__(
        self,
        n_rows: int,
        rows_per_step: int,
        seed: int,
        shuffle: bool = True,
        orders: Callable[[int], RowOrder] | None = None,
        repeat: int = 1,
    ) -> None:
        self.rows_per_step, self.repeat = rows_per_step, repeat
        self.start = 0
        self._orders = orders or partial(epoch_order, n_rows, seed, shuffle=shuffle)
        self._order: RowOrder = self._orders(0)

    @property
    def n_rows(self) -> int:
        return len(self._order)

    @property
    def epoch(self) -> int:
        return self._order.epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self._order = self._orders(epoch)

    def __len__(self) -> int:
        return -(-self.n_rows // self.rows_per_step) * self.repeat

    def batch(self, step: int) -> list[int]:
        """The rows of one step of the epoch."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        place = step // self.repeat
        return self._order.rows(place * self.rows_per_step, min((place + 1) * self.rows_per_step, self.n_rows))

    def __iter__(self) -> Iterator[list[int]]:
        first, self.start = self.start, 0
        return map(self.batch, range(first, len(self)))


@dataclass(frozen=True, slots=True)
class Hole:
    """A row that gives nothing: bad, or (`dropped`) sound and not wanted. It leaves its batch smaller."""

    row: RowId
    index: int
    field: str
    reason: str
    dropped: bool = False


Item = TokenGroup | Hole


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One step's data: the groups, the holes, and the id and index of every row asked for, in order."""

    groups: tuple[TokenGroup, ...]
    holes: tuple[Hole, ...]
    rows: tuple[RowId, ...]

    def __len__(self) -> int:
        return len(self.groups)


def collate(items: Sequence[Item]) -> GlobalBatch:
    """The items of one step as a batch; nothing is padded and nothing moves up into a hole."""
    return GlobalBatch(
        groups=tuple(item for item in items if not isinstance(item, Hole)),
        holes=tuple(item for item in items if isinstance(item, Hole)),
        rows=tuple(item.row for item in items),
    )


class GroupDataset:
    """Rows of one source or several, end to end, as tokens: map-style, for any loader.

    Attributes:
        sources, readers: aligned; `tokenise` is a `Tokeniser` (or any Group -> TokenGroup).
    """

    def __init__(
        self, sources: Sequence[Source], readers: Sequence[Reader], tokenise: Callable[[Group], TokenGroup]
    ) -> None:
        self.sources, self.readers, self.tokenise = list(sources), list(readers), tokenise
        self.asks = getattr(tokenise, "view", "") == "prompts"
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items at `indices`, in that order; each source is asked once."""
        places = [self._locate(int(index)) for index in indices]
        items: dict[int, Item] = {}
        for number, source in enumerate(self.sources):
            mine = [(at, row) for at, (owner, row) in enumerate(places) if owner == number]
            if mine:
                rows = source.read([row for _, row in mine])
                for (at, row), value in zip(mine, rows, strict=True):
                    items[at] = self.item(number, row, value)
        return [items[at] for at in range(len(places))]

    def item(self, number: int, row: int, value: dict[str, Any] | BadRow) -> Item:
        """A row of source `number`, already read, as tokens or a hole."""
        row_id = self.sources[number].row_id(row)
        index = row + (self._ends[number - 1] if number else 0)
        if isinstance(value, BadRow):
            return Hole(row_id, index, value.field, value.reason)
        try:
            group = self.readers[number](value, row_id)
            made = self.tokenise(group)
            if self.asks:
                return replace(made, question=Question(group.prompt, group.tools, value))
            return made
        except RowError as error:
            return Hole(row_id, index, error.field, error.reason, error.dropped)

    @property
    def rows_parsed(self) -> int:
        """Rows turned into objects so far in this process."""
        return sum(source.rows_parsed for source in self.sources)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)
