"""Sections to one HTML file that needs nothing else: no network, no second file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from align.core.errors import AlignError
from align.core.files import atomic_write
from align.report import charts, tokens
from align.report.data import data_sections
from align.report.sections import (
    Cell,
    Code,
    Curve,
    DataReport,
    Histogram,
    Page,
    Part,
    Samples,
    Section,
    Table,
    Text,
    Tokens,
    TokenValues,
    Verdict,
)
from align.report.words import cut, decimals_of, number, visible

MAX_BYTES = 2_000_000
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class _Limits:
    """How much of a section is shown; halved until the page is small enough. What is left off is said on the page."""

    points: int = 400
    values: int = 60
    rows: int = 400
    samples: int = 60
    characters: int = 8_000
    tokens: int = 4_000
    values_of_tokens: int = 400
    code: int = 200_000

    def halved(self) -> _Limits:
        return _Limits(**{name: max(4, value // 2) for name, value in vars(self).items()})


_SMALLEST = _Limits(*[4] * len(fields(_Limits)))


def write_page(
    path: str | Path, title: str, sections: Sequence[Section | DataReport | Part], subtitle: str = ""
) -> Path:
    """Write a page, whole or not at all; return its path. It has at most `MAX_BYTES` bytes.

    Raises:
        AlignError: no page can be made so small (thousands of sections).
        MissingExtra: a chart is asked for and vl-convert-python is not installed.
        CheckpointError: the disk is full or the place cannot be written.
    """
    return atomic_write(path, render(Page(title, sections, subtitle)))


def render(page: Page) -> bytes:
    """The HTML of a page, UTF-8.

    Raises:
        AlignError: see `write_page`.
    """
    limits, html = _Limits(), _render(page, _Limits())
    if len(html) > MAX_BYTES and len(least := _render(page, _SMALLEST)) > MAX_BYTES:
        raise AlignError(
            f"the page `{page.title}` has {len(least):,} bytes; {MAX_BYTES:,} are allowed",
            why=f"it has {len(page.sections)} sections, and what each shows was cut as far as it goes",
            mend="give it fewer sections, or write several pages",
        )
    while len(html) > MAX_BYTES:
        limits = limits.halved()
        html = _render(page, limits)
    return html


def _render(page: Page, limits: _Limits) -> bytes:
    builder = _Builder(limits)
    sections = [builder.section(section) for one in page.sections for section in _as_sections(one)]
    scripts = {"theme": _file("theme.js")}
    if builder.charts:
        scripts |= {"library": charts.library(), "page": _file("page.js")}
    html = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=page.title,
            subtitle=page.subtitle,
            sections=sections,
            style=Markup(_file("page.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            hashes=[_hash(text) for text in scripts.values()],
            config=_script_json(charts.CONFIG),
        )
    )
    return html.encode("utf-8")


def _as_sections(one: Section | DataReport | Part) -> list[Section]:
    if isinstance(one, Section):
        return [one]
    if isinstance(one, DataReport):
        return data_sections(one.report, one.title)
    return [Section(one.title, [one])]


class _Builder:
    """Sections as the template reads them: texts, numbers written out, names for anchors."""

    def __init__(self, limits: _Limits) -> None:
        self.limits = limits
        self.charts = 0
        self._names: set[str] = set()

    def section(self, section: Section) -> dict[str, Any]:
        alone = len(section.parts) == 1 and section.parts[0].title in ("", section.title)
        return {
            "id": self._name(section.title),
            "title": section.title,
            "note": section.note,
            "folded": section.folded,
            "alone": alone,
            "groups": _grouped([self.part(part) for part in section.parts]),
        }

    def part(self, part: Part) -> dict[str, Any]:
        made = _MAKERS[type(part)](self, part)
        return {
            "kind": type(part).__name__.lower(),
            "id": self._name(part.title or "part"),
            "title": part.title,
            "note": "",
        } | made

    def verdict(self, part: Verdict) -> dict[str, Any]:
        return {"text": part.text, "good": part.good}

    def text(self, part: Text) -> dict[str, Any]:
        return {"paragraphs": re.split(r"\n\s*\n", part.text.strip())}

    def code(self, part: Code) -> dict[str, Any]:
        text, left = cut(part.text, self.limits.code)
        return {"text": text, "left": left, "language": part.language}

    def table(self, part: Table) -> dict[str, Any]:
        rows = part.rows[: self.limits.rows]
        wide = [len(row) for row in rows if len(row) != len(part.columns)]
        if wide:
            raise AlignError(
                f"a row of the table `{part.title}` has {wide[0]} cells", why=f"it has {len(part.columns)} columns"
            )
        columns = [[row[place] for row in rows] for place in range(len(part.columns))]
        numeric = [not any(isinstance(cell, str) for cell in column) for column in columns]
        decimals = [decimals_of(_numbers(cells)) if one else None for cells, one in zip(columns, numeric, strict=True)]
        return {
            "columns": [
                {"title": title, "numeric": is_number} for title, is_number in zip(part.columns, numeric, strict=True)
            ],
            "rows": [[self._cell(cell, decimals[place]) for place, cell in enumerate(row)] for row in rows],
            "left": len(part.rows) - len(rows),
            "note": part.note,
        }

    def _cell(self, cell: Cell, decimals: int | None) -> dict[str, Any]:
        if isinstance(cell, str):
            text, left = cut(cell, self.limits.characters)
            return {"text": text, "left": left}
        if cell is None or isinstance(cell, (int, float)):
            return {"value": cell, "shown": number(cell, decimals=decimals)}
        value, low, high = (number(one, decimals=decimals) for one in cell)
        return {"value": cell[0], "shown": value, "interval": f"{low} to {high}"}

    def samples(self, part: Samples) -> dict[str, Any]:
        shown = []
        for sample in part.samples[: self.limits.samples]:
            prompt, left = cut(str(sample["prompt"]), self.limits.characters)
            scores: Mapping[str, float] = sample.get("scores") or {}
            answers = [self._answer(label, str(text), scores.get(label)) for label, text in sample["answers"].items()]
            shown.append({"prompt": prompt, "left": left, "answers": answers})
        return {"samples": shown, "left": len(part.samples) - len(shown), "note": part.note}

    def _answer(self, label: str, text: str, score: float | None) -> dict[str, Any]:
        text, left = cut(text, self.limits.characters)
        return {
            "label": label,
            "text": text,
            "left": left,
            "score": None if score is None else number(score),
            "value": score,
        }

    def tokens(self, part: Tokens) -> dict[str, Any]:
        texts = []
        for label, given in part.texts[: self.limits.samples]:
            kept = given[: self.limits.tokens]
            texts.append({"label": label, "tokens": kept, "left": len(given) - len(kept)})
        return {"texts": texts, "left": len(part.texts) - len(texts), "note": part.note}

    def token_values(self, part: TokenValues) -> dict[str, Any]:
        kept = part.rows[: self.limits.samples]
        top = tokens.top_of(_token_numbers(kept))
        shown = []
        for row in kept:
            prompt, left = cut(str(row["prompt"]), self.limits.characters)
            answers = [tokens.answer(one, top, self.limits.values_of_tokens, part.unit) for one in row["answers"]]
            place = str(row["row"]).rpartition("/")[2]
            shown.append({"row": place, "prompt": prompt, "left": left, "answers": answers})
        return {
            "kind": "tokenvalues",
            "rows": shown,
            "left": len(part.rows) - len(kept),
            "unit": part.unit,
            "legend": tokens.legend(top) if top else None,
            "note": part.note,
        }

    def curve(self, part: Curve) -> dict[str, Any]:
        self.charts += 1
        whole = {visible(name): charts.finite(points) for name, points in part.series.items()}
        drawn = {name: charts.thinned(points, self.limits.points) for name, points in whole.items()}
        lost = sum(len(points) for points in part.series.values()) - sum(map(len, whole.values()))
        thin = sum(map(len, whole.values())) - sum(map(len, drawn.values()))
        notes = [part.note] if part.note else []
        if lost:
            notes.append(f"Not drawn, for it is not a finite number: {_points(lost)}.")
        if thin:
            notes.append(f"Not drawn: {_points(thin)}. Of each stretch the lowest and the highest are.")
        return {
            "spec": _script_json(charts.curve_spec(part, drawn)) if any(drawn.values()) else None,
            "legend": [{"name": name, "style": _swatch(place)} for place, name in enumerate(drawn)],
            "x_label": part.x_label,
            "y_label": part.y_label,
            "notes": notes,
            "numbers": self._numbers(part, drawn),
        }

    def _numbers(self, part: Curve, drawn: Mapping[str, Sequence[charts.Point]]) -> dict[str, Any]:
        """The curve's numbers as a table: a row for each x."""
        at: dict[float, dict[str, charts.Point]] = {}
        for name, points in drawn.items():
            for point in charts.thinned(points, self.limits.values):
                at.setdefault(point[0], {})[name] = point
        rows = [
            [number(x, 6), *(_value(found[name]) if name in found else "" for name in drawn)]
            for x, found in sorted(at.items())
        ]
        every = len({point[0] for points in drawn.values() for point in points})
        return {"columns": [part.x_label, *drawn], "rows": rows, "left": every - len(rows)}

    def histogram(self, part: Histogram) -> dict[str, Any]:
        self.charts += 1
        edges = part.edges
        if len(edges) != len(part.counts) + 1:
            raise AlignError(f"the histogram `{part.title}` has {len(edges)} edges for {len(part.counts)} counts")
        if not all(map(math.isfinite, [*edges, *part.counts])):
            raise AlignError(f"an edge or a count of the histogram `{part.title}` is not a finite number")
        rows = [
            [f"{number(low)} to {number(high)}", number(count)]
            for low, high, count in zip(edges[:-1], edges[1:], part.counts, strict=True)
        ]
        return {
            "spec": _script_json(charts.histogram_spec(part)) if rows else None,
            "legend": [],
            "x_label": part.x_label,
            "y_label": part.y_label,
            "notes": [part.note] if part.note else [],
            "numbers": {"columns": [part.x_label, part.y_label], "rows": rows, "left": 0},
        }

    def _name(self, title: str) -> str:
        base = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40] or "part"
        name, count = f"s-{base}", len(self._names)
        while name in self._names:
            name, count = f"s-{base}-{count}", count + 1
        self._names.add(name)
        return name


_MAKERS: dict[type, Any] = {
    Verdict: _Builder.verdict,
    Text: _Builder.text,
    Code: _Builder.code,
    Table: _Builder.table,
    Samples: _Builder.samples,
    Tokens: _Builder.tokens,
    TokenValues: _Builder.token_values,
    Curve: _Builder.curve,
    Histogram: _Builder.histogram,
}


def _grouped(parts: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Charts that follow each other stand side by side; everything else by itself."""
    groups: list[list[dict[str, Any]]] = []
    for part in parts:
        chart = part["kind"] in ("curve", "histogram")
        if chart and groups and groups[-1][0]["kind"] in ("curve", "histogram"):
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _value(point: charts.Point) -> str:
    text = number(point[1], 6)
    return f"{text} ({number(point[2], 6)} to {number(point[3], 6)})" if len(point) == 4 else text


def _numbers(cells: Iterable[Cell]) -> Iterator[float]:
    for cell in cells:
        if isinstance(cell, (int, float)):
            yield cell
        elif cell is not None and not isinstance(cell, str):
            yield from cell


def _token_numbers(rows: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    for row in rows:
        for one in row["answers"]:
            yield from (token["value"] for token in one["tokens"] if "value" in token)


def _points(count: int) -> str:
    return f"{count:,} {'point' if count == 1 else 'points'}"


def _swatch(place: int) -> dict[str, str]:
    colour, dash = charts.line_style(place)
    return {"colour": colour, "dash": " ".join(map(str, dash))}


def _script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no `<` that could end it, no number that JSON does not know."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


@lru_cache(maxsize=8)
def _file(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
