"""Neighbouring rows that belong to one prompt, read as one."""

from __future__ import annotations

from align.core.hashing import digest
from align.data.groups import RowId
from align.data.rows import BadRow, Row
from align.data.sources import Source


class RowPairs(Source):
    """Rows 2i and 2i + 1 of a source as one row `{"first": ..., "second": ...}`.

    A row's id is `NAME:prompt` and the number i of the prompt. A last row without a partner is a bad one.
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
        return RowId(f"{self.name}:prompt", int(index))

    def rename(self, name: str) -> None:
        self._source.rename(name)
        super().rename(name)
