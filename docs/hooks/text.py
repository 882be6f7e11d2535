"""Text of the source as Markdown."""

from __future__ import annotations

import re


def prose(text: str) -> str:
    """A docstring as Markdown: indented paragraphs are formulas and stay as they are, others are escaped."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.startswith("    "):
            lines = [line.removeprefix("    ") for line in paragraph.splitlines()]
            parts.append("```text\n" + "\n".join(lines) + "\n```")
        else:
            parts.append(escape(paragraph))
    return "\n\n".join(parts)


def escape(text: str) -> str:
    """Text as Markdown that shows it; what stands between backticks stays code."""
    pieces = text.split("`")
    for number in range(0, len(pieces), 2):
        plain = pieces[number].replace("&", "&amp;").replace("<", "&lt;")
        pieces[number] = re.sub(r"([*_\[\]#])", r"\\\1", plain).replace("|", "&#124;")
    return "`".join(pieces)


def code(text: str) -> str:
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def paper_link(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})" if re.fullmatch(r"\d{4}\.\d{4,5}", number) else number


def table(columns: list[str], rows: list[list[str]]) -> str:
    cells = [[" ".join(cell.split()) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *cells])
