"""How the rows of a source are read: as a known data set, by what the user states, or by the names of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.core.errors import DataError, suggestion
from align.data.filters import FORMS, check_columns, filters_of
from align.data.known import Choices, Known, Purpose, find
from align.data.known.table import refusal
from align.data.layout import Layout, Winner, find_layout
from align.data.reader import Diverging, Reader, Ties, Transcripts
from align.data.rows import Row, RowError

__all__ = ["Diverging", "Reader", "Ties", "Transcripts", "reader_for", "recognise"]


def recognise(
    sample: Sequence[Row],
    name: str = "",
    format: str | None = None,
    winner: Winner | None = None,
    columns: Mapping[str, str] | None = None,
    where: str = "",
    purpose: Purpose = "train",
) -> Known | None:
    """Which known data set rows are; None where the user states `winner` or `columns`, and for all others.

    Args:
        sample: rows to look at.
        name: the source as the user named it; a hub id of the table is known by it.
        format: a name of the table, a hub id, or `columns` for none.
        purpose: a benchmark is refused as training data.

    Raises:
        DataError: an unknown format, rows with other columns, a use that is refused.
    """
    by_hand = winner is not None or bool(columns)
    if by_hand and format not in (None, "columns"):
        raise DataError(
            f"`format: {format}` and `{'winner' if winner is not None else 'columns'}` are both stated",
            where=where,
            why="each says how the rows are read",
            mend="remove one of them",
        )
    refused = refusal(name, sample, purpose)
    if refused is not None:
        raise DataError(
            f"`{refused.name}` is refused " + ("as training data" if purpose == "train" else "for evaluation"),
            where=where,
            why=refused.refused[purpose],
            mend="take another data set" + (", or name it under `data.eval`" if "eval" not in refused.refused else ""),
        )
    return None if by_hand else find(name, sample, format, where)


def reader_for(
    sample: Sequence[Row],
    winner: Winner | None = None,
    where: str = "",
    columns: Mapping[str, str] | None = None,
    transcripts: Transcripts = "text",
    *,
    name: str = "",
    format: str | None = None,
    axis: str | None = None,
    ties: Ties | None = None,
    diverging: Diverging = "keep",
    chat: bool | None = None,
    filters: Mapping[str, Any] | str | None = None,
    purpose: Purpose = "train",
    known: Known | None = None,
) -> Reader:
    """The reader for rows like `sample`.

    Args:
        winner, columns: see `find_layout`.
        where: the place that errors name.
        transcripts: HH transcripts stay plain text, or become messages.
        name, format, purpose: see `recognise`.
        axis: what answers are compared by, for data sets with several.
        ties: `drop` tied pairs, or `keep` them for methods that read them; None: as the method reads them.
        diverging: `keep` answers that part before their last turn (later turns stay, the assistant's are scored), or
            `drop` them.
        chat: plain prompts are what a user says; None: as the table says, else only where there is a `system` column.
        filters: column -> condition (see `align.data.filters`), or `recommended`: what a known data set's card advises.
        known: what `recognise` found, where that was asked before.

    Raises:
        DataError: the columns tell no format, not which answer wins, or an option does not fit these rows.
    """
    known = known or recognise(sample, name, format, winner, columns, where, purpose)
    choices = Choices(_axis(known, axis, sample, where), transcripts, purpose, _chat(known, chat))
    wanted = filters_of(_conditions(known, filters, where), where)
    check_columns(wanted, sample, where)
    rows = sample if known is None else _shaped(known, sample, choices, where)
    layout = find_layout(rows, winner, columns, where)
    layout, chat = _with_chat(layout, choices.chat, chat, transcripts, where)
    return Reader(layout, transcripts, known, choices, wanted, ties, diverging, chat)


def _chat(known: Known | None, stated: bool | None) -> bool:
    return stated if stated is not None else known is not None and known.chat


def _with_chat(
    layout: Layout, chat: bool, stated: bool | None, transcripts: Transcripts, where: str
) -> tuple[Layout, bool]:
    """A system text needs a chat to stand in; `chat: false` leaves it unused, which the description says."""
    if layout.transcript and transcripts == "text" and (layout.system or stated):
        raise DataError(
            "a plain transcript has no place for " + (f"column `{layout.system}`" if layout.system else "`chat: true`"),
            where=where,
            mend="write `transcripts: messages`",
        )
    if layout.system and stated is False:
        return replace(layout, system=None, unused=(*layout.unused, layout.system)), False
    return layout, chat or layout.system is not None


def _axis(known: Known | None, axis: str | None, sample: Sequence[Row], where: str) -> str:
    if known is None or not known.axes:
        if axis is not None:
            subject = "these rows" if known is None else f"`{known.name}`"
            raise DataError(f"`axis` is `{axis}`, and {subject} can be compared in one way only", where=where)
        return ""
    choices = ", ".join(known.axes)
    if axis is None and not known.axis:
        raise DataError(
            f"`{known.name}` can be compared in several ways, and `axis` does not say which",
            where=where,
            why=known.direction,
            mend=f"write `axis: ONE`, one of {choices}",
        )
    if axis is not None and axis not in known.axes:
        raise DataError(f"`{known.name}` has no axis `{axis}`", where=where, mend=suggestion(axis, known.axes))
    chosen = axis or known.axis
    column = known.axis_columns.get(chosen)
    if column is not None and not any(column in row for row in sample):
        raise DataError(f"`axis: {chosen}` needs the column `{column}`, which is not there", where=where)
    return chosen


def _conditions(known: Known | None, filters: Mapping[str, Any] | str | None, where: str) -> Mapping[str, Any]:
    if filters is None:
        return {}
    if isinstance(filters, Mapping):
        return filters
    if filters == "recommended" and known is not None and known.filters:
        return known.filters
    if filters == "recommended":
        subject = f"for `{known.name}` none are recommended" if known else "these rows are of no known data set"
        raise DataError(
            "`filters: recommended` finds no filters", where=where, why=subject, mend="state them: " + FORMS
        )
    raise DataError(f"`filters` is {filters!r}", where=where, mend="write column: condition; " + FORMS)


def _shaped(known: Known, sample: Sequence[Row], choices: Choices, where: str) -> list[Row]:
    """The rows of a sample that have the form of the data set.

    Raises:
        DataError: none has.
    """
    reader = Reader(Layout("pairs", {}), known=known, choices=choices)
    rows, reasons = [], []
    for row in sample:
        try:
            rows.append(reader.shaped(row))
        except RowError as error:
            reasons.append(str(error))
    if not rows:
        raise DataError(
            f"none of the first {len(sample)} rows has the form of `{known.name}`",
            where=where,
            why="; ".join(dict.fromkeys(reasons)),
            mend="write `format: columns` and say what the columns mean, or look at the rows",
        )
    return rows
