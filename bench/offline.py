"""Our trainer against `trl.DPOTrainer`: pairs per second, peak memory, and how far the loss curves are apart.

    python -m bench.offline --data hh --model 7m --batch 8 --rounds 5

Each measurement is a process of its own; their order alternates from round to round. Same model, rows, order, batch,
dtype (float32), learning rate and optimiser; two threads; no gradient checkpointing. Sides:

    ours    PreferenceTrainer, the back end that `auto` picks; with `--reference cached`, timed in the second epoch
    padded  the same code with one sequence a row: what packing itself gains
    trl     DPOTrainer with a frozen second copy
    trl_precompute  DPOTrainer with `precompute_ref_log_probs` (with `--reference cached` only)

The first 16 pairs (at least one step) warm up, the next 64 are timed; `--warm` and `--timed` change that. The result is
written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import provenance

WARM_PAIRS, TIMED_PAIRS = 16, 64
MAX_LENGTH = 1024
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        warm = max(1, options.warm // options.batch)
        timed = max(1, options.timed // options.batch)
        count = (warm + timed) * options.batch
        _run("bench.prepare", options.data, options.model, str(work), str(count), str(MAX_LENGTH))
        facts = json.loads((work / "facts.json").read_text())
        measured: dict[str, list[dict[str, Any]]] = {side: [] for side in _sides(options)}
        for number in range(options.rounds):
            order = list(measured) if number % 2 == 0 else list(measured)[::-1]
            for side in order:
                measured[side].append(_measure(side, options, work, number, warm, timed))
                _say(number, measured[side][-1])
    result = {
        "benchmark": "offline",
        "setting": {**vars(options), "out": None, "learning_rate": 1e-6, "beta": 0.1, "dtype": "float32"},
        **facts,
        **provenance(),
        "summary": summary(measured),
        "measured": measured,
    }
    del result["setting"]["out"]
    target = (
        options.out or RESULTS / f"offline-{options.data}-{options.model}-b{options.batch}-{options.reference}.json"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


def summary(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each side, and of every other side's ratios to ours, taken round by round."""
    found: dict[str, Any] = {
        side: {
            "pairs_per_second": statistics.median(one["pairs_per_second"] for one in results),
            "seconds_per_pair": statistics.median(one["seconds_per_pair"] for one in results),
            "peak_rss_gib": statistics.median(one["peak_rss_bytes"] for one in results) / 2**30,
        }
        for side, results in measured.items()
        if results
    }
    for side, results in measured.items():
        if side == "ours" or not measured.get("ours") or not results:
            continue
        both = list(zip(measured["ours"], results, strict=True))
        speed = [ours["pairs_per_second"] / other["pairs_per_second"] for ours, other in both]
        memory = [ours["peak_rss_bytes"] / other["peak_rss_bytes"] for ours, other in both]
        found[f"ours/{side}"] = {
            "speed": statistics.median(speed),
            "speed_least": min(speed),
            "speed_of_each_round": speed,
            "memory": statistics.median(memory),
            "largest_loss_difference": max(loss_difference(ours["losses"], other["losses"]) for ours, other in both),
        }
    return found


def loss_difference(first: list[float], second: list[float]) -> float:
    """Largest difference of two loss curves over the steps that both have."""
    return max((abs(a - b) for a, b in zip(first, second, strict=False)), default=float("nan"))


def _sides(options: argparse.Namespace) -> list[str]:
    return [side for side in options.sides if side != "trl_precompute" or options.reference == "cached"]


def _measure(side: str, options: argparse.Namespace, work: Path, number: int, warm: int, timed: int) -> dict[str, Any]:
    place = work / f"{side}-{number}"
    place.mkdir()
    cached = options.reference == "cached"
    ours = side in ("ours", "padded")
    # The cache is filled in our first epoch and read in the second; TRL fills its own before its first step.
    epochs_before = 1 if cached and ours else 0
    setting = {
        "name": side,
        "side": "ours" if ours else "trl",
        "backend": "padded" if side == "padded" else "auto",
        "reference": "cached" if cached and side != "trl" else "frozen",
        "cache": str(place / "cache"),
        "model": str(work / "model"),
        "rows": str(work / "rows.jsonl"),
        "output": str(place / "run"),
        "result": str(place / "result.json"),
        "batch": options.batch,
        "warm_steps": epochs_before * (warm + timed) + warm,
        "steps": (1 + epochs_before) * (warm + timed),
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-6,
        "beta": 0.1,
        "threads": options.threads,
    }
    (place / "setting.json").write_text(json.dumps(setting))
    _run("bench.sides", str(place / "setting.json"), threads=options.threads, home=place)
    return json.loads((place / "result.json").read_text())


def _run(module: str, *arguments: str, threads: int = 2, home: Path | None = None) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    if home is not None:
        environment["HF_DATASETS_CACHE"] = str(home / "datasets")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def _say(number: int, one: dict[str, Any]) -> None:
    speed, memory = one["seconds_per_pair"], one["peak_rss_bytes"] / 2**30
    print(f"round {number + 1} {one['side']:>15}: {speed:.4f} s/pair, {memory:.2f} GiB", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", choices=("hh", "ultrafeedback", "worst"), default="hh")
    parser.add_argument("--model", choices=("7m", "59m"), default="7m")
    parser.add_argument("--batch", type=int, choices=(4, 8, 32), default=8)
    parser.add_argument("--reference", choices=("frozen", "cached"), default="frozen")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=WARM_PAIRS, help="pairs before the clock starts")
    parser.add_argument("--timed", type=int, default=TIMED_PAIRS, help="pairs on the clock")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=["ours", "trl", "trl_precompute", "padded"])
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
