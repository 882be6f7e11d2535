"""`align demo`: the whole way on a laptop in under a minute, with a model and data made on the spot."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

_TRAIN_ROWS, _HELD_OUT_ROWS, _SEED = 640, 128, 0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="folder to make; the default is the next free runs/demo-N")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps (default 40)")


def run(options: argparse.Namespace) -> int:
    from align.recipe.run import run as train
    from align.recipe.schema import load
    from align.testing.tiny import random_pairs

    folder = options.output or next_free(Path("runs"))
    held_out = random_pairs(_HELD_OUT_ROWS, seed=_SEED + 1)
    recipe = load(prepare(folder, random_pairs(_TRAIN_ROWS, seed=_SEED), held_out, options.steps))
    before = accuracy(folder / "model", held_out)
    started = time.monotonic()
    output = train(recipe)
    seconds = time.monotonic() - started
    after = accuracy(output / "policy", held_out)
    print(
        f"a random model of the Llama family, {_TRAIN_ROWS} made-up pairs, DPO, {options.steps} steps, {seconds:.0f} s"
    )
    print(f"held-out pairs whose chosen answer is the likelier one per token: {before:.0%} before, {after:.0%} after")
    print(f"the run is in {output}; its recipe is {folder / 'recipe.yaml'}")
    return 0


def next_free(parent: Path) -> Path:
    """The first of `demo-1`, `demo-2`, ... that does not exist."""
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"


def prepare(
    folder: Path, train: Iterable[Mapping[str, str]], held_out: Iterable[Mapping[str, str]], steps: int
) -> Path:
    """Write model, data and recipe; return the recipe's path."""
    from align.testing.tiny import save_tiny

    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model", "llama", seed=_SEED)
    for name, rows in (("train", train), ("held_out", held_out)):
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


def accuracy(model_folder: Path, rows: Iterable[Mapping[str, str]]) -> float:
    """Share of pairs whose chosen answer has the higher mean log-probability per token, with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    wins = [
        mean_logp(model, tokenizer, row["prompt"], row["chosen"])
        > mean_logp(model, tokenizer, row["prompt"], row["rejected"])
        for row in rows
    ]
    return sum(wins) / len(wins)


def mean_logp(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Mean log-probability of an answer's tokens after a prompt, the end token included."""
    import torch

    start = tokenizer(prompt)["input_ids"]
    end = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
    chosen = torch.log_softmax(logits.double(), -1).gather(-1, torch.tensor(end)[:, None])
    return float(chosen.mean())
