"""Curves and histograms as Vega-Lite specifications, and the JavaScript that draws them, which the page carries."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from align.core.errors import AlignError, MissingExtra
from align.report.sections import Curve, Histogram, Point

COLOURS = 8
"""`--series-1` to `--series-8` of the style sheet."""
_DASHES: tuple[tuple[int, ...], ...] = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3))
_DIGITS = ".6~g"
_DOTTED = 24
"""Points of a series up to which each has a dot; a series of one is a dot alone."""
_VERSION = "6.4"
"""Of Vega-Lite: the newest that vl-convert 1.9 carries."""
_AXIS = {
    "domainColor": "var(--axis)",
    "gridColor": "var(--grid)",
    "tickColor": "var(--axis)",
    "labelColor": "var(--muted)",
    "titleColor": "var(--muted)",
    "titleFontWeight": "normal",
    "labelFontSize": 11,
    "titleFontSize": 11,
}
_FONT = "system-ui, sans-serif"
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": _FONT,
    "view": {"stroke": "transparent"},
    "axis": _AXIS,
    "axisX": {"grid": False, "labelFlush": True},
    "axisY": {"domain": False, "ticks": False, "tickCount": 5},
    # A reader of the screen gets the table of values, not a thousand points.
    "aria": False,
    "customFormatTypes": True,
}
"""Vega-Lite configuration of all charts. Colours are the page's own variables: a change of theme repaints them."""


def line_style(number: int) -> tuple[str, tuple[int, ...]]:
    """Colour and dash pattern of the nth series. Neighbours differ in both, so that colour is not the only sign."""
    return f"var(--series-{number % COLOURS + 1})", _DASHES[(number + number // COLOURS) % len(_DASHES)]


def curve_spec(curve: Curve, series: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """The specification of a curve with these points, which are finite."""
    styles = [line_style(number) for number in range(len(series))]
    names = list(series)
    rows = [_row(name, point, len(points) <= _DOTTED) for name, points in series.items() for point in points]
    banded = any("low" in row for row in rows)
    colour = {
        "field": "series",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": names, "range": [style[0] for style in styles]},
    }
    dash = {
        "field": "series",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": names, "range": [list(style[1]) for style in styles]},
    }
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"strokeDash": dash}},
        _nearest(curve, banded),
    ]
    if banded:
        layers.insert(0, _band())
    return {
        "width": "container",
        "height": 210,
        "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": None,
                "scale": {"zero": False, "nice": False},
            },
            "y": {"field": "y", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": colour,
        },
        "layer": layers,
    }


def histogram_spec(histogram: Histogram) -> dict[str, Any]:
    """The specification of a histogram."""
    edges = histogram.edges
    rows = [
        {"low": low, "high": high, "count": count}
        for low, high, count in zip(edges[:-1], edges[1:], histogram.counts, strict=True)
    ]
    number = {"type": "quantitative", "format": _DIGITS}
    return {
        "width": "container",
        "height": 170,
        "data": {"values": rows},
        "mark": {"type": "bar", "color": "var(--series-1)", "binSpacing": 1},
        "encoding": {
            "x": {
                "field": "low",
                "bin": {"binned": True},
                "type": "quantitative",
                "title": None,
            },
            "x2": {"field": "high"},
            "y": {"field": "count", "type": "quantitative", "title": None},
            "tooltip": [
                {"field": "low", "title": f"{histogram.x_label}, from", **number},
                {"field": "high", "title": "to", **number},
                {"field": "count", "title": histogram.y_label, **number},
            ],
        },
    }


def _row(name: str, point: Point, dotted: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"series": name, "x": point[0], "y": point[1]}
    if dotted:
        row["dot"] = True
    if len(point) == 4:
        row |= {"low": point[2], "high": point[3]}
    return row


def _band() -> dict[str, Any]:
    return {
        "mark": {"type": "area", "opacity": 0.16},
        "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
        "encoding": {"y": {"field": "low", "type": "quantitative", "title": None}, "y2": {"field": "high"}},
    }


def _nearest(curve: Curve, banded: bool) -> dict[str, Any]:
    """The point nearest to the pointer, shown with its values."""
    number = {"type": "quantitative", "format": _DIGITS}
    values = [
        # Text, not a quantity; but text Vega-Lite 6.4 reads off the wrong object for the nearest point ("undefined").
        {"field": "series", "type": "quantitative", "title": "series", "formatType": "toString"},
        {"field": "x", "title": curve.x_label, **number},
        {"field": "y", "title": curve.y_label, **number},
    ]
    if banded:
        values += [{"field": "low", "title": "low", **number}, {"field": "high", "title": "high", **number}]
    under_pointer: dict[str, Any] = {"param": "hover", "empty": False}
    hover = {"name": "hover", "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}}
    return {
        "params": [hover],
        "mark": {"type": "point", "filled": True},
        "encoding": {
            "opacity": {"condition": [under_pointer | {"value": 1}, {"test": "datum.dot", "value": 1}], "value": 0},
            "size": {"condition": under_pointer | {"value": 60}, "value": 14},
            "tooltip": values,
        },
    }


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn: all their numbers finite. An interval that is not finite is left off its point."""
    kept: list[Point] = []
    for point in points:
        if point[0] is None or point[1] is None or not all(map(math.isfinite, point[:2])):
            continue
        whole = len(point) == 4 and all(value is not None and math.isfinite(value) for value in point[2:])
        kept.append(tuple(point) if whole else tuple(point[:2]))
    return kept


def thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    """At most `most` (>= 4) of the points: the first, the last, and of each equal stretch the lowest and highest."""
    if len(points) <= most:
        return points
    inner = range(1, len(points) - 1)
    stretches = (most - 2) // 2
    kept = {0, len(points) - 1}
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        kept |= {min(stretch, key=lambda place: points[place][1]), max(stretch, key=lambda place: points[place][1])}
    return [points[place] for place in sorted(kept)]


@lru_cache(maxsize=1)
def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script, about 0.9 MB, made without a network.

    Raises:
        MissingExtra: vl-convert-python is not installed.
        AlignError: the script cannot stand inside a page.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtra(
            "`vl-convert-python` is not installed",
            why="it carries the JavaScript that draws a report's curves",
            mend='run `pip install "vl-convert-python>=1.9,<2"`',
        ) from error
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VERSION)
    found = re.search(r"</script|<script|<!--", script, re.IGNORECASE)
    if found:
        raise AlignError(
            f"the script of `vl-convert-python` holds `{found.group()}`",
            why="a browser would end the script there",
            mend="install vl-convert-python 1.9.0.post1",
        )
    return script
