"""Arguments that both trainers inherit from `transformers.TrainingArguments`: the same values for both."""

from __future__ import annotations

from typing import Any


def shared(output: str, max_length: int, learning_rate: float, steps: int, optim: str) -> dict[str, Any]:
    """What every benchmark says alike; a side adds its own."""
    return {
        "output_dir": output,
        "max_length": max_length,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": optim,
        "max_grad_norm": 1.0,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
