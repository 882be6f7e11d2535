"""From names of data to a data set that can be trained on: open, decide how to read, look, refuse what is bad."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from align.core.errors import AlignError, DataError, ErrorList, raise_all
from align.core.hashing import digest
from align.data import known
from align.data.grouped import Chosen, RowPairs
from align.data.groups import TokenGroup
from align.data.known import Known, Purpose
from align.data.layout import ANSWER_REWARDS, EXTRAS, PAIR_FEEDBACK, Winner
from align.data.mixture import Mixture, mixture_of
from align.data.readers import Diverging, Reader, Ties, Transcripts, reader_for, recognise
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
    """One entry of `data.train` or `data.eval`; see `open_source` and `reader_for`.

    Attributes:
        weight: share of the mixture, see `align.data.mixture`; all 1: the sources are joined.
        only: a JSON file with the ids of the rows that are read; None for all.
        where: line of the recipe, for errors.
    """

    name: Any
    split: str | None = None
    max_rows: int | None = None
    revision: str | None = None
    config: str | None = None
    data_dir: str | None = None
    winner: Winner | None = None
    columns: Mapping[str, str] | None = None
    transcripts: Transcripts = "text"
    format: str | None = None
    axis: str | None = None
    ties: Ties | None = None
    diverging: Diverging = "keep"
    chat: bool | None = None
    filters: Mapping[str, Any] | str | None = None
    weight: float = 1.0
    only: str | None = None
    where: str = ""

    @property
    def text(self) -> str:
        """The name, where it is one."""
        return str(self.name) if isinstance(self.name, (str, Path)) else ""

    def open(self, purpose: Purpose = "train") -> Source:
        prefer = known.splits(self.text, purpose) if self.text else ()
        return open_source(
            self.name,
            self.split,
            self.max_rows,
            self.revision,
            config=self.config,
            data_dir=self.data_dir,
            purpose=purpose,
            prefer=prefer,
        )

    def reader(self, sample: Sequence[Row], where: str, purpose: Purpose, found: Known | None) -> Reader:
        """The reader of this source's rows; `found` is what `recognise` said."""
        return reader_for(
            sample,
            self.winner,
            where,
            self.columns,
            self.transcripts,
            name=self.text,
            format=self.format,
            axis=self.axis,
            ties=self.ties,
            diverging=self.diverging,
            chat=self.chat,
            filters=self.filters,
            purpose=purpose,
            known=found,
        )


@dataclass(frozen=True)
class PreparedData:
    """Data that was looked at and may be trained on.

    Attributes:
        dataset: map-style; item -> `TokenGroup` or `Hole`.
        fingerprint: of rows, reading and tokenisation.
        report: rows, looked, kept, bad, dropped, reasons (with three rows each), tokens (quantiles), read_as.
        rejected: the log to go on with in training.
        mixture: how sources are mixed by weight; None where they are joined.
    """

    dataset: GroupDataset
    fingerprint: str
    report: Mapping[str, Any]
    rejected: RejectedLog = field(repr=False)
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def rows_parsed(self) -> int:
        return self.dataset.rows_parsed

    def sampler(self, rows_per_step: int, seed: int, shuffle: bool = True, repeat: int = 1) -> GlobalBatchSampler:
        orders = None if self.mixture is None else partial(self.mixture.order, seed, shuffle=shuffle)
        return GlobalBatchSampler(len(self.dataset), rows_per_step, seed, shuffle, orders, repeat)


@dataclass(frozen=True)
class Opened:
    """A source, how its rows are read, how many of them are looked at before training, and its first rows."""

    source: Source
    reader: Reader
    share: int
    first: Sequence[Row | BadRow] = field(repr=False)


def open_sources(
    sources: Sequence[SourceSpec | Mapping[str, Any] | Any],
    view: str | None = None,
    needs: Collection[str] = frozenset(),
    look: int = LOOK,
    purpose: Purpose = "train",
) -> list[Opened]:
    """Open sources and decide from their first rows how each is read; no row becomes tokens.

    Args:
        sources: as for `prepare_data`.
        view: the view that they must give; None for any.
        needs: columns of the method that reads the view.
        look: rows that are looked at of all sources together.
        purpose: what the rows are for; training takes no test split, and no benchmark.

    Raises:
        DataError: nothing there, not readable, not fit for the view; several faults come as one `ErrorList`.
    """
    specs = [_spec(source) for source in sources]
    if not specs:
        raise DataError("no data source is given", mend="name at least one under `data.train`")
    errors: list[AlignError] = []
    opened: list[Source] = []
    for spec in specs:
        with _collected(errors, spec):
            opened.append(spec.open(purpose))
    raise_all(errors)
    _distinct(opened)
    samples = [
        source.read(range(min(share, _SAMPLE))) for source, share in zip(opened, _shares(opened, look), strict=True)
    ]
    kinds: list[Known | None] = []
    for spec, source, sample in zip(specs, opened, samples, strict=True):
        with _collected(errors, spec):
            kinds.append(_recognised(spec, source, sample, purpose))
    raise_all(errors)
    for number, kind in enumerate(kinds):
        if kind is not None and kind.rows_per_prompt == 2:
            opened[number] = RowPairs(opened[number])
            samples[number] = opened[number].read(range(min(len(opened[number]), _SAMPLE)))
    for number, spec in enumerate(specs):
        if spec.only is not None:
            with _collected(errors, spec):
                opened[number] = Chosen(opened[number], _ids(spec.only))
                samples[number] = opened[number].read(range(min(len(opened[number]), _SAMPLE)))
    raise_all(errors)
    found = []
    for number, share in enumerate(_shares(opened, look)):
        source, sample = opened[number], samples[number][:share]
        with _collected(errors, specs[number]):
            reader = _reader(specs[number], source, sample, view, needs, purpose, kinds[number])
            found.append(Opened(source, reader, share, sample))
    raise_all(errors)
    return found


def _ids(file: str) -> list[str]:
    """The row ids of a file.

    Raises:
        DataError: no such file, or not a list of texts.
    """
    path = Path(file).expanduser()
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("the row ids of `only` cannot be read", where=str(path), why=str(error)) from error
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise DataError("`only` holds no list of row ids", where=str(path), mend='write ["FILE:LINE", ...]')
    return ids


@contextmanager
def _collected(errors: list[AlignError], spec: SourceSpec) -> Iterator[None]:
    """Keep a source's error, with the line of the recipe that names the source."""
    try:
        yield
    except ErrorList as several:
        errors += [_placed(error, spec) for error in several.errors]
    except AlignError as error:
        errors.append(_placed(error, spec))


def _placed(error: AlignError, spec: SourceSpec) -> AlignError:
    if not spec.where:
        return error
    where = f"{spec.where}: {error.where}" if error.where else spec.where
    return type(error)(error.what, where=where, why=error.why, mend=error.mend)


def _recognised(spec: SourceSpec, source: Source, sample: Sequence[Row | BadRow], purpose: Purpose) -> Known | None:
    """What the rows are known as.

    Raises:
        DataError: none of them can be read, or they may not be used so.
    """
    rows = [row for row in sample if not isinstance(row, BadRow)]
    if not rows:
        reasons = sorted({row.reason for row in sample if isinstance(row, BadRow)})
        raise DataError(
            f"none of the first {len(sample)} rows can be read", where=source.name, why="; ".join(reasons[:3])
        )
    return recognise(rows, spec.text, spec.format, spec.winner, spec.columns, source.name, purpose)


def prepare_data(
    sources: Sequence[SourceSpec | Mapping[str, Any] | Any],
    tokenise: Tokeniser,
    *,
    rejected: RejectedLog | None = None,
    look: int = LOOK,
    purpose: Purpose = "train",
) -> PreparedData:
    """Open sources, decide how to read each, and look at up to `look` rows in all, in file order.

    Args:
        sources: specs, mappings of their fields, or bare names (files, folders, hub ids, Datasets, lists of rows).
        tokenise: carries the view and what the method needs.
        rejected: where bad rows are counted and written; a log without a file by default.
        look: at most so many rows are parsed here; what they become is not kept.
        purpose: see `open_sources`.

    Raises:
        DataError: nothing there, not readable, not fit for the view, no row left, or too many bad rows.
    """
    specs = [_spec(source) for source in sources]
    found = open_sources(specs, tokenise.view, tokenise.needs, look, purpose)
    rejected = rejected or RejectedLog(None)
    opened, readers = [one.source for one in found], [one.reader for one in found]
    dataset = GroupDataset(opened, readers, tokenise)
    looking = _Look(dataset, rejected)
    for number, one in enumerate(found):
        looking.source(number, one.share, one.first)
    rejected.total = len(dataset)
    rejected.check()
    if not looking.kept:
        raise DataError(
            f"none of the {looking.rows} rows looked at can be trained on",
            where=", ".join(source.name for source in opened),
            why="; ".join(f"{count} x {reason}" for reason, count in rejected.reasons.most_common(5)),
        )
    mixture = _mixture(specs, opened, purpose)
    marks = [[source.fingerprint for source in opened], [reader.description for reader in readers]]
    mixed = [] if mixture is None else [mixture.weights]
    fingerprint = digest([*marks, tokenise.fingerprint, *mixed])
    return PreparedData(dataset, fingerprint, looking.report(), rejected, mixture)


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


def _shares(sources: Sequence[Source], look: int) -> list[int]:
    """How many rows of each source are looked at: all where they fit, else in proportion, at least one."""
    rows = list(map(len, sources))
    total = sum(rows)
    if total <= look:
        return rows
    return [max(1, count * (look - len(rows)) // total) for count in rows]


def _reader(
    spec: SourceSpec,
    source: Source,
    sample: Sequence[Row | BadRow],
    view: str | None,
    needs: Collection[str],
    purpose: Purpose,
    found: Known | None,
) -> Reader:
    rows = [row for row in sample if not isinstance(row, BadRow)]
    reader = spec.reader(rows, source.name, purpose, found)
    if view is not None:
        check_view(view, needs, reader.gives, source.name, reader.description)
        reader = reader.reading(needs)
        for part in sorted(set(EXTRAS) & set(needs) - set(reader.layout.optional)):
            raise DataError(
                f"the method needs `{part}` beside the answers, and there is no such column",
                where=source.name,
                mend=f"add a column `{part}` ({_EXTRA_FORMS[part]}), or name it: columns: {{{part}: COLUMN}}",
            )
        _check_feedback(reader, needs, view, source.name)
        if spec.ties == "keep" and "ties" not in needs:
            raise DataError(
                "`ties: keep`, and the method reads no ties",
                where=source.name,
                mend="write `ties: drop`, or take a method that reads them",
            )
    _log.info("%s: %s", source.name, reader.description)
    if found is not None and (warning := found.warnings.get(known.hub_id(spec.text) or "")):
        _log.warning("%s: %s", source.name, warning)
    return reader


def _check_feedback(reader: Reader, needs: Collection[str], view: str, where: str) -> None:
    """Refuse pairs without the number that the method is about: it would be another method on them."""
    rewarded = set(ANSWER_REWARDS) <= set(reader.layout.optional) or "scores" in reader.layout.columns
    if view == "pairs" and "reward" in needs and not rewarded:
        raise DataError(
            "the method needs a reward of each answer of a pair, and there are no such columns",
            where=where,
            why=reader.description,
            mend="add columns `chosen_reward` and `rejected_reward`, or give `completions` with `scores`",
        )
    present = set(reader.layout.optional) | ({"margin"} if rewarded else set())
    for part in (name for name in PAIR_FEEDBACK if name in needs and name not in present):
        other = next((name for name in PAIR_FEEDBACK if name in present), None)
        column = f"add a column `{part}` ({_FEEDBACK_FORMS[part]}), or name it: columns: {{{part}: COLUMN}}"
        raise DataError(
            f"the method needs the `{part}` of each pair, and there is no such column",
            where=where,
            why=f"without it every pair would count alike, as in dpo; {reader.description}",
            mend=column
            + (f"; there is a `{other}`, which `label: {other}` reads in soft_dpo and smpo" if other else ""),
        )


_FEEDBACK_FORMS = {
    "probability": "how sure it is that the chosen answer is the better one, 0 to 1",
    "margin": "by how much the chosen answer is the better one",
}
_EXTRA_FORMS = {
    "samples": "a list of answers of a frozen policy",
    "baseline": "an answer to imitate",
    "contrasts": "prompts that fit an answer better and worse; align.data.constraints makes them",
}


def _mixture(specs: Sequence[SourceSpec], sources: Sequence[Source], purpose: Purpose) -> Mixture | None:
    weighted = next((spec for spec in specs if spec.weight != 1), None)
    if weighted is None:
        return None
    if weighted.weight <= 0 or purpose == "eval" or len(specs) == 1:
        raise DataError(
            f"`weight` is {weighted.weight:g}",
            where=weighted.where or weighted.text,
            why="it must be above 0"
            if weighted.weight <= 0
            else "evaluation reads every row once"
            if purpose == "eval"
            else "there is nothing to mix a single source with",
            mend="leave `weight` out",
        )
    mixture = mixture_of(list(map(len, sources)), [spec.weight for spec in specs])
    if mixture is not None:
        _log.info("mixed by weight: %s", mixture.describe())
    return mixture


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
