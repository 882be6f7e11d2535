"""What we use of accelerate beyond its documented calls. Checked with 1.15."""

from __future__ import annotations

import logging
import os
import sys
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


def leave(accelerator: Any, code: int = 0) -> int:
    """Leave a run together: wait for all processes, close their group, and end each without its interpreter.

    Of several processes one can otherwise be aborted after all is saved, by a thread of the collectives' library that
    the interpreter ends around ("terminate called without an active exception", torch 2.13 with gloo), and the launcher
    then ends the others and calls the run failed. A single process returns with `code`.
    """
    accelerator.wait_for_everyone()
    several = accelerator.num_processes > 1
    accelerator.end_training()
    if several:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
