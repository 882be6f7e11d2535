"""Rows, model and tokenizer of a benchmark in one folder, made in a process of its own: `python -m bench.prepare ...`.

The process that measures must stay small: what a parent has held counts in its children's peak memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.data import Row, rows, write_jsonl
from bench.models import SHAPES, SPECIAL, build


def main() -> None:
    kind, size, folder, count, max_length = sys.argv[1:6]
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = SHAPES[size].vocabulary - len(SPECIAL)  # type: ignore[index]
    found = rows(kind, vocabulary)  # type: ignore[arg-type]
    model = build(size, kind, found, target / "model")  # type: ignore[arg-type]
    kept, data = _select(found, target / "model", int(count), int(max_length))
    write_jsonl(target / "rows.jsonl", kept)
    (target / "facts.json").write_text(json.dumps({"model": model, "data": data}))


def _select(found: list[Row], model: Path, count: int, max_length: int) -> tuple[list[Row], dict[str, Any]]:
    """The first `count` rows that fit `max_length` whole, and their lengths with the end token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    kept: list[Row] = []
    lengths: list[tuple[int, int, int]] = []
    dropped = 0
    for row in found:
        prompt, chosen, rejected = (len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected"))
        if prompt + max(chosen, rejected) + 1 > max_length:
            dropped += 1
            continue
        kept.append(row)
        lengths.append((prompt, chosen + 1, rejected + 1))
        if len(kept) == count:
            break
    if len(kept) < count:
        raise SystemExit(f"{len(kept)} rows, {count} wanted")
    means = [sum(column) / count for column in zip(*lengths, strict=True)]
    return kept, {
        "pairs": count,
        "dropped_as_too_long": dropped,
        "mean_prompt_tokens": means[0],
        "mean_chosen_tokens": means[1],
        "mean_rejected_tokens": means[2],
    }


if __name__ == "__main__":
    main()
