"""Several streams mixed by weight: exact shares, in an order that is a function of (seed, epoch) alone."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from align.data.stream import EpochOrder

_SLICE = 65_536
_KEPT_SLICES = 2
_KEPT_PASSES = 2


@dataclass(frozen=True)
class Mixture:
    """Streams of `rows` rows each, of which every one gives the share weight / sum of weights.

    An epoch ends where the first stream is used up (`interleave_datasets` calls it `first_exhausted`). A stream that
    is not used up goes on in the next epoch where it stopped, and is shuffled anew after each pass over it: no row
    comes again before all others of its stream have come.

    Attributes:
        rows: rows of each stream.
        weights: above 0; only their proportions count.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows that each stream gives to an epoch, at least one."""
        # `repr` gives the decimal that was written: 0.7 and 0.3 of 700 and 300 rows use up both.
        weights = [Fraction(repr(weight)) for weight in self.weights]
        length = min(rows / weight for rows, weight in zip(self.rows, weights, strict=True))
        return tuple(max(1, int(length * weight)) for weight in weights)

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> MixedOrder:
        return MixedOrder(self, seed, epoch, shuffle)

    def describe(self) -> str:
        """One line for the log."""
        counts, total = self.counts, sum(self.counts)
        shares = [f"{count} of {rows} ({count / total:.1%})" for count, rows in zip(counts, self.rows, strict=True)]
        return f"an epoch takes {total} rows: " + ", ".join(shares)


class MixedOrder:
    """The rows of one epoch of a mixture, as numbers of the streams laid end to end.

    The j-th of a stream's n rows stands at (j + 1/2) / n of the epoch, so any stretch of the epoch has each stream's
    share to within one row. Slices of about 65,536 rows are computed when they are read; two are kept.
    """

    def __init__(self, mixture: Mixture, seed: int, epoch: int, shuffle: bool) -> None:
        self.mixture, self.seed, self.epoch, self.shuffle = mixture, seed, epoch, shuffle
        self.counts = mixture.counts
        self._total = sum(self.counts)
        self._slices = max(1, -(-self._total // _SLICE))
        self._bases = [0, *itertools.accumulate(mixture.rows)]
        # starts[slice][stream]: rows of the stream before the slice
        self._starts = [[self._before(count, number) for count in self.counts] for number in range(self._slices + 1)]
        self._ends = [sum(starts) for starts in self._starts[1:]]
        self._made: dict[int, np.ndarray] = {}
        self._passes: dict[tuple[int, int], EpochOrder] = {}

    def __len__(self) -> int:
        return self._total

    def rows(self, start: int, stop: int) -> list[int]:
        """The rows at places start..stop of the epoch."""
        found: list[int] = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            base = self._ends[number - 1] if number else 0
            part = self._slice(number)[start - base : stop - base]
            if not len(part):
                raise IndexError(stop)
            found.extend(part.tolist())
            start += len(part)
        return found

    def _before(self, count: int, number: int) -> int:
        """How many of `count` rows stand before `number` / slices of the epoch: (j + 1/2) / count < number / slices."""
        return max(0, -((self._slices - 2 * count * number) // (2 * self._slices)))

    def _slice(self, number: int) -> np.ndarray:
        if number not in self._made:
            places, rows = [], []
            for stream, count in enumerate(self.counts):
                first, last = self._starts[number][stream], self._starts[number + 1][stream]
                places.append((np.arange(first, last) + 0.5) / count)
                rows.append(np.asarray(self._of_stream(stream, first, last), dtype=np.int64) + self._bases[stream])
            # A stable sort: at equal places the stream that is named first comes first.
            order = np.argsort(np.concatenate(places), kind="stable")
            while len(self._made) >= _KEPT_SLICES:
                self._made.pop(next(iter(self._made)))
            self._made[number] = np.concatenate(rows)[order]
        return self._made[number]

    def _of_stream(self, stream: int, first: int, last: int) -> list[int]:
        """The stream's own rows number first..last of this epoch, over the passes that they fall into."""
        size, taken = self.mixture.rows[stream], self.epoch * self.counts[stream]
        found: list[int] = []
        place, stop = taken + first, taken + last
        while place < stop:
            turn, inside = divmod(place, size)
            end = min(size, inside + stop - place)
            found.extend(self._pass(stream, turn).rows(inside, end))
            place += end - inside
        return found

    def _pass(self, stream: int, turn: int) -> EpochOrder:
        key = (stream, turn)
        if key not in self._passes:
            mine = [other for other in self._passes if other[0] == stream]
            for old in mine[: max(0, len(mine) - _KEPT_PASSES + 1)]:
                del self._passes[old]
            name = ("stream", stream)
            self._passes[key] = EpochOrder(self.mixture.rows[stream], self.seed, turn, self.shuffle, name)
        return self._passes[key]


def mixture_of(rows: Sequence[int], weights: Sequence[float]) -> Mixture | None:
    """None where all weights are 1: the streams are then joined, and an epoch is every row once."""
    if len(rows) < 2 or all(weight == 1 for weight in weights):
        return None
    return Mixture(tuple(rows), tuple(float(weight) for weight in weights))
