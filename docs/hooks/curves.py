"""What was measured of a method on a world: `bench/results/direction.json` in words and as a small picture."""

from __future__ import annotations

import html
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert

from align.methods.claim import METRICS, START, Claim
from docs.hooks.text import escape

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "direction.json"
_VERSION = "6.4"
"""Of Vega-Lite, as in the report."""
_TEXT = "currentColor"
_LINE = "var(--md-typeset-a-color)"
"""The theme's colour of links: legible on its light and on its dark ground."""


@cache
def measured(path: Path) -> dict[str, Any]:
    """Method -> its entry; empty where nothing is measured yet."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: {**entry, "seeds": found["seeds"]} for name, entry in found["methods"].items()}


def section(name: str, claim: Claim | None, path: Path) -> str:
    """What the method is meant to move, what it moved, and how it went."""
    entry = measured(path).get(name)
    if entry is None:
        meant = f"It is meant to move {_claimed(claim)}. " if claim else ""
        return f"{meant}This is not measured yet."
    claim = Claim(**entry["claim"])
    text = [f"Claim: {_claimed(claim)}.", _outcome(entry, claim)]
    if not entry["holds"] and entry["tried"]:
        text.append(f"Tried: {escape(entry['tried'].rstrip('.'))}.")
    parts = [" ".join(text)]
    if entry.get("curve"):
        parts.append(figure(name, entry["curve"], entry["seeds"][0]))
    return "\n\n".join(parts)


def verdict(name: str, path: Path) -> str:
    """The table's cell."""
    entry = measured(path).get(name)
    if entry is None:
        return "not measured"
    claim, moved = Claim(**entry["claim"]), entry["difference"]
    return f"{claim.metric} {signed(moved['value'])}, {'holds' if entry['holds'] else 'does not hold'}"


def _claimed(claim: Claim) -> str:
    against = "the starting model" if claim.against == START else f"[`{claim.against}`]({claim.against}.md)"
    return f"{METRICS[claim.metric]}: {claim.sign}, on the world `{claim.world}`, against {against}"


def _outcome(entry: dict[str, Any], claim: Claim) -> str:
    moved, count = entry["difference"], len(entry["runs"])
    side = "the claim holds" if entry["holds"] else "the claim does not hold"
    ours, theirs = (sum(run[which][claim.metric] for run in entry["runs"]) / count for which in ("method", "against"))
    return (
        f"Measured on {count} paired seeds: {theirs:.3g} there, {ours:.3g} here, a difference of "
        f"{signed(moved['value'])} (95 % interval {signed(moved['low'])} to {signed(moved['high'])}): {side}."
    )


def signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def figure(name: str, curve: dict[str, Any], seed: int) -> str:
    """The curve of one seed as SVG within the page, with its numbers as text for who does not see it."""
    points = list(zip(curve["step"], curve["values"], strict=True))
    numbers = ", ".join(f"{value:.3g} at step {step}" for step, value in points)
    says = html.escape(f"{curve['metric']} of {name} by optimiser step: {numbers}", quote=True)
    words = html.escape(METRICS[curve["metric"]])
    return (
        f'<figure class="curve"><div tabindex="0" role="img" aria-label="{says}">{_drawn(points, curve["metric"])}'
        f"</div><figcaption>{words[:1].upper()}{words[1:]}, by optimiser step; seed {seed}.</figcaption></figure>"
    )


def _drawn(points: list[tuple[float, float]], metric: str) -> str:
    axis = {"type": "quantitative", "scale": {"zero": False, "nice": True}}
    mark = {"type": "line", "color": _LINE, "strokeWidth": 2, "point": {"color": _LINE, "filled": True, "size": 40}}
    drawn = vl_convert.vegalite_to_svg(
        {
            "width": 300,
            "height": 130,
            "data": {"values": [{"x": x, "y": y} for x, y in points]},
            "mark": mark,
            "encoding": {
                "x": {"field": "x", "title": "optimiser step", **axis},
                "y": {"field": "y", "title": metric, **axis},
            },
            "config": {
                "background": "transparent",
                "font": "system-ui, sans-serif",
                "view": {"stroke": "transparent"},
                "axis": {
                    **{f"{part}Color": _TEXT for part in ("domain", "tick", "label", "title", "grid")},
                    "gridOpacity": 0.2,
                    "tickCount": 4,
                    "titleFontWeight": "normal",
                },
            },
        },
        vl_version=_VERSION,
    )
    # One picture to a screen reader, not a hundred labelled parts; and one line, so that Markdown leaves it alone.
    plain = re.sub(r'\s(?:aria-[a-z]+|role)="[^"]*"', "", drawn.replace("\n", ""))
    return plain.replace("<svg ", '<svg aria-hidden="true" ', 1)
