"""Which rows are wanted: conditions on columns, as a recipe states them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.core.errors import DataError, suggestion
from align.data.rows import Row, RowError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"^\s*(>=|<=|!=|==|>|<)\s*(.*?)\s*$", re.DOTALL)
FORMS = (
    "a condition is a value (`false`), a list of values (`[a, b]`), or an operator and a value "
    "(`>= 8`, `!= tie`; one of " + " ".join(_OPERATORS) + ")"
)


@dataclass(frozen=True)
class Filter:
    """Rows are kept where the value of `column` is one of `values`, or stands in the relation `sign` to `values[0]`.

    `info.site` is the entry `site` of the column `info`.
    """

    column: str
    sign: str
    values: tuple[Any, ...]

    def __call__(self, row: Row) -> None:
        """Raise `RowError` (dropped) for a row that is not wanted, and for a value that cannot be compared."""
        value = value_at(row, self.column)
        if not self._admits(value):
            raise RowError(self.column, f"filtered out: not {self.describe()}", dropped=True)

    def _admits(self, value: Any) -> bool:
        if self.sign == "in":
            return any(_equal(value, one) for one in self.values)
        wanted = self.values[0]
        if self.sign in ("==", "!="):
            return _equal(value, wanted) == (self.sign == "==")
        if value is None:
            return False
        number = _number(value)
        if number is None:
            raise RowError(self.column, f"not a number but {type(value).__name__}")
        return _OPERATORS[self.sign](number, wanted)

    def describe(self) -> str:
        shown = " or ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.values)
        return shown if self.sign == "in" else f"{self.sign} {shown}"


def filters_of(given: Mapping[str, Any], where: str = "") -> tuple[Filter, ...]:
    """The filters of a mapping column -> condition.

    Raises:
        DataError: a condition that is none.
    """
    return tuple(_filter(str(column), condition, where) for column, condition in given.items())


def check_columns(filters: Sequence[Filter], sample: Sequence[Row], where: str) -> None:
    """Refuse a filter on a column that no row of a sample has."""
    names = list(dict.fromkeys(name for row in sample for name in row))
    for one in filters:
        if not any(_has(row, one.column) for row in sample):
            raise DataError(
                f"`filters` names the column `{one.column}`, which is not there",
                where=where,
                why="there are " + ", ".join(f"`{name}`" for name in names),
                mend=suggestion(one.column, names),
            )


def value_at(row: Row, column: str) -> Any:
    """The value of a column, or of an entry below it (`info.site`)."""
    if column in row or "." not in column:
        return row.get(column)
    first, _, rest = column.partition(".")
    below = row.get(first)
    return value_at(dict(below), rest) if isinstance(below, Mapping) else None


def _filter(column: str, condition: Any, where: str) -> Filter:
    if isinstance(condition, (list, tuple)) and condition and not any(isinstance(c, (list, dict)) for c in condition):
        return Filter(column, "in", tuple(condition))
    if isinstance(condition, str) and (match := _CONDITION.match(condition)):
        sign, text = match.groups()
        number = _number(text)
        if not text or (sign not in ("==", "!=") and number is None):
            raise DataError(f"`filters`: the condition of `{column}` is `{condition}`", where=where, mend=FORMS)
        return Filter(column, sign, (text if number is None else number,))
    if condition is None or isinstance(condition, (str, int, float, bool)):
        return Filter(column, "==", (condition,))
    raise DataError(f"`filters`: the condition of `{column}` is {condition!r}", where=where, mend=FORMS)


def _has(row: Row, column: str) -> bool:
    if column in row:
        return True
    first, _, rest = column.partition(".")
    below = row.get(first)
    return bool(rest) and isinstance(below, Mapping) and _has(dict(below), rest)


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).lower() == str(wanted).lower()
    if isinstance(value, str) != isinstance(wanted, str):
        one, other = _number(value), _number(wanted)
        return one is not None and one == other
    return bool(value == wanted)


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
