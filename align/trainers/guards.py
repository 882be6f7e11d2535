"""What watches a run: step zero, signals, early memory trouble."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from align.core.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)


def check_step_zero(outputs: Mapping[str, Tensor], mask: Tensor, dtype: torch.dtype, expected_equal: bool) -> float:
    """At step 0 a policy equals its reference: h = 0 for every completion.

    float32: |h| <= 1e-4 + 1e-6 |y|. bfloat16: mean |h| over mean |y| <= 0.01 nats a token.

    Returns:
        The largest |h|.

    Raises:
        TrainingError: they should be equal (the reference is the starting policy) and are not.
    """
    log_ratio = torch.where(mask, outputs["logp"].detach() - outputs["ref_logp"], 0.0)
    gap, length = log_ratio.sum(-1).abs(), mask.sum(-1)
    largest = float(gap.max()) if gap.numel() else 0.0
    if dtype == torch.bfloat16:
        equal = bool(gap.mean() <= 0.01 * length.float().mean())
    else:
        equal = bool((gap <= 1e-4 + 1e-6 * length).all())
    if not expected_equal:
        logger.info("step zero: policy and reference differ by at most %.4g nats a completion", largest)
    elif not equal:
        raise TrainingError(
            f"step zero: policy and reference differ by {largest:.4g} nats on one completion",
            why="they hold the same weights, so every log-ratio should be 0: dropout, another dtype or attention, "
            "or a cache of another model",
            mend="switch dropout off, or delete the reference cache; report the model if neither helps",
        )
    return largest


class SignalGuard:
    """Turns SIGTERM into a flag that the training loop reads between steps."""

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        self._previous: Any = None

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _ask(self, *_: object) -> None:
        self.asked = True


class StopOnSignal(TrainerCallback):
    """Saves and stops at the end of the step in which any rank was asked to; a half step is never saved."""

    def __init__(self, guard: SignalGuard, world: int, device: torch.device) -> None:
        self.guard, self.world, self.device = guard, world, device

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._anyone_asked():
            logger.warning("SIGTERM: saving a checkpoint at step %d and stopping", state.global_step)
            self.guard.agreed = True
            control.should_save = control.should_training_stop = True
        return control

    def _anyone_asked(self) -> bool:
        if self.world == 1:
            return self.guard.asked
        flag = torch.tensor([float(self.guard.asked)], device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())


def check_deepspeed(config: Mapping[str, Any], max_grad_norm: float) -> None:
    """Refuse a DeepSpeed configuration that does in silence something else than the arguments say.

    Raises:
        ConfigError: it does not clip though `max_grad_norm` is set, or ZeRO-3 would save no model file.
    """
    clipping = config.get("gradient_clipping", 0.0)
    if max_grad_norm > 0 and clipping != "auto" and float(clipping) != float(max_grad_norm):
        raise ConfigError(
            f"the DeepSpeed configuration clips at {clipping}, and `max_grad_norm` is {max_grad_norm}",
            why="under DeepSpeed its own `gradient_clipping` alone counts",
            mend='set `"gradient_clipping": "auto"` in it',
        )
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            "this ZeRO-3 configuration saves no model file",
            mend="set `stage3_gather_16bit_weights_on_model_save: true` (accelerate: `zero3_save_16bit_model: true`)",
        )
