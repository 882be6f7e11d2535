"""A model, data and recipe small enough to train in a test."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.testing.tiny import random_pairs, save_tiny

Rows = Sequence[Mapping[str, Any]]


def small_run(
    folder: Path, steps: int, train_rows: Rows | None = None, held_out: Rows | None = None, **sections: dict[str, Any]
) -> Path:
    """Write a model, data and a recipe for `folder/run`; return the recipe.

    Args:
        train_rows, held_out: by default 48 and 16 random pairs.
        sections: what the recipe says otherwise than DPO's, by section: `train={"global_batch_size": 4}`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", "llama", seed=0)
    files = {"train": train_rows or random_pairs(48, seed=0), "held_out": held_out or random_pairs(16, seed=1)}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "model")},
        "method": {"name": "dpo", "beta": 0.1},
        "data": {
            "train": [str(folder / "train.jsonl")],
            "eval": [str(folder / "held_out.jsonl")],
            "max_length": 256,
        },
        "train": {
            "output_dir": str(folder / "run"),
            "learning_rate": 3e-3,
            "global_batch_size": 16,
            "max_steps": steps,
            "logging_steps": 10,
        },
        "eval": {"every": 0.5},
    }
    for name, said in sections.items():
        recipe[name] = said if name == "method" else {**recipe.get(name, {}), **said}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
