"""Ten steps of a real run, each step's full gradient recorded: in one process, under DDP or under ZeRO-3."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainerCallback

from align.trainers import AlignConfig, PreferenceTrainer


class Record(TrainerCallback):
    """Gradients just before the optimiser steps, under DeepSpeed too, which steps inside the last backward."""

    def __init__(self) -> None:
        self.trainer: PreferenceTrainer | None = None
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.is_deepspeed_enabled:
            engine, original = self.trainer.model_wrapped, self.trainer.model_wrapped.step

            def step(*a, **k):
                self.take()
                return original(*a, **k)

            engine.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self.take()

    def take(self) -> None:
        roles = self.trainer.accelerator.unwrap_model(self.trainer.model)
        taken = {}
        for name, parameter in roles.named_parameters():
            if self.trainer.is_deepspeed_enabled:
                from deepspeed.utils import safe_get_full_grad

                gradient = safe_get_full_grad(parameter)
            else:
                gradient = parameter.grad
            if gradient is not None:
                taken[name] = gradient.detach().float().clone()
        self.steps.append(taken)


def main(model: str, rows: str, method: str, out: str) -> None:
    record = Record()
    args = AlignConfig(
        output_dir=f"{out}/{method}",
        global_batch_size=6,
        learning_rate={"dro_v": 1e-5}.get(method, 0.01),
        optim="sgd",
        max_steps=10,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        max_grad_norm=1e9,
        tokens_per_micro_batch=150,
        disable_tqdm=True,
        use_cpu=True,
        resume="never",
    )
    trainer = PreferenceTrainer(model, method, args, rows, callbacks=[record])
    record.trainer = trainer
    trainer.train()
    if trainer.rank == 0:
        flat = {f"{step}.{name}": g for step, taken in enumerate(record.steps) for name, g in taken.items()}
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        flat["losses"] = torch.tensor(losses, dtype=torch.float64)
        flat["world"] = torch.tensor([trainer.world, int(trainer.is_deepspeed_enabled)])
        save_file({k: v.contiguous() for k, v in flat.items()}, str(Path(out) / f"{method}.safetensors"))


def without_compiling() -> None:
    """DeepSpeed would compile a shared-memory collective for a minute; plain gloo gives the same sums."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        without_compiling()
    for one in sys.argv[3].split(","):
        main(sys.argv[1], sys.argv[2], one, sys.argv[4])
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    # All is saved. Threads that a launcher's libraries left running can abort an interpreter that ends around them.
    os._exit(0)
