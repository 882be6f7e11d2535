"""One measurement of one trainer, in a process of its own: `python -m bench.sides SETTING.json`.

Step times run from the end of the last warm-up step to the end of the last step, so loading and logging count.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from bench.arguments import shared

Setting = dict[str, Any]


def main() -> None:
    setting: Setting = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(setting["threads"])
    build = {"ours": our_trainer, "trl": trl_trainer}[setting["side"]]
    started = time.perf_counter()
    clock = _clock()
    trainer = build(setting, clock)
    trainer.train()
    Path(setting["result"]).write_text(json.dumps(_result(setting, clock, time.perf_counter() - started)))


def trl_trainer(setting: Setting, clock: Any) -> Any:
    """`trl.DPOTrainer` on the same rows. The rows are tokenised, and with `cached` scored, before its clock starts."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in Path(setting["rows"]).read_text(encoding="utf-8").splitlines()]
    arguments = DPOConfig(
        per_device_train_batch_size=setting["batch"],
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        bf16=setting.get("dtype") == "bfloat16",
        beta=setting["beta"],
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=setting["reference"] == "cached",
        **_shared(setting),
    )
    return DPOTrainer(
        model=setting["model"],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]),
        callbacks=[clock],
    )


def our_trainer(setting: Setting, clock: Any) -> Any:
    """`PreferenceTrainer` on the same rows."""
    from align.methods.dpo import DPO
    from align.trainers import AlignConfig, PreferenceTrainer

    arguments = AlignConfig(
        global_batch_size=setting["batch"],
        shuffle=False,
        backend=setting["backend"],
        dtype=setting.get("dtype", "float32"),
        tokens_per_micro_batch=setting.get("budget"),
        reference=setting["reference"],
        reference_cache=setting["cache"] if setting["reference"] == "cached" else None,
        resume="never",
        **_shared(setting),
    )
    trainer = PreferenceTrainer(
        model=setting["model"],
        method=DPO(beta=setting["beta"]),
        args=arguments,
        train_dataset=setting["rows"],
    )
    trainer.add_callback(clock)
    return trainer


def _shared(setting: Setting) -> dict[str, Any]:
    names = ("output", "max_length", "learning_rate", "steps")
    return {
        **shared(**{name: setting[name] for name in names}, optim="adamw_torch"),
        "use_cpu": setting.get("use_cpu", True),
    }


def _clock() -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times of all steps, and the logged losses."""

        def __init__(self) -> None:
            self.begins: list[float] = []
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begins.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


def _result(setting: Setting, clock: Any, total: float) -> dict[str, Any]:
    import torch

    warm, batch = setting["warm_steps"], setting["batch"]
    seconds = clock.ends[-1] - clock.ends[warm - 1]
    inside = sum(end - begin for begin, end in zip(clock.begins[warm:], clock.ends[warm:], strict=True))
    pairs = batch * (len(clock.ends) - warm)
    return {
        "side": setting["name"],
        "pairs_timed": pairs,
        "seconds": seconds,
        "seconds_inside_steps": inside,
        "pairs_per_second": pairs / seconds,
        "seconds_per_pair": seconds / pairs,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "total_seconds": total,
        "losses": clock.losses,
    }


if __name__ == "__main__":
    main()
