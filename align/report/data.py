"""A data report, a nested dictionary of numbers, as sections of a page; the report may grow without this file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.report.sections import Cell, Histogram, Part, Section, Table, Token, Tokens

_Path = tuple[str, ...]
_SHARE = {"count", "of", "share", "low", "high", "examples"}
_FEW = 12
_OWN_TABLE = 4


def data_sections(report: Mapping[str, Any], title: str = "Data") -> list[Section]:
    """One section for what concerns all, and one for each of the report's `streams`.

    Wherever they stand: `{"share", "count", "of", "low", "high"}` becomes a row of the table of shares; a mapping with
    `mean` and `p50` a row of quantiles; `{"edges", "counts"}` a histogram; a list of like mappings a table; a list of
    `{"text", "scored"}` a text with its scored tokens marked; any other value a row of name and value. What is None,
    empty or `{}` does not concern these data and is left off.
    """
    streams = report.get("streams")
    if not isinstance(streams, Mapping):
        return [Section(title, _parts(report))]
    whole = {key: value for key, value in report.items() if key != "streams"}
    found = [Section(title, _parts(whole))]
    found += [Section(f"{title}: {name}", _parts(stream)) for name, stream in streams.items()]
    return [section for section in found if section.parts]


def _by_subject(facts: Sequence[tuple[_Path, Cell]]) -> Iterator[tuple[str, list[list[Cell]]]]:
    """A subject with several facts is a table of its own; the lonely ones share the last."""
    subjects: dict[str, list[tuple[_Path, Cell]]] = {}
    for path, cell in facts:
        subjects.setdefault(path[0], []).append((path, cell))
    rest: list[list[Cell]] = []
    for subject, found in subjects.items():
        if len(found) >= _OWN_TABLE:
            yield _title((subject,)), [[_words(*path[1:]), cell] for path, cell in found]
        else:
            rest += [[_words(*path), cell] for path, cell in found]
    if rest:
        yield "Numbers", rest


def _parts(report: Mapping[str, Any]) -> list[Part]:
    sorted_out = _Sorter()
    sorted_out.mapping(report, ())
    return list(sorted_out.parts())


@dataclass
class _Sorter:
    """Values by the table they belong to, in the order they come."""

    facts: list[tuple[_Path, Cell]] = field(default_factory=list)
    shares: list[list[Cell]] = field(default_factory=list)
    spreads: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    others: list[Part] = field(default_factory=list)

    def parts(self) -> Iterator[Part]:
        for title, rows in _by_subject(self.facts):
            yield Table(title, ["name", "value"], rows)
        if self.shares:
            yield Table("Shares", ["name", "share, 95 % interval", "count", "of", "for example"], self.shares)
        if self.spreads:
            yield _table("Quantiles", self.spreads)
        yield from self.others

    def mapping(self, report: Mapping[str, Any], path: _Path) -> None:
        for key, value in report.items():
            self.value(value, (*path, str(key)))

    def value(self, value: Any, path: _Path) -> None:
        if value is None or value in ({}, []):
            return
        if isinstance(value, Mapping):
            self._one(value, path)
        elif isinstance(value, (list, tuple)) and not _plain(value):
            self._many(value, path)
        else:
            self.facts.append((path, _cell(value)))

    def _one(self, value: Mapping[str, Any], path: _Path) -> None:
        keys = value.keys()
        if "share" in keys and keys <= _SHARE:
            examples = "; ".join(str(_cell(one)) for one in value.get("examples") or [])
            interval = _interval(value["share"], value.get("low"), value.get("high"))
            self.shares.append([_words(*path), interval, value.get("count"), value.get("of"), examples])
        elif keys == {"mean", "low", "high"}:
            self.facts.append(((*path, "mean"), _interval(value["mean"], value["low"], value["high"])))
        elif {"mean", "p50"} <= keys:
            self.spreads.append((_words(*path), value))
        elif {"edges", "counts"} <= keys:
            note = "; ".join(f"{_words(key)}: {value[key]}" for key in keys - {"edges", "counts"})
            name = _words(*path)
            self.others.append(Histogram(_title(path), name, "count", value["edges"], value["counts"], note))
        elif len(value) > 1 and all(isinstance(one, Mapping) and _flat(one) for one in value.values()):
            self._alike(value, path)
        else:
            self.mapping(value, path)

    def _alike(self, value: Mapping[str, Mapping[str, Any]], path: _Path) -> None:
        """Mappings of plain values: rows of a table, where they are not rows of one that there is already."""
        if all("share" in one or {"mean", "p50"} <= one.keys() for one in value.values()):
            self.mapping(value, path)
        else:
            self.others.append(_table(_title(path), [(str(key), one) for key, one in value.items()]))

    def _many(self, items: Sequence[Any], path: _Path) -> None:
        texts = list(_texts(items, ()))
        if texts:
            self.others.append(Tokens(_title(path), texts))
        elif all(isinstance(one, Mapping) for one in items):
            self.others.append(_table(_title(path), [(str(place + 1), one) for place, one in enumerate(items)], "#"))
        else:
            for place, one in enumerate(items):
                self.value(one, (*path, str(place + 1)))


def _texts(value: Any, labels: _Path) -> Iterator[tuple[str, Sequence[Token]]]:
    """Every list of tokens inside a value, labelled by the short texts beside it, or by its key."""
    if _is_tokens(value):
        yield ", ".join(labels), value
    elif isinstance(value, Mapping):
        beside = tuple(_beside(key, one) for key, one in value.items() if isinstance(one, (str, int, float)))
        for key, one in value.items():
            named = () if key in ("tokens", "completions") else (_words(key),)
            yield from _texts(one, (*labels, *beside, *named))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one, labels)


def _beside(key: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{_words(key)}: {_cell(value)}"


def _table(title: str, rows: Sequence[tuple[str, Mapping[str, Any]]], first: str = "name") -> Table:
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    cells = [[name, *(_cell(row.get(key)) for key in keys)] for name, row in rows]
    return Table(title, [first, *map(_words, keys)], cells)


def _is_tokens(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(one, Mapping) and {"text", "scored"} <= one.keys() for one in value)


def _flat(value: Mapping[str, Any]) -> bool:
    return all(map(_plain, value.values()))


def _plain(value: Any) -> bool:
    """What fits a cell: text, a number, nothing, a few of these."""
    if value is None or isinstance(value, (str, int, float)):
        return True
    few = isinstance(value, (list, tuple)) and len(value) <= _FEW
    return few and all(isinstance(one, (str, int, float)) for one in value)


def _cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(_beside(str(key), one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return (", " if _plain(value) else "\n").join(str(_cell(one)) for one in value)
    return value if _plain(value) else str(value)


def _interval(value: float | None, low: float | None, high: float | None) -> Cell:
    return value if value is None or low is None or high is None else (value, low, high)


def _words(*keys: str) -> str:
    return ", ".join(str(key).replace("_", " ") for key in keys)


def _title(path: _Path) -> str:
    words = _words(*path)
    return words[:1].upper() + words[1:]
