"""Limits on a data report, and which of them are crossed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Shares from 0 to 1 above which a report is not passed; None: not looked at.

    Attributes:
        bad: bad rows among the rows read, and rows whose tokens are bad among those sampled.
        duplicates: rows that repeat an earlier row, prompt and answers, among the rows kept.
        overlap: distinct prompts of eval that are prompts of train.
        truncated: rows longer than `max_length` among those sampled, whatever becomes of them.
        refusals: winners (or desirable answers, or demonstrations) that refuse.
        longer: pairs whose winner is the longer one.
        benchmarks: rows of train that name a benchmark, and questions of a given benchmark that are in train.
    """

    bad: float | None = 0.01
    duplicates: float | None = 0.2
    overlap: float | None = 0.0
    truncated: float | None = 0.05
    refusals: float | None = None
    longer: float | None = None
    benchmarks: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"the limit `{name}` is {value:g}", mend="use a share between 0 and 1")


def judge(report: Mapping[str, Any], limits: Limits) -> list[dict[str, Any]]:
    """One entry for each limit and stream it applies to: `name`, `stream`, `limit`, `value`, `crossed`, `says`.

    `value` is None where the data do not tell it (lengths without a tokenizer), and is then not crossed.
    """
    found = []
    for stream, one in report["streams"].items():
        for name, value, says in _of_stream(one):
            found.append(_entry(name, stream, getattr(limits, name), value, says))
    if report["overlap"] is not None:
        value = report["overlap"]["share"]
        found.append(_entry("overlap", "eval", limits.overlap, value, "of eval's prompts are prompts of train"))
    for one in report["benchmarks"]:
        says = f"of the questions of {one['name']} are prompts of train"
        found.append(_entry("benchmarks", "train", limits.benchmarks, one["share"], says))
    for one in report["streams"]["train"]["benchmarks"]["named"]:
        says = f"of the rows say that they are of {one['name']} ({one['how']})"
        found.append(_entry("benchmarks", "train", limits.benchmarks, one["share"], says))
    return [entry for entry in found if entry["limit"] is not None]


def crossed(judged: list[dict[str, Any]]) -> list[str]:
    """A line for each limit that was crossed."""
    return [
        f"{entry['stream']}: {entry['value']:.2%} {entry['says']}; the limit `{entry['name']}` is {entry['limit']:.2%}"
        for entry in judged
        if entry["crossed"]
    ]


def bad_share(stream: Mapping[str, Any]) -> float:
    """Of the rows read: those that cannot be read, and of the others those that cannot be tokenised."""
    rows = stream["rows"]
    readable = rows["readable"] / rows["read"] if rows["read"] else 0.0
    return float(rows["bad_share"] + readable * stream["lengths"]["bad_share"])


def _of_stream(one: Mapping[str, Any]) -> list[tuple[str, float | None, str]]:
    truncation, bias = one["lengths"]["truncation"], one["lengths"]["length_bias"] or one["length_bias"]
    wins = [one["refusals"]["roles"][role] for role in ("winner", "desirable") if role in one["refusals"]["roles"]]
    return [
        ("bad", bad_share(one), "of the rows are bad"),
        ("duplicates", one["duplicates"]["rows"]["share"], "of the rows repeat an earlier one"),
        ("truncated", truncation and truncation["too_long"]["share"], "of the rows are longer than `max_length`"),
        ("refusals", wins[0]["share"] if wins else None, "of the winning answers refuse"),
        ("longer", bias and bias["winner_longer"]["share"], "of the winners are the longer answer"),
    ]


def _entry(name: str, stream: str, limit: float | None, value: float | None, says: str) -> dict[str, Any]:
    over = limit is not None and value is not None and value > limit
    return {"name": name, "stream": stream, "limit": limit, "value": value, "crossed": over, "says": says}
