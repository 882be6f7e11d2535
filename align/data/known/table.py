"""All known data sets, and which of them a source is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from align.core.errors import DataError, suggestion
from align.data.known.base import Known
from align.data.known.labelled import LABELLED
from align.data.known.listed import LISTED
from align.data.known.named import NAMED
from align.data.known.unpaired import UNPAIRED
from align.data.rows import Row

KNOWN: tuple[Known, ...] = (*NAMED, *LISTED, *LABELLED, *UNPAIRED)
BY_COLUMNS = "columns"
"""The `format` that switches the table off: rows are read by the names of their columns alone."""

_IDS = {hub.lower(): hub for known in KNOWN for hub in known.hub}
_CACHE_FOLDER = re.compile(r"datasets--([\w.-]+?)--([\w.-]+)")


def hub_id(name: str) -> str | None:
    """The known id that a source's name is, or that a local copy's path ends with."""
    path = Path(name)
    tries = [name, "/".join(path.parts[-2:])]
    if match := _CACHE_FOLDER.search(name):
        tries.append("/".join(match.groups()))
    return next((_IDS[one.lower()] for one in tries if one.lower() in _IDS), None)


def by_name(name: str, where: str = "") -> tuple[Known, ...]:
    """The schemas of a `format`: a name of the table, or a hub id.

    Raises:
        DataError: there is none of this name.
    """
    found = tuple(known for known in KNOWN if known.name == name)
    found = found or tuple(known for known in KNOWN if name.lower() in map(str.lower, known.hub))
    if not found:
        raise DataError(
            f"there is no data format `{name}`",
            where=where,
            mend=suggestion(name, [BY_COLUMNS, *(known.name for known in KNOWN)])
            or f"leave `format` out, or write `{BY_COLUMNS}`; docs/data_sets.md lists the formats",
        )
    return found


def find(name: str, sample: Sequence[Row], stated: str | None = None, where: str = "") -> Known | None:
    """Which known data set rows are.

    Args:
        name: the source as the user named it.
        sample: some of its rows.
        stated: the `format` that the user wrote; None: by hub id, then by unmistakable columns.

    Raises:
        DataError: a stated format, or the one of this hub id, has columns that these rows lack.
    """
    if stated == BY_COLUMNS:
        return None
    identity = hub_id(name) if stated is None else None
    candidates = by_name(stated, where) if stated is not None else by_name(identity) if identity is not None else ()
    for known in candidates:
        if _fits(known, sample):
            return known
    if candidates:
        raise _other_columns(candidates, sample, stated or str(identity), where)
    fitting = [known for known in KNOWN if known.unmistakable and _fits(known, sample)]
    return max(fitting, key=lambda known: len(known.columns), default=None)


def refusal(name: str, sample: Sequence[Row], purpose: str) -> Known | None:
    """The known data set that rows are, where such a use is refused, however they are to be read."""
    identity = hub_id(name)
    for known in KNOWN:
        if purpose in known.refused and (known.unmistakable or identity in known.hub) and _fits(known, sample):
            return known
    return None


def splits(name: str, purpose: str) -> tuple[str, ...]:
    """The splits that are tried first for a hub id."""
    identity = hub_id(name)
    found = by_name(identity) if identity is not None else ()
    return tuple(split for known in found for split in (known.train if purpose == "train" else known.eval))


def _fits(known: Known, sample: Sequence[Row]) -> bool:
    """Rows of JSON may lack a key here and there: most of them decide."""
    return bool(sample) and sum(map(known.matches, sample)) * 2 > len(sample)


def _other_columns(candidates: Sequence[Known], sample: Sequence[Row], name: str, where: str) -> DataError:
    there = list(dict.fromkeys(column for row in sample for column in row))
    wanted = [f"`{known.name}` needs " + ", ".join(f"`{c}`" for c in sorted(known.columns)) for known in candidates]
    return DataError(
        f"the rows are not those of `{name}`",
        where=where,
        why="; ".join(wanted) + "; there are " + ", ".join(f"`{column}`" for column in there),
        mend=f"correct `format`, or write `format: {BY_COLUMNS}` and say what the columns mean",
    )


def markdown() -> str:
    """The table as Markdown: what docs/data_sets.md shows."""
    lines = ["| `format` | data sets | which answer wins | what to know | checked by |", "|---|---|---|---|---|"]
    for known in KNOWN:
        ids = "<br>".join(f"`{hub}`" for hub in known.hub)
        splits = ", ".join(f"`{split}`" for split in (*known.train, *known.eval))
        more = [
            "recognised by its columns: " + ", ".join(f"`{column}`" for column in sorted(known.columns))
            if known.unmistakable
            else "recognised by id only",
            f"splits {splits}" if splits else "",
            "axes " + ", ".join(f"`{axis}`" for axis in known.axes) + (f", else `{known.axis}`" if known.axis else "")
            if known.axes
            else "",
            "`filters: recommended`: " + ", ".join(f"`{column}: {value}`" for column, value in known.filters.items())
            if known.filters
            else "",
        ]
        told = "; ".join(part for part in (known.trap, *more) if part)
        lines.append(f"| `{known.name}` | {ids} | {known.direction} | {told} | {known.checked} |")
    return "\n".join(lines) + "\n"
