"""Sources over sources: neighbouring rows of one prompt read as one, and rows chosen by their ids."""

from __future__ import annotations

from collections.abc import Sequence

from align.core.errors import DataError
from align.core.hashing import digest
from align.data.groups import RowId
from align.data.rows import BadRow, Row
from align.data.sources import Source


class RowPairs(Source):
    """Rows 2i and 2i + 1 of a source as one row `{"first": ..., "second": ...}`.

    A row's id is `NAME:prompt` and the number i of the prompt, shown as the line of the first of the two where rows are
    lines. A last row without a partner is a bad one.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        super().__init__(source.name, digest([source.fingerprint, "pairs of rows"]), -(-len(source) // 2))
        self.rows_parsed = source.rows_parsed

    def _read(self, indices: list[int]) -> list[Row | BadRow]:
        wanted = [row for index in indices for row in (2 * index, 2 * index + 1) if row < len(self._source)]
        rows = iter(self._source.read(wanted))
        found: list[Row | BadRow] = []
        for index in indices:
            first = next(rows)
            second = next(rows) if 2 * index + 1 < len(self._source) else BadRow("the last row has no partner")
            bad = next((row for row in (first, second) if isinstance(row, BadRow)), None)
            found.append(bad or {"first": first, "second": second})
        return found

    def row_id(self, index: int) -> RowId:
        first = self._source.row_id(2 * int(index))
        return RowId(f"{self.name}:prompt", int(index), line=first.line, file=first.file or first.source)

    def rename(self, name: str) -> None:
        self._source.rename(name)
        super().rename(name)


class Chosen(Source):
    """The rows of a source whose ids are given, in the source's order and under the ids that they have there.

    Raises:
        DataError: none is chosen, or an id is not among the rows.
    """

    def __init__(self, source: Source, ids: Sequence[str]) -> None:
        wanted = set(ids)
        self._source = source
        self._numbers = [number for number in range(len(source)) if str(source.row_id(number)) in wanted]
        found = {str(source.row_id(number)) for number in self._numbers}
        if not wanted or found != wanted:
            missing = min(wanted - found, default="")
            raise DataError(
                f"the row `{missing}` is not there" if missing else "no row is chosen",
                where=source.name,
                why=f"{len(wanted)} ids, {len(found)} of {len(source)} rows",
                mend="ids are those of the errors: FILE:LINE, or NAME row NUMBER, as the file was named",
            )
        super().__init__(source.name, digest([source.fingerprint, "chosen", self._numbers]), len(self._numbers))
        self.rows_parsed = source.rows_parsed

    def _read(self, indices: list[int]) -> list[Row | BadRow]:
        return self._source.read([self._numbers[index] for index in indices])

    def row_id(self, index: int) -> RowId:
        return self._source.row_id(self._numbers[index])

    def rename(self, name: str) -> None:
        self._source.rename(name)
        super().rename(name)
