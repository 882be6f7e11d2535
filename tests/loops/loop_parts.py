"""What the tests of whole loops share: a small world's model, a recipe, and readers of what a loop writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from align.data.artefacts import Artefact
from align.data.rollout_rows import from_row
from align.data.rollouts import RolloutGroup
from align.evaluate.sides import Side, load_side
from align.recipe import loop, loop_run
from align.recipe.loop import LoopRecipe
from align.scoring.layout import Tree
from align.worlds.start import Start, starting_model
from align.worlds.style import Style

GOLD, PREFERENCE = "align.worlds.style:gold_reward", "align.worlds.style:gold_preference"


def start(folder: Path) -> tuple[Path, Path]:
    """(a model that speaks the world a little, one near it with other weights)."""
    made = starting_model(Style(), Start(demonstrations=512, epochs=3, layers=1, width=64), cache=folder / "worlds")
    side = load_side(str(made), "float32", "cpu")
    other = folder / "other"
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for parameter in side.model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=noise)
    side.model.save_pretrained(other)  # type: ignore[operator]
    side.tokenizer.save_pretrained(other)
    return made, other


def write(folder: Path, model: Path, output: str, section: dict[str, Any], **sections: Any) -> Path:
    """A recipe of a loop in `folder`, with 24 demonstrations as its prompts."""
    rows = Style().demonstrations(24)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {
        "model": {"name": str(model)},
        "data": {"prompts": ["prompts.jsonl"], "max_length": 128},
        "sample": {"max_new_tokens": 20, "chunk": 4} | sections.pop("sample", {}),
        "train": {"global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "save_steps": 1, "logging_steps": 1}
        | sections.pop("train", {}),
        "output_dir": output,
        "loop": {"rounds": 2, "prompts": 8, **section},
        **sections,
    }
    file = folder / f"{Path(output).name}.yaml"
    file.write_text(yaml.safe_dump(plain, sort_keys=False))
    return file


def run(file: Path, overrides: Sequence[str] = (), say: Any = lambda line: None) -> tuple[LoopRecipe, Path | None]:
    """The loop of a recipe, in this process."""
    recipe = loop.read(file, overrides)
    return recipe, loop_run.run(recipe, say=say)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of an artefact."""
    return list(Artefact.open(folder, "").rows())


def groups(folder: Path) -> list[RolloutGroup]:
    return [from_row(row) for row in rows(folder)]


def losses(round_: Path) -> list[float]:
    """The loss of each step of a round's training."""
    lines = [json.loads(line) for line in (round_ / "train" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def training(round_: Path) -> dict[str, Any]:
    """The resolved recipe of a round's training."""
    found: dict[str, Any] = yaml.safe_load((round_ / "train" / "recipe.yaml").read_text())
    return found


def record(round_: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((round_ / "round.json").read_text())
    return found


def summed(side: Side, group: RolloutGroup) -> np.ndarray:
    """float64 [K]: log-probability of each answer under a model."""
    tree = Tree.of(group.prompt_ids, [answer.ids for answer in group.answers])
    return np.array([float(logp.sum()) for logp in side.logp([tree])[0]])


def tau_b(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b, pair by pair; NaN where one of the two ties everything."""
    concordant, left, right = 0, 0, 0
    for i in range(len(a)):
        for j in range(i):
            x, y = (a[i] > a[j]) - (a[i] < a[j]), (b[i] > b[j]) - (b[i] < b[j])
            concordant, left, right = concordant + x * y, left + abs(x), right + abs(y)
    return concordant / math.sqrt(left * right) if left * right else math.nan
