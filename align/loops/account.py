"""What a stage came to: counts that are in the artefact too, and sentences for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from align.core.errors import DataError


@dataclass(frozen=True)
class Account:
    """One run of a stage.

    Attributes:
        folder: of the artefact. prompts: of it. chunks: in all. before: of these, done by an earlier run.
        counts: kind -> name -> number, over the whole artefact; the same however often the stage was stopped.
        seconds: that this run took. tokens: drawn by this run.
    """

    folder: str
    prompts: int
    chunks: int
    before: int
    counts: Mapping[str, Mapping[str, int]]
    seconds: float
    tokens: int = 0

    def of(self, kind: str) -> Mapping[str, int]:
        return self.counts.get(kind, {})

    def said(self, kind: str) -> str:
        """`12 tie, 3 identical`, the commonest first; nothing where nothing was counted."""
        numbers = sorted(self.of(kind).items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {name}" for name, count in numbers if count)


def refuse_nothing(account: Account, kind: str, what: str, mend: str) -> None:
    """Raise `DataError` where a stage gave no `kind` at all."""
    if sum(account.of(kind).values()):
        return
    raise DataError(what, where=account.folder, why=account.said("lost") or "nothing is left", mend=mend)
