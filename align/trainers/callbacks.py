"""Callbacks every run has: the local log, what follows an optimiser step, what a resume restores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from align.core.files import atomic_write

LOG_FILE = "log.jsonl"
POLICY_OF = "policy_of"
"""In the log's last line: the checkpoint that the run's policy was taken from, where that is not the end."""


class JsonlLog(TrainerCallback):
    """Every logged number in `output_dir/log.jsonl`, a line each; nothing leaves the machine."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir) / LOG_FILE
        if state.is_world_process_zero and path.is_file():
            # A run killed after its last checkpoint logged steps, or its end, that will be logged again.
            lines = [line for line in path.read_text().splitlines() if _last_step(line) <= state.global_step]
            atomic_write(path, "".join(f"{line}\n" for line in lines))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            append_log(args.output_dir, {"step": state.global_step, **logs})


def append_log(output_dir: str | Path, entry: dict[str, Any]) -> None:
    """One more line of the run's log."""
    path = Path(output_dir) / LOG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry, default=float) + "\n")


def _last_step(line: str) -> float:
    """The step of a line; beyond every step for the summary of a run's end."""
    try:
        entry = json.loads(line)
        return math.inf if "train_runtime" in entry or POLICY_OF in entry else int(entry["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a torn last line


class Patience(EarlyStoppingCallback):
    """Stops after so many evaluations without a better metric; the best checkpoint is what the run leaves."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Transformers warns here that the best model is not loaded at the end; ours is copied."""


class AfterStep(TrainerCallback):
    """Lets the method and a moving reference follow an optimiser step, before anything is saved."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        roles = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.trainer.method.after_step(roles)
        follow = getattr(self.trainer.column, "after_step", None)
        if follow is not None:
            follow(roles.policy)


class RestoreLogState(TrainerCallback):
    """Trainer zeroes its running loss after it has loaded a checkpoint; this puts ours back."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.folder: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.folder is not None:
            self.trainer.restore_own_state(self.folder)
