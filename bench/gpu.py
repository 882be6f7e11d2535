"""Our trainer on a GPU in bfloat16: tokens per second and model FLOPs utilisation, beside `trl.DPOTrainer`.

    python -m bench.gpu --model 0.8b --batch 32 --peak-tflops 989

Random weights, UltraFeedback-like rows, full fine-tuning, float32 weights with bfloat16 compute, a frozen second copy.
Tokens are unique tokens: a prompt counts once for both of its responses, and for both trainers alike, so utilisation
says how much of the card does work that is needed. FLOPs: 2 per weight and unique token forward, twice that backward,
one more forward of the reference; the head at response tokens only; attention at the pairs a causal mask leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import provenance
from bench.models import SHAPES, Shape
from bench.offline import MAX_LENGTH, RESULTS

PASSES = 4.0
"""Forward-sized passes of a step: policy forward, its backward (two), reference forward."""


def main() -> None:
    options = _options()
    name = _device()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        count = (options.warm + options.steps) * options.batch
        _run("bench.prepare", "ultrafeedback", options.model, str(work), str(count), str(MAX_LENGTH))
        facts = json.loads((work / "facts.json").read_text())
        needed = flops_per_pair(SHAPES[options.model], facts["data"])
        tokens = sum(facts["data"][f"mean_{part}_tokens"] for part in ("prompt", "chosen", "rejected"))
        sides = {}
        for side in options.sides:
            one = sides[side] = _measure(side, options, work)
            one["unique_tokens_per_second"] = one["pairs_per_second"] * tokens
            one["model_tflops_per_second"] = one["pairs_per_second"] * needed / 1e12
            one["utilisation"] = one["model_tflops_per_second"] / options.peak_tflops
            print(
                side,
                {key: one[key] for key in ("unique_tokens_per_second", "utilisation", "peak_gpu_bytes")},
                flush=True,
            )
    result = {
        "benchmark": "gpu",
        "setting": {key: value for key, value in vars(options).items() if key != "out"},
        "device": name,
        **facts,
        **provenance(),
        "sides": sides,
    }
    target = options.out or RESULTS / f"gpu-{options.model}-b{options.batch}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


def flops_per_pair(shape: Shape, data: dict[str, float]) -> float:
    """Floating-point operations that one pair of mean lengths needs in a step."""
    prompt, responses = data["mean_prompt_tokens"], data["mean_chosen_tokens"] + data["mean_rejected_tokens"]
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    body = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    seen = prompt**2 / 2
    seen += sum(
        data[f"mean_{part}_tokens"] * (prompt + data[f"mean_{part}_tokens"] / 2) for part in ("chosen", "rejected")
    )
    scores = 4 * shape.layers * shape.heads * shape.head_dim * seen
    return PASSES * (2 * body * (prompt + responses) + 2 * shape.hidden * shape.vocabulary * responses + scores)


def _measure(side: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    place = work / side
    place.mkdir()
    setting = {
        "name": side,
        "side": side,
        "backend": options.backend,
        "reference": "frozen",
        "cache": str(place / "cache"),
        "model": str(work / "model"),
        "rows": str(work / "rows.jsonl"),
        "output": str(place / "run"),
        "result": str(place / "result.json"),
        "batch": options.batch,
        "budget": options.budget,
        "warm_steps": options.warm,
        "steps": options.warm + options.steps,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-6,
        "beta": 0.1,
        "threads": 8,
        "dtype": "bfloat16",
        "use_cpu": False,
    }
    (place / "setting.json").write_text(json.dumps(setting))
    _run("bench.sides", str(place / "setting.json"))
    return json.loads((place / "result.json").read_text())


def _run(module: str, *arguments: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0"}
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=root, env=environment, check=True)


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU and a CUDA build of torch; there is none here")
    return str(torch.cuda.get_device_name(0))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=("0.8b", "2b"), default="0.8b")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--backend", default="flex")
    parser.add_argument("--budget", type=int, default=16384, help="our tokens per micro-batch")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 peak of the card")
    parser.add_argument("--sides", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
