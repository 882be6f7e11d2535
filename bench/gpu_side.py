"""What `bench.gpu` runs in processes of their own: rows and tokenizer (`prepare`), and one side's cases (`measure`)."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.arguments import shared
from bench.data import hh_rows, ultrafeedback_like, write_jsonl
from bench.models import SPECIAL, Shape, bpe_tokenizer, random_model, word_tokenizer

Setting = dict[str, Any]


VOCABULARY = 151_936
SHAPES: dict[str, Shape] = {
    "tiny": Shape(VOCABULARY, 64, 2, 4, 2, 16, 128),
    "0.5b": Shape(VOCABULARY, 896, 24, 14, 2, 64, 4864),
    "3b": Shape(VOCABULARY, 2048, 36, 16, 2, 128, 11008),
}
"""Input and output embeddings are one matrix, as in the small models of the Qwen3 family."""


def main() -> None:
    if sys.argv[1] == "prepare":
        kind, folder, count, max_length = sys.argv[2:6]
        prepare(kind, Path(folder), int(count), int(max_length))
    else:
        measure(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))


def prepare(kind: str, folder: Path, count: int, max_length: int) -> None:
    """Write `rows.jsonl`, a tokenizer and `facts.json` (lengths with the end token)."""
    from bench.prepare import _select

    if kind == "hh":
        rows = hh_rows()
        tokenizer = bpe_tokenizer(rows, VOCABULARY)
    else:
        rows = ultrafeedback_like(VOCABULARY - len(SPECIAL), count)
        tokenizer = word_tokenizer(VOCABULARY)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    kept, facts = _select(rows, folder, count, max_length)
    write_jsonl(folder / "rows.jsonl", kept)
    (folder / "facts.json").write_text(json.dumps(facts))


def measure(settings: list[Setting], results: Path) -> None:
    """Every setting in turn; one line of JSON each, written as soon as it is there."""
    import torch

    for setting in settings:
        try:
            found = _measured(setting)
        except Exception as error:  # noqa: BLE001 - a case that fails must not cost the others
            traceback.print_exc()
            found = {"name": setting["name"], "error": f"{type(error).__name__}: {error}"}
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def model_of(size: str, device: str) -> Any:
    """The same random weights for every trainer."""
    import torch

    with torch.device(device):
        return random_model(SHAPES[size], tied=True)


def _measured(setting: Setting) -> dict[str, Any]:
    import torch

    started = time.perf_counter()
    clock = _clock(setting)
    trainer = {"ours": our_trainer, "trl": trl_trainer}[setting["side"]](setting, clock)
    built = time.perf_counter() - started
    trainer.train()
    stamps = clock.stamps
    pairs = setting["batch"] * setting["steps"]
    engine = getattr(trainer, "engine", None)
    return {
        "name": setting["name"],
        "side": setting["side"],
        "pairs_per_second": [pairs / (b - a) for a, b in pairwise(stamps)],
        "host_seconds_outside_steps": clock.outside,
        "window_seconds": [b - a for a, b in pairwise(stamps)],
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "reserved_gpu_bytes": torch.cuda.max_memory_reserved(),
        "seconds_to_build": built,
        "total_seconds": time.perf_counter() - started,
        "losses": clock.losses,
        "backend": None if engine is None else engine.backend.name,
    }


def trl_trainer(setting: Setting, clock: Any) -> Any:
    """`trl.DPOTrainer`; its rows are tokenised, and with `cached` scored, before its clock starts."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in Path(setting["folder"], "rows.jsonl").read_text().splitlines()]
    micro = min(setting["trl_micro"], setting["batch"])
    arguments = DPOConfig(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=setting["batch"] // micro,
        bf16=True,
        beta=0.1,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=setting["cached"],
        **_shared(setting),
    )
    return DPOTrainer(
        model=model_of(setting["size"], "cuda"),
        ref_model=model_of(setting["size"], "cuda"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(setting["folder"]),
        callbacks=[clock],
    )


def our_trainer(setting: Setting, clock: Any) -> Any:
    """`PreferenceTrainer` on the same rows."""
    from transformers import AutoTokenizer

    from align.methods.dpo import DPO
    from align.trainers import AlignConfig, PreferenceTrainer

    arguments = AlignConfig(
        global_batch_size=setting["batch"],
        shuffle=False,
        backend=setting["backend"],
        dtype="bfloat16",
        tokens_per_micro_batch=setting["budget"],
        reference="cached" if setting["cached"] else "frozen",
        reference_cache=setting["output"] + "-cache" if setting["cached"] else None,
        dataloader_num_workers=setting["workers"],
        resume="never",
        **_shared(setting),
    )
    return PreferenceTrainer(
        model=model_of(setting["size"], "cuda"),
        method=DPO(beta=0.1),
        args=arguments,
        train_dataset=str(Path(setting["folder"], "rows.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(setting["folder"]),
        callbacks=[clock],
    )


def _first_step(setting: Setting) -> int:
    """The step after which the clock starts: our cache is filled in the first epoch and read in the second."""
    epoch = setting["warm"] + setting["windows"] * setting["steps"]
    return setting["warm"] + (epoch if setting["cached"] and setting["side"] == "ours" else 0)


def _shared(setting: Setting) -> dict[str, Any]:
    steps = _first_step(setting) + setting["windows"] * setting["steps"]
    return {
        **shared(setting["output"], setting["max_length"], 1e-6, steps, "adamw_torch_fused"),
        "gradient_checkpointing": setting["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if setting["checkpointing"] else None,
    }


def _clock(setting: Setting) -> Any:
    import torch
    from transformers import TrainerCallback

    first, every = _first_step(setting), setting["steps"]
    profiled = setting["profile"]

    class Clock(TrainerCallback):
        """The time at the end of every window, the card idle; losses; and the profile of two steps, if asked for."""

        def __init__(self) -> None:
            self.stamps: list[float] = []
            self.losses: list[float] = []
            self.outside = 0.0
            self._left = 0.0
            self._profile: Any = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self._left and self.stamps:
                self.outside += time.perf_counter() - self._left

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            done = state.global_step - first
            if profiled and state.global_step == 2:
                self._profile = _Profile()
            if self._profile is not None and state.global_step == 4:
                self._profile.close(setting)
                self._profile = None
            if done >= 0 and done % every == 0:
                torch.cuda.synchronize()
                if not done:
                    torch.cuda.reset_peak_memory_stats()
                self.stamps.append(time.perf_counter())
            self._left = time.perf_counter()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Clock()


class _Profile:
    """Kernels of the card and functions of the host, over the steps between making it and `close`."""

    def __init__(self) -> None:
        import cProfile

        import torch

        torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self._card = torch.profiler.profile(activities=kinds)
        self._card.__enter__()
        self._host = cProfile.Profile()
        self._started = time.perf_counter()
        self._host.enable()

    def close(self, setting: Setting) -> None:
        import pstats

        import torch

        self._host.disable()
        queued = time.perf_counter() - self._started
        torch.cuda.synchronize()
        whole = time.perf_counter() - self._started
        self._card.__exit__(None, None, None)
        print(f"PROFILE {setting['side']} {setting['name']}: {queued:.3f} s on the host, {whole:.3f} s in all")
        averages = self._card.key_averages()
        print(averages.table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=60)[:9000])
        pstats.Stats(self._host).sort_stats("cumulative").print_stats(45)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
