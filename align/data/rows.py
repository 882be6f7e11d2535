"""Rows that cannot be used: a value where reading fails, an exception where understanding fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read at all: a broken JSON line, bad UTF-8, not an object."""

    reason: str
    field: str = ""


class RowError(Exception):
    """A row that was read and cannot be used.

    Args:
        field: the column (or part) at fault.
        reason: one clause, the same words for the same fault, so that reasons can be counted.
        dropped: the row is sound but not wanted here (a tie, too long for `max_length`): counted and logged, but no
            part of `max_bad_fraction`.
    """

    def __init__(self, field: str, reason: str, dropped: bool = False) -> None:
        self.field, self.reason, self.dropped = field, reason, dropped
        super().__init__(field, reason, dropped)

    def __str__(self) -> str:
        return f"`{self.field}`: {self.reason}" if self.field else self.reason


Row = dict[str, Any]
