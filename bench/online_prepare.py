"""Model, weights and saved rollouts of `bench.online` in one folder: `python -m bench.online_prepare SETTING.json`.

The reference is the saved model; the policy is that with a random step away from it, so that the two are apart
and the KL term is not 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from bench.models import SHAPES, SPECIAL, build

STEP = 3.0
"""Size of the random step, in standard deviations of each matrix."""


def main() -> None:
    setting = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(setting["folder"])
    model = build(setting["model"], "worst", [], folder / "model")
    _save_policy(folder)
    (folder / "facts.json").write_text(json.dumps({"model": model}))
    vocabulary = SHAPES[setting["model"]].vocabulary  # type: ignore[index]
    groups = rollouts(setting["prompts"], setting["completions"], setting["lengths"], vocabulary)
    (folder / "rollouts.json").write_text(json.dumps(groups))


def rollouts(
    prompts: int, completions: int, lengths: tuple[int, int], vocabulary: int, seed: int = 0
) -> list[dict[str, object]]:
    """Random token ids and rewards: per prompt `prompt` [lengths[0]], `completions` (each [lengths[1]]), `rewards`."""
    rng = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(one) for one in rng.integers(len(SPECIAL), vocabulary, count)]

    return [
        {
            "prompt": ids(lengths[0]),
            "completions": [ids(lengths[1]) for _ in range(completions)],
            "rewards": [float(one) for one in rng.normal(size=completions)],
        }
        for _ in range(prompts)
    ]


def _save_policy(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * STEP)
    model.save_pretrained(folder / "policy")


if __name__ == "__main__":
    main()
