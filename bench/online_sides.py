"""One side of `bench.online`, in a process of its own: `python -m bench.online_sides SETTING.json`.

It reads commands from its input, a line each: `pass` runs one batch of rollouts from batch in to gradients out and
answers with a line of JSON; `gradient PATH` does the same and saves the whole gradient, float32, parameters by name.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Setting = dict[str, Any]


class Driver:
    """Waits for a command before a pass, and reports when its gradients are there."""

    def __init__(self, answers: TextIO) -> None:
        self.answers = answers
        self.path: str | None = None
        self.start = self.cpu = 0.0
        self.resident = 0

    def wait(self) -> bool:
        """Whether there is another pass; the clock and the peak of resident memory begin with the return."""
        words = sys.stdin.readline().split()
        if not words:
            return False
        self.path = words[1] if words[0] == "gradient" else None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.resident = _memory("VmRSS")
        self.cpu, self.start = time.process_time(), time.perf_counter()
        return True

    def done(self, model: Any, **facts: Any) -> None:
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        peak = _memory("VmHWM")
        if self.path is not None:
            np.save(self.path, flat_gradient(model))
        found = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "start_rss_bytes": self.resident,
            "peak_rss_bytes": peak,
            **facts,
        }
        self.answers.write(json.dumps(found) + "\n")
        self.answers.flush()


def main() -> None:
    setting: Setting = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    import torch

    torch.set_num_threads(setting["threads"])
    groups = json.loads((Path(setting["folder"]) / "rollouts.json").read_text())
    {"trl": run_trl}.get(setting["side"], run_ours)(setting, groups, Driver(answers))


def run_ours(setting: Setting, groups: list[dict[str, Any]], driver: Driver) -> None:
    """The packed step: from groups with rewards to gradients."""
    from accelerate import Accelerator

    from align.reference import Frozen
    from align.scoring.backends import prepare
    from align.trainers.engine import Engine
    from align.trainers.metrics import Meter
    from align.trainers.roles import RoleModule
    from align.trainers.step import PackedStep

    policy, reference = _load(setting, "policy"), None
    policy.train()
    backend = prepare(policy, setting["backend"])
    method = our_method(setting)
    if setting["beta"]:
        reference = _load(setting, "model").eval().requires_grad_(False)
        prepare(reference, backend.name)
    roles = RoleModule({"policy": policy})
    engine = Engine(
        roles,
        roles,
        method,
        backend,
        next(policy.parameters()).device,
        setting["budget"],
        column=None if reference is None else Frozen(reference),
    )
    accelerator = Accelerator(cpu=True)
    while driver.wait():
        batch = token_groups(groups, method)
        prepared = time.perf_counter() - driver.start
        result = PackedStep(engine, accelerator, Meter()).run(batch, {}, 0)
        driver.done(policy, loss=float(result.loss), preparing=prepared, micro_batches=result.micro_batches)
        policy.zero_grad(set_to_none=True)


def run_trl(setting: Setting, groups: list[dict[str, Any]], driver: Driver) -> None:
    """`GRPOTrainer.train()` at learning rate 0, so that every step is the same pass."""
    trainer = trl_trainer(setting, groups, driver)
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(Path(setting["folder"]) / "policy", dtype=torch.float32)
    trainer.model.load_state_dict(policy.state_dict())
    del policy
    trainer.train()


def trl_trainer(setting: Setting, groups: list[dict[str, Any]], driver: Driver) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    count = len(groups[0]["completions"])

    class Clocked(GRPOTrainer):  # type: ignore[misc]
        """Notes when the rollouts are ready to be trained on, and the losses of a pass."""

        prepared: float | None = None
        losses: list[float] = []  # noqa: RUF012

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.prepared is None:
                self.prepared = time.perf_counter() - driver.start
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(float(loss.detach()))
            return loss

    class Pass(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            trainer.prepared, trainer.losses = None, []
            if not driver.wait():
                os._exit(0)  # a trainer asked to stop here would still run this step

        def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            driver.done(
                trainer.accelerator.unwrap_model(trainer.model),
                loss=sum(trainer.losses),
                preparing=trainer.prepared,
                micro_batches=len(trainer.losses),
            )

    def saved_rollouts(prompts: list[str], _trainer: Any) -> dict[str, list[Any]]:
        """TRL asks for one completion of each of the prompts, which it has repeated."""
        places = [int(prompt) for prompt in prompts]
        seen = [places[:i].count(place) for i, place in enumerate(places)]
        chosen = [groups[place] for place in places]
        completions = [group["completions"][i] for group, i in zip(chosen, seen, strict=True)]
        return {
            "prompt_ids": [group["prompt"] for group in chosen],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(one) for one in completions],
            "saved": [group["rewards"][i] for group, i in zip(chosen, seen, strict=True)],
        }

    def saved_rewards(saved: list[float], **_: Any) -> list[float]:
        return saved

    micro = setting["micro_completions"]
    arguments = GRPOConfig(
        output_dir=str(Path(setting["folder"]) / f"trl-{setting['loss']}"),
        num_generations=count,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(groups) * count // micro,
        max_completion_length=len(groups[0]["completions"][0]),
        shuffle_dataset=False,
        loss_type=setting["loss"],
        beta=setting["beta"],
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_steps=1_000_000,
        optim="sgd",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=setting["checkpointing"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = Clocked(
        model=str(Path(setting["folder"]) / "model"),
        reward_funcs=saved_rewards,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": str(place)} for place in range(len(groups))]),
        processing_class=AutoTokenizer.from_pretrained(Path(setting["folder"]) / "model"),
        rollout_func=saved_rollouts,
        callbacks=[Pass()],
    )
    return trainer


def token_groups(groups: list[dict[str, Any]], method: Any) -> list[Any]:
    """Groups with the advantages that the method's stages of shaping make of the saved rewards."""
    from align.data.groups import RowId, TokenCompletion, TokenGroup
    from align.shaping import run
    from align.shaping.base import make
    from align.trainers.rollouts import batch_of, shaped

    found = []
    for row, group in enumerate(groups):
        completions = tuple(
            TokenCompletion(
                np.array(ids, dtype=np.int64),
                np.ones(len(ids), dtype=bool),
                np.zeros(len(ids), dtype=np.int64),
                reward=reward,
            )
            for ids, reward in zip(group["completions"], group["rewards"], strict=True)
        )
        found.append(TokenGroup(RowId("rollouts", row), np.array(group["prompt"], dtype=np.int64), completions))
    stages = [make(stage.id, stage.options) for stage in method.rollouts().shaping]
    return shaped(found, run(stages, batch_of(found, {})))


def our_method(setting: Setting) -> Any:
    """The method whose loss is TRL's of this name: its KL term is multiplied by the ratio."""
    from align.methods.grpo import GRPO

    aggregation = {"grpo": "seq", "dapo": "tok"}[setting["loss"]]
    return GRPO(
        num_generations=setting["completions"],
        beta=setting["beta"],
        kl_estimator="k3_ratio",
        aggregation=aggregation,
    )


def flat_gradient(model: Any) -> np.ndarray:
    """All gradients in one array, parameters in the order of their names."""
    named = dict(model.named_parameters())
    return np.concatenate([named[name].grad.numpy().ravel() for name in sorted(named)])


def _load(setting: Setting, which: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(Path(setting["folder"]) / which, dtype=torch.float32)


def _memory(name: str) -> int:
    """`VmRSS` or `VmHWM` (its peak since it was last cleared), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}; this measurement needs Linux")


if __name__ == "__main__":
    main()
