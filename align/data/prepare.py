"""From names of data to a data set that can be trained on: open, decide how to read, look, refuse what is bad."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.core.errors import DataError
from align.core.hashing import digest
from align.data.groups import TokenGroup
from align.data.layout import Winner
from align.data.readers import Reader, Transcripts, reader_for
from align.data.rejected import RejectedLog
from align.data.rows import BadRow, Row
from align.data.sources import Source, open_source
from align.data.stream import GlobalBatchSampler, GroupDataset, Hole
from align.data.tokenise import Tokeniser
from align.data.views import check_view

LOOK = 10_000
"""Rows looked at before training, of all sources together."""

_log = logging.getLogger(__name__)
_SAMPLE = 200
_CHUNK = 256


@dataclass(frozen=True)
class SourceSpec:
    """One entry of `data.train` or `data.eval`."""

    name: Any
    split: str | None = None
    max_rows: int | None = None
    revision: str | None = None
    config: str | None = None
    data_dir: str | None = None
    winner: Winner | None = None
    columns: Mapping[str, str] | None = None
    transcripts: Transcripts = "text"

    def open(self) -> Source:
        return open_source(
            self.name, self.split, self.max_rows, self.revision, config=self.config, data_dir=self.data_dir
        )


@dataclass(frozen=True)
class PreparedData:
    """Data that was looked at and may be trained on.

    Attributes:
        dataset: map-style; item -> `TokenGroup` or `Hole`.
        fingerprint: of rows, reading and tokenisation.
        report: rows, looked, kept, bad, dropped, reasons (with three rows each), tokens (quantiles), read_as.
        rejected: the log to go on with in training.
    """

    dataset: GroupDataset
    fingerprint: str
    report: Mapping[str, Any]
    rejected: RejectedLog = field(repr=False)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def rows_parsed(self) -> int:
        return self.dataset.rows_parsed

    def sampler(self, rows_per_step: int, seed: int, shuffle: bool = True) -> GlobalBatchSampler:
        return GlobalBatchSampler(len(self.dataset), rows_per_step, seed, shuffle)


def prepare_data(
    sources: Sequence[SourceSpec | Mapping[str, Any] | Any],
    tokenise: Tokeniser,
    *,
    rejected: RejectedLog | None = None,
    look: int = LOOK,
) -> PreparedData:
    """Open sources, decide how to read each, and look at up to `look` rows in all, in file order.

    Args:
        sources: specs, mappings of their fields, or bare names (files, folders, hub ids, Datasets, lists of rows).
        tokenise: carries the view and what the method needs.
        rejected: where bad rows are counted and written; a log without a file by default.
        look: at most so many rows are parsed here; what they become is not kept.

    Raises:
        DataError: nothing there, not readable, not fit for the view, no row left, or too many bad rows.
    """
    specs = [_spec(source) for source in sources]
    if not specs:
        raise DataError("no data source is given", mend="name at least one under `data.train`")
    rejected = rejected or RejectedLog(None)
    opened = _distinct([spec.open() for spec in specs])
    shares = _shares([len(source) for source in opened], look)
    samples = [source.read(range(min(share, _SAMPLE))) for source, share in zip(opened, shares, strict=True)]
    readers = [
        _reader(spec, source, sample, tokenise) for spec, source, sample in zip(specs, opened, samples, strict=True)
    ]
    dataset = GroupDataset(opened, readers, tokenise)
    looking = _Look(dataset, rejected)
    for number, (share, sample) in enumerate(zip(shares, samples, strict=True)):
        looking.source(number, share, sample)
    rejected.total = len(dataset)
    rejected.check()
    if not looking.kept:
        raise DataError(
            f"none of the {looking.rows} rows looked at can be trained on",
            where=", ".join(source.name for source in opened),
            why="; ".join(f"{count} x {reason}" for reason, count in rejected.reasons.most_common(5)),
        )
    fingerprint = digest(
        [[source.fingerprint for source in opened], [reader.description for reader in readers], tokenise.fingerprint]
    )
    return PreparedData(dataset, fingerprint, looking.report(), rejected)


def _spec(source: Any) -> SourceSpec:
    if isinstance(source, SourceSpec):
        return source
    return SourceSpec(**source) if isinstance(source, Mapping) else SourceSpec(source)


def _distinct(sources: list[Source]) -> list[Source]:
    """Sources of one name (two splits, two lists) get numbers, so that a row's id is one row's."""
    seen: dict[str, int] = {}
    for source in sources:
        seen[source.name] = seen.get(source.name, 0) + 1
        if seen[source.name] > 1:
            source.rename(f"{source.name}#{seen[source.name]}")
    return sources


def _shares(rows: Sequence[int], look: int) -> list[int]:
    """How many rows of each source are looked at: all where they fit, else in proportion, at least one."""
    total = sum(rows)
    if total <= look:
        return list(rows)
    return [max(1, count * (look - len(rows)) // total) for count in rows]


def _reader(spec: SourceSpec, source: Source, sample: Sequence[Row | BadRow], tokenise: Tokeniser) -> Reader:
    rows = [row for row in sample if not isinstance(row, BadRow)]
    if not rows:
        reasons = sorted({row.reason for row in sample if isinstance(row, BadRow)})
        raise DataError(
            f"none of the first {len(sample)} rows can be read", where=source.name, why="; ".join(reasons[:3])
        )
    reader = reader_for(rows, spec.winner, source.name, spec.columns, spec.transcripts)
    check_view(tokenise.view, tokenise.needs, reader.gives, source.name, reader.description)
    _log.info("%s: %s", source.name, reader.description)
    return reader


class _Look:
    """One pass over the first rows: counts and lengths, nothing else is kept."""

    def __init__(self, dataset: GroupDataset, rejected: RejectedLog) -> None:
        self.dataset, self.rejected = dataset, rejected
        self.rows = self.kept = 0
        self._prompts: list[int] = []
        self._completions: list[int] = []

    def source(self, number: int, share: int, sample: Sequence[Row | BadRow]) -> None:
        """Look at the first `share` rows of a source, of which `sample` is read already."""
        self._rows(number, 0, sample)
        for start in range(len(sample), share, _CHUNK):
            stop = min(start + _CHUNK, share)
            self._rows(number, start, self.dataset.sources[number].read(range(start, stop)))

    def _rows(self, number: int, start: int, values: Sequence[Row | BadRow]) -> None:
        holes: list[Hole] = []
        ends: dict[str, int] = {}
        for row, value in enumerate(values, start):
            item = self.dataset.item(number, row, value)
            ends[item.row.source] = item.row.row + 1
            if isinstance(item, Hole):
                holes.append(item)
            else:
                self._count(item)
        self.rows += len(values)
        first = True
        for source, end in ends.items():
            self.rejected.looked(source, end, holes if first else ())
            first = False

    def _count(self, group: TokenGroup) -> None:
        self.kept += 1
        self._prompts.append(len(group.prompt))
        self._completions.extend(len(completion) for completion in group.completions)

    def report(self) -> dict[str, Any]:
        """Numbers for the log, the manifest and the page of the run."""
        return {
            "rows": len(self.dataset),
            "looked": self.rows,
            "kept": self.kept,
            **{key: value for key, value in self.rejected.report().items() if key != "seen"},
            "tokens": {"prompt": _quantiles(self._prompts), "completion": _quantiles(self._completions)},
            "read_as": {
                source.name: reader.description
                for source, reader in zip(self.dataset.sources, self.dataset.readers, strict=True)
            },
        }


def _quantiles(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    values = np.asarray(lengths)
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return {
        "mean": round(float(values.mean()), 1),
        "p5": float(low),
        "p50": float(middle),
        "p95": float(high),
        "max": float(values.max()),
    }
