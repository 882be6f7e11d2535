"""The rollouts of a run on disk, for people and for replay: a JSONL file a batch, in `output_dir/rollouts`."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.files import atomic_lines
from align.data.rollouts import RolloutGroup

FOLDER = "rollouts"
Extras = Mapping[str, Sequence[tuple[str, list[Any]]]]


class RolloutLog:
    """Writes each batch of rollouts, whole or not at all.

    Args:
        keep: `none`; the `last` batch alone; or `all`.
        writes: whether this process writes.
    """

    def __init__(self, output_dir: str | Path, keep: str, writes: bool) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.keep, self.writes = keep, writes and keep != "none"

    def write(self, groups: Sequence[RolloutGroup], number: int, extras: Extras | None = None) -> None:
        """Batch `number`, all its draws. What a run that was killed left of the same batch is written over.

        Args:
            extras: columns that reward functions logged, as an `Account` has them.
        """
        if not self.writes or not groups:
            return
        file = self.folder / f"{number:06d}.jsonl"
        atomic_lines(file, _lines(groups, extras or {}))
        if self.keep == "last":
            for other in self.folder.glob("*.jsonl"):
                if other != file:
                    other.unlink()


def _lines(groups: Sequence[RolloutGroup], extras: Extras) -> Iterator[bytes]:
    # A row that was drawn twice has logged twice, in that order.
    logged: dict[str, dict[str, deque[list[Any]]]] = {}
    for name, entries in extras.items():
        for place, values in entries:
            logged.setdefault(place, {}).setdefault(name, deque()).append(values)
    for group in groups:
        own = logged.get(str(group.row), {})
        extra = {name: waiting.popleft() for name, waiting in own.items() if waiting}
        row = {
            **group.row.place(),
            "batch": group.iteration,
            "prompt": group.prompt if isinstance(group.prompt, str) else [dict(turn) for turn in group.prompt],
            "wins": None if group.wins is None else [[_number(p) for p in row] for row in group.wins.tolist()],
            "answers": [
                {
                    "text": one.text,
                    "ids": one.ids.tolist(),
                    "finished": one.finished,
                    "origin": one.origin,
                    "model": one.model,
                    "logp": None if one.logp is None else [_number(float(p)) for p in one.logp],
                    "rewards": {name: _number(value) for name, value in one.rewards.items()},
                }
                for one in group.answers
            ],
            **({"logged": extra} if extra else {}),
        }
        yield (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode()


def _number(value: float) -> Any:
    """JSON has no NaN: missing is null."""
    return None if math.isnan(value) else value
