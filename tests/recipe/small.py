"""A model, data and recipe small enough to train in a test."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from align.testing.tiny import random_pairs, save_tiny


def small_run(folder: Path, steps: int) -> Path:
    """Write a model, 48 training pairs, 16 held-out ones and a DPO recipe for `folder/run`; return the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", "llama", seed=0)
    for name, rows in (("train", random_pairs(48, seed=0)), ("held_out", random_pairs(16, seed=1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
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
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
