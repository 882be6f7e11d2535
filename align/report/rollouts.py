"""Rollouts that a run kept, as a table of its page: prompts, answers, and what they earned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.report.sections import Cell, Section, Table

FOLDER = "rollouts"
_PROMPTS, _ANSWERS = 6, 4


def rollouts_section(folder: Path) -> list[Section]:
    """The first prompts of the newest batch of rollouts in a run's folder; nothing where none was kept."""
    files = sorted((folder / FOLDER).glob("*.jsonl"))
    if not files:
        return []
    lines = files[-1].read_text(encoding="utf-8", errors="replace").splitlines()[:_PROMPTS]
    groups = [json.loads(line) for line in lines]
    names = list(dict.fromkeys(name for group in groups for one in group["answers"] for name in one["rewards"]))
    compared = any(group["wins"] is not None for group in groups)
    rows: list[list[Cell]] = [
        [
            "" if place else _text(group["prompt"]),
            answer["text"],
            answer["origin"] + ("" if answer["finished"] else ", cut"),
            *(_number(answer["rewards"].get(name)) for name in names),
            *([_wins(group["wins"], place)] if compared else []),
        ]
        for group in groups
        for place, answer in enumerate(group["answers"][:_ANSWERS])
    ]
    columns = ["prompt", "answer", "from", *names, *(["beats the others"] if compared else [])]
    note = f"The first prompts of batch {int(files[-1].stem)}, with up to {_ANSWERS} answers each."
    return [Section("Rollouts", [Table("Answers before the last steps", columns, rows)], note)]


def _wins(wins: list[list[float | None]] | None, place: int) -> Cell:
    """The mean probability of beating the prompt's other answers."""
    others = [p for other, p in enumerate(wins[place]) if other != place and p is not None] if wins else []
    return sum(others) / len(others) if others else "missing"


def _number(value: Any) -> Cell:
    return "missing" if value is None else float(value)


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
