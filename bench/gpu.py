"""Our trainer against `trl.DPOTrainer` on a GPU in bfloat16: pairs and tokens per second, peak memory, utilisation.

    python -m bench.gpu --cases 0.5b:hh:64 3b:ultrafeedback:32 --rounds 3

A round is one process per side, and the order of the sides alternates from round to round; a process runs every case.
Random Qwen3 weights made on the card, full fine-tuning, float32 weights and optimiser with bfloat16 compute, a frozen
second copy (`:cached`: log-probs from a store, TRL's precomputed). TRL's micro-batch is `--trl-micro` pairs.
Timed are `--windows` windows of `--steps` steps a process; ratios are of medians over all windows.

Tokens are unique tokens: a prompt counts once for both of its responses, and for both trainers alike, so utilisation
says how much of the card does work that is needed. FLOPs: 2 per weight and unique token forward, twice that backward,
one more forward of the reference; the head at response tokens only; attention at the pairs a causal mask leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_side import SHAPES
from bench.machine import provenance
from bench.models import Shape
from bench.offline import MAX_LENGTH, RESULTS

KINDS = ("hh", "ultrafeedback")
PASSES = 4.0
"""Forward-sized passes of a step: policy forward, its backward (two), reference forward."""


@dataclass(frozen=True)
class Case:
    """One model, kind of rows and global batch. `cached`: the reference's log-probs come from a store."""

    size: str
    data: str
    batch: int
    cached: bool = False

    @classmethod
    def of(cls, text: str) -> Case:
        parts = text.split(":")
        size, data, batch, *rest = parts if len(parts) > 2 else ("", "", "")
        if size not in SHAPES or data not in KINDS or not batch.isdecimal() or rest not in ([], ["cached"]):
            known = f"SIZE of {', '.join(SHAPES)}, DATA of {', '.join(KINDS)}"
            raise SystemExit(f"`{text}` is no case: give SIZE:DATA:BATCH[:cached] with {known}")
        return cls(size, data, int(batch), bool(rest))

    @property
    def name(self) -> str:
        return f"{self.size}-{self.data}-b{self.batch}" + ("-cached" if self.cached else "")


def main() -> None:
    options = _options()
    device = _device()
    begun = time.monotonic()
    cases = [Case.of(text) for text in options.cases]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        steps = options.warm + options.windows * options.steps
        for data in sorted({case.data for case in cases}):
            batch = max(case.batch for case in cases if case.data == data)
            _run("bench.gpu_side", "prepare", data, str(work / data), str(steps * batch), str(MAX_LENGTH))
        measured: dict[str, dict[str, list[Any]]] = {case.name: {side: [] for side in options.sides} for case in cases}
        for number in range(options.rounds):
            for side in options.sides if number % 2 == 0 else options.sides[::-1]:
                if time.monotonic() - begun > options.deadline:
                    print("deadline: no further process is started", flush=True)
                    continue
                for name, one in _process(side, cases, options, work, number):
                    measured[name][side].append(one)
                    print(f"round {number + 1} {name} {side}: {_short(one)}", flush=True)
            for case in cases:
                facts = json.loads((work / case.data / "facts.json").read_text())
                _write(case, measured[case.name], facts, options, device)


def _process(side: str, cases: list[Case], options: argparse.Namespace, work: Path, number: int) -> list[Any]:
    """All cases of one side in a process of its own; what it measured before it failed is kept."""
    place = work / f"{side}-{number}"
    place.mkdir()
    settings = [
        {
            "name": case.name,
            "side": side,
            "size": case.size,
            "folder": str(work / case.data),
            "output": str(place / case.name),
            "batch": case.batch,
            "cached": case.cached,
            "trl_micro": options.trl_micro,
            "checkpointing": case.size in options.checkpointing,
            "backend": options.backend,
            "budget": options.budget,
            "workers": options.workers,
            "warm": options.warm,
            "windows": options.windows,
            "steps": options.steps,
            "max_length": MAX_LENGTH,
            "profile": options.profile,
        }
        for case in cases
    ]
    (place / "settings.json").write_text(json.dumps(settings))
    results = place / "results.jsonl"
    try:
        _run("bench.gpu_side", "measure", str(place / "settings.json"), str(results), limit=options.limit)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{side} ended early: {error}", flush=True)
    lines = results.read_text().splitlines() if results.exists() else []
    return [(one["name"], one) for one in map(json.loads, lines)]


def _short(one: dict[str, Any]) -> str:
    if "error" in one:
        return str(one["error"])[:300]
    rates = ", ".join(f"{rate:.1f}" for rate in one["pairs_per_second"])
    return f"{rates} pairs/s, {one['peak_gpu_bytes'] / 2**30:.1f} GiB, first loss {one['losses'][0]:.5f}"


def _write(case: Case, measured: dict[str, list[Any]], facts: Any, options: argparse.Namespace, device: str) -> None:
    found = {side: [one for one in runs if "error" not in one] for side, runs in measured.items()}
    summary = {side: _summary(case, runs, facts, options) for side, runs in found.items() if runs}
    if "ours" in summary and "trl" in summary:
        ours, trl = summary["ours"], summary["trl"]
        summary["ours/trl"] = {
            "speed": ours["pairs_per_second"] / trl["pairs_per_second"],
            "speed_least": ours["pairs_per_second_range"][0] / trl["pairs_per_second_range"][1],
            "memory": ours["peak_gpu_gib"] / trl["peak_gpu_gib"],
        }
    print(case.name, json.dumps(summary), flush=True)
    result = {
        "benchmark": "gpu",
        "case": vars(case),
        "setting": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "device": device,
        "model": vars(SHAPES[case.size]),
        "data": facts,
        **provenance(),
        "summary": summary,
        "measured": measured,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"gpu-{case.name}.json").write_text(json.dumps(result, indent=1) + "\n")


def _summary(case: Case, runs: list[Any], facts: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over all windows of all processes of one side."""
    rates = [rate for one in runs for rate in one["pairs_per_second"]]
    pairs = statistics.median(rates)
    tokens = sum(facts[f"mean_{part}_tokens"] for part in ("prompt", "chosen", "rejected"))
    flops = pairs * flops_per_pair(SHAPES[case.size], facts, passes=PASSES - case.cached)
    return {
        "pairs_per_second": pairs,
        "pairs_per_second_range": [min(rates), max(rates)],
        "windows": len(rates),
        "unique_tokens_per_second": pairs * tokens,
        "model_tflops_per_second": flops / 1e12,
        "utilisation": flops / 1e12 / options.peak_tflops,
        "peak_gpu_gib": max(one["peak_gpu_bytes"] for one in runs) / 2**30,
        "first_loss": runs[0]["losses"][0],
    }


def flops_per_pair(shape: Shape, data: dict[str, float], passes: float = PASSES) -> float:
    """Floating-point operations that one pair of mean lengths needs in a step of so many forward-sized passes."""
    prompt, responses = data["mean_prompt_tokens"], data["mean_chosen_tokens"] + data["mean_rejected_tokens"]
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    body = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    seen = prompt**2 / 2
    seen += sum(
        data[f"mean_{part}_tokens"] * (prompt + data[f"mean_{part}_tokens"] / 2) for part in ("chosen", "rejected")
    )
    scores = 4 * shape.layers * shape.heads * shape.head_dim * seen
    return passes * (2 * body * (prompt + responses) + 2 * shape.hidden * shape.vocabulary * responses + scores)


def _run(module: str, *arguments: str, limit: float | None = None) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONWARNINGS": "ignore",
    }
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=root, env=environment, check=True, timeout=limit)


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU and a CUDA build of torch; there is none here")
    return str(torch.cuda.get_device_name(0))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["0.5b:hh:64"], help="SIZE:DATA:BATCH[:cached]")
    parser.add_argument("--sides", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps of a window")
    parser.add_argument("--trl-micro", type=int, default=8, help="TRL's pairs per forward; the rest accumulates")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--budget", type=int, default=None, help="our tokens per micro-batch")
    parser.add_argument("--workers", type=int, default=0, help="our loader's workers")
    parser.add_argument("--checkpointing", nargs="*", default=[], help="sizes with gradient checkpointing, both sides")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak of the card")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of one process")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds after which no process is started")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes, in the first process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
