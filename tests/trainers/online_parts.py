"""Runs of `OnlineTrainer` on a tiny model that is paid for some tokens; also the script of a rank of two processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.compat.accelerate import leave
from align.core.progress import Progress, silent
from align.data.rollouts import RolloutGroup
from align.feedback.base import Verdict
from align.methods import METHODS
from align.testing.tiny import tiny_model, tiny_tokenizer
from align.trainers import OnlineConfig, OnlineTrainer


class Paid:
    """A reward: the share of an answer's tokens whose id leaves 3 when divided by 7. `fails` on some rows."""

    gives = "reward"
    key: Mapping[str, Any] = {}

    def __init__(self, name: str = "paid", fails: Sequence[int] = ()) -> None:
        self.name, self.fails = name, set(fails)
        self.seen: list[RolloutGroup] = []

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        self.seen += groups
        return [self._verdict(group) for group in groups]

    def _verdict(self, group: RolloutGroup) -> Verdict:
        if group.row.row in self.fails:
            return Verdict([float("nan")] * len(group), None, ("out of order",) * len(group), len(group))
        return Verdict([paid(one.ids) for one in group.answers], asked=len(group))


def paid(ids: Any) -> float:
    return float((np.asarray(ids) % 7 == 3).mean())


def rows(count: int = 48) -> list[dict[str, Any]]:
    return [{"prompt": f"say the number {number}", "number": number} for number in range(count)]


def trainer(
    folder: Path,
    method: str,
    options: Mapping[str, Any] | None = None,
    feedback: Any = None,
    eval_rows: list[dict[str, Any]] | None = None,
    model: Any = None,
    **arguments: Any,
) -> OnlineTrainer:
    given: dict[str, Any] = {
        "learning_rate": 1e-2,
        "global_batch_size": 8,
        "max_steps": 6,
        "max_new_tokens": 6,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    args = OnlineConfig(output_dir=str(folder), **{**given, **arguments})
    return OnlineTrainer(
        tiny_model(seed=1) if model is None else model,
        METHODS.get(method)(**(options or {})),
        args,
        rows(),
        eval_rows,
        processing_class=tiny_tokenizer(),
        feedback=Paid() if feedback is None else feedback,
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def main(out: str, method: str, options: str) -> None:
    run = trainer(
        Path(out), method, json.loads(options), rollout_keep="all", max_steps=2, learning_rate=0.1, optim="sgd"
    )
    run.train()
    leave(run.accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:4])
