"""Kills a training run at random moments, resumes it, and compares the weights it ends with, byte for byte.

Run as a script: it imports torch once and forks, so a run costs its steps and no start-up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from peft import LoraConfig  # noqa: E402

from align.testing.tiny import random_pairs, save_tiny  # noqa: E402
from align.trainers import AlignConfig, PreferenceTrainer  # noqa: E402

ROWS, BATCH, EPOCHS = 22, 4, 2


def train(model: Path, rows: Path, out: Path, method: str, lora: bool, stop: int | None = None) -> None:
    args = AlignConfig(
        output_dir=str(out),
        global_batch_size=BATCH,
        learning_rate=1e-3,
        num_train_epochs=EPOCHS,
        max_steps=stop if stop else -1,
        save_steps=2,
        save_total_limit=2,
        logging_steps=3,
        tokens_per_micro_batch=150,
        eval_every=4,
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
        warmup_steps=0,
    )
    peft = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear") if lora else None
    PreferenceTrainer(str(model), method, args, str(rows), str(rows), peft_config=peft).train()


def child(*arguments: object) -> int:
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = 1
        try:
            train(*arguments)  # type: ignore[arg-type]
            code = 0
        except BaseException:  # noqa: BLE001 - a forked child must not return into its parent's code
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def finish(*arguments: object) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child(*arguments), 0)[1])


def weights(out: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((out / "policy").glob("*.safetensors"))}


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = ("runtime", "per_second", "train_loss", "total_flos")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines]


def wait_to_kill(pid: int, out: Path, delay: float, while_saving: bool) -> bool:
    """True where the child was killed before it finished."""
    end = time.monotonic() + delay
    while time.monotonic() < end or while_saving:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        if while_saving and time.monotonic() >= end and list(out.glob(".checkpoint-*.partial")):
            break
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def main(folder: Path, kills: int) -> None:
    rng = random.Random(0)
    model = save_tiny(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in random_pairs(ROWS, seed=1)))
    report: dict[str, object] = {"kills": 0, "while_saving": 0, "cases": []}
    cases = [("kto", False), ("dpo", True), ("lipo", False), ("sft", False)]
    wanted, duration = {}, {}
    for method, lora in cases:
        start = time.monotonic()
        assert finish(model, rows, folder / method, method, lora) == 0
        duration[method] = time.monotonic() - start
        wanted[method] = (weights(folder / method), log_of(folder / method))
    for number in range(kills):
        method, lora = cases[number % len(cases)]
        out = folder / f"killed-{number}"
        saving = number % 3 == 2
        killed = 0
        for _ in range(2):
            pid = child(model, rows, out, method, lora)
            delay = rng.uniform(0.0, 0.9) * duration[method]
            killed += wait_to_kill(pid, out, delay, saving)
        leftovers = [path.name for path in out.glob(".*.partial")] if out.exists() else []
        code = finish(model, rows, out, method, lora)
        report["kills"] += killed  # type: ignore[operator]
        report["while_saving"] += bool(leftovers)  # type: ignore[operator]
        same = code == 0 and weights(out) == wanted[method][0]
        report["cases"].append(  # type: ignore[union-attr]
            {
                "method": method,
                "killed": killed,
                "leftovers": leftovers,
                "code": code,
                "same_weights": same,
                "same_log": code == 0 and log_of(out) == wanted[method][1],
                "checkpoints": sorted(p.name for p in out.glob("checkpoint-*")),
            }
        )
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
