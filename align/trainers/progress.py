"""Telling people how a run goes: a bar or lines, and one short line of metrics a log."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align.core.progress import Progress

SHOWN = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "rollout/reward": "reward",
    "eval_reward": "held-out reward",
    "eval_kl": "KL",
    "rollout/length": "tokens",
    "rewards/accuracies": "accuracy",
    "eval_rewards/accuracies": "held-out accuracy",
    "rewards/margins": "margin",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "units_per_second": "rate",
}
"""Metric -> the word it is shown under, in this order. All others are in `log.jsonl`."""


class RunProgress(TrainerCallback):
    """Steps to a progress bar, metrics to a line.

    Args:
        bar: makes a progress of so many steps, to be entered when training begins.
        say: prints one line.
        unit: what the method counts, for the rate: `pairs`.
    """

    def __init__(
        self,
        bar: Callable[[int], AbstractContextManager[Progress]],
        say: Callable[[str], None] | None,
        unit: str = "units",
    ) -> None:
        self.bar, self.say, self.unit = bar, say, unit
        self._open = ExitStack()
        self._advance: Progress | None = None
        self._at = 0

    def attach(self, trainer: Any) -> None:
        """In place of the bar and the printed dictionaries of transformers."""
        for kind in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(kind)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._at = 0
            self._advance = self._open.enter_context(self.bar(state.max_steps))
            self._to(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._to(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.say is not None and state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.say(line(state.global_step, state.max_steps, logs, self.unit))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Also where training ended by an error."""
        self._advance = None
        self._open.close()

    def _to(self, step: int) -> None:
        if self._advance is not None:
            self._advance(step - self._at)
            self._at = step


def line(step: int, steps: int, logs: dict[str, Any], unit: str = "units") -> str:
    """`step 20/240: loss 0.6713, accuracy 0.61, learning rate 3e-07, rate 41 pairs/s`."""
    shown = [
        f"{word} {number(logs[name])}" + (f" {unit}/s" if word == "rate" else "")
        for name, word in SHOWN.items()
        if name in logs
    ]
    return f"step {step}/{steps}: " + ", ".join(shown)


def number(value: Any) -> str:
    """Four digits."""
    return f"{float(value):.4g}"
