"""The pages as text, and the fenced blocks in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w+)(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block; `where` is `page:line` of its fence, `title` what follows the language."""

    language: str
    text: str
    title: str
    where: str


def pages() -> list[Path]:
    return [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]


def blocks(language: str, page: str | Path | None = None) -> list[Block]:
    """All blocks of a language, of one page (relative to docs/) or of all and README.md."""
    chosen = pages() if page is None else [DOCS / page]
    return [block for path in chosen for block in _blocks(path) if block.language == language]


def _blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(
            match["language"], match["text"], match["rest"].strip(), f"{path.relative_to(ROOT).as_posix()}:{line}"
        )
