"""What we use of accelerate beyond its documented calls. Checked with 1.15."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


def is_deepspeed(accelerator: Any) -> bool:
    return accelerator.distributed_type.value == "DEEPSPEED"


def synchronising(accelerator: Any, module: Any, last: bool) -> AbstractContextManager[Any]:
    """The context of one forward and backward: gradients meet over ranks with the last one only.

    `GradientState._set_sync_gradients` (private, 1.15) is also how accelerate tells DeepSpeed where a step ends:
    under ZeRO-2 and 3 `no_sync` is an error.
    """
    accelerator.gradient_state._set_sync_gradients(last)
    if last or is_deepspeed(accelerator):
        return nullcontext()
    return accelerator.no_sync(module)  # type: ignore[no-any-return]


def backward(accelerator: Any, loss: Any) -> None:
    """DeepSpeed would scale by its own accumulation steps (`scale_wrt_gas`, 1.15); the loss is scaled already."""
    accelerator.backward(loss, **({"scale_wrt_gas": False} if is_deepspeed(accelerator) else {}))
