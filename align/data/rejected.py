"""`rejected.jsonl`: every row that was left out, once, with the reason; and the limit on how many may be bad."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.core.errors import ConfigError, DataError
from align.data.groups import RowId
from align.data.stream import GlobalBatch, Hole

_EXAMPLES = 3


class RejectedLog:
    """Counts rows seen and left out; each row counts once, over epochs and after a resume.

    Args:
        path: the file to append to, or None to count only (every rank but the first).
        max_bad_fraction: bad rows over rows seen, above which `record` raises. Dropped rows (ties, too long) are
            counted and written, and are no part of it.
        resume: keep what the file holds already; otherwise it is begun anew.

    Memory grows with the rows left out, not with the data.
    """

    def __init__(self, path: str | Path | None, max_bad_fraction: float = 0.01, resume: bool = False) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(f"`max_bad_fraction` is {max_bad_fraction}", mend="use a value between 0 and 1")
        self.path = Path(path) if path is not None else None
        self.max_bad_fraction = max_bad_fraction
        self.seen = 0
        self.total: int | None = None
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.bad = 0
        self._counted: set[tuple[str, int]] = set()
        self._written: set[str] = set()
        self._looked: dict[str, int] = {}
        if self.path is not None and self.path.exists():
            if resume:
                self._written = _rows_in(self.path)
            else:
                self.path.unlink()

    @property
    def dropped(self) -> int:
        """Sound rows left out."""
        return len(self._counted) - self.bad

    @property
    def fraction(self) -> float:
        """Bad rows over rows seen."""
        return self.bad / self.seen if self.seen else 0.0

    def looked(self, source: str, rows: int, holes: Iterable[Hole]) -> None:
        """Rows 0..rows-1 of a file or source were looked at before training. Does not raise: see `check`."""
        new = max(0, rows - self._looked.get(source, 0))
        self._looked[source] = max(rows, self._looked.get(source, 0))
        self.seen += new
        self._add(holes)

    def record(self, batch: GlobalBatch) -> None:
        """Count a step's rows and write its holes.

        Raises:
            DataError: the bad fraction is above the limit.
        """
        fresh = sum(row.row >= self._looked.get(row.source, 0) for row in batch.rows)
        self.seen += fresh
        if self.total is not None:
            self.seen = min(self.seen, self.total)
        self._add(batch.holes)
        self.check()

    def check(self) -> None:
        """Raise `DataError` with the commonest reasons where too many rows are bad."""
        if self.fraction <= self.max_bad_fraction:
            return
        lines = [
            f"{count} x {reason} ({', '.join(self.examples[reason])})" for reason, count in self.reasons.most_common(5)
        ]
        raise DataError(
            f"{self.bad} of {self.seen} rows are bad ({self.fraction:.1%}; `max_bad_fraction` is "
            f"{self.max_bad_fraction:.1%})",
            where=str(self.path) if self.path is not None else "",
            why="; ".join(lines),
            mend="mend the rows, or the reading of them (`winner`, `columns`), or raise `data.max_bad_fraction`",
        )

    def report(self) -> dict[str, Any]:
        """Counts by reason, each with the ids of up to three rows."""
        return {
            "seen": self.seen,
            "bad": self.bad,
            "dropped": self.dropped,
            "reasons": {
                reason: {"count": count, "rows": list(self.examples[reason])}
                for reason, count in self.reasons.most_common()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "bad": self.bad,
            "reasons": dict(self.reasons),
            "examples": {reason: list(rows) for reason, rows in self.examples.items()},
            "counted": sorted(self._counted),
            "looked": dict(self._looked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.bad = int(state["seen"]), int(state["bad"])
        self.reasons = Counter(state["reasons"])
        self.examples = {reason: list(rows) for reason, rows in state["examples"].items()}
        self._counted = {(source, int(row)) for source, row in state["counted"]}
        self._looked = dict(state["looked"])

    def _add(self, holes: Iterable[Hole]) -> None:
        lines = []
        for hole in holes:
            key = (hole.row.source, hole.row.row)
            if key not in self._counted:
                self._counted.add(key)
                self.bad += not hole.dropped
                reason = f"`{hole.field}`: {hole.reason}" if hole.field else hole.reason
                self.reasons[reason] += 1
                examples = self.examples.setdefault(reason, [])
                if len(examples) < _EXAMPLES:
                    examples.append(str(hole.row))
            if self.path is not None and str(hole.row) not in self._written:
                self._written.add(str(hole.row))
                lines.append(_line(hole))
        if lines and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))


def _line(hole: Hole) -> str:
    content = {
        **hole.row.place(),
        "field": hole.field,
        "reason": hole.reason,
        "kind": "dropped" if hole.dropped else "bad",
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def _rows_in(path: Path) -> set[str]:
    """Rows already in the file; a line cut short by a kill is taken off."""
    found: set[str] = set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
            found.add(str(RowId(str(entry["file"]), int(entry.get("row", -1)), entry.get("line"))))
        except (ValueError, KeyError, TypeError):
            continue
    return found
