"""Training on the same saved rollouts: our packed step against `trl.GRPOTrainer`, completions per second and memory.

    python -m bench.online

A pass goes from batch in to gradients out: rewards to advantages, the reference's log-probs where there is a KL term,
the policy's forward and backward over all micro-batches. Prompts of 512 tokens, 8 completions of 64 each, float32, no
gradient checkpointing on either side, micro-batches of 8 completions on both.

Each side is a process of its own that lives as long as its case; passes alternate between them, and while one runs the
others wait. The first pass of each warms up. Memory is the peak of resident memory in a pass above that at its start.
The last pass of each gives the whole gradient, and these are compared. `--sides ours padded trl` adds our own code with
one sequence a row: what sharing prompts gains alone.
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

import numpy as np

from bench.machine import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CASES = ("7m:grpo:0", "7m:dapo:0.04", "59m:grpo:0.04")
PROMPTS = {"7m": 4, "59m": 1}


class Worker:
    """A side's process."""

    def __init__(self, setting: dict[str, Any], place: Path) -> None:
        place.mkdir(parents=True)
        (place / "setting.json").write_text(json.dumps(setting))
        self.log = place / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.online_sides", str(place / "setting.json")],
            cwd=ROOT,
            env=environment(setting["threads"], place),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def ask(self, command: str) -> dict[str, Any]:
        questions, answers = self.process.stdin, self.process.stdout
        answer = ""
        try:
            if questions is not None and answers is not None:
                questions.write(command + "\n")
                questions.flush()
                answer = answers.readline()
        except BrokenPipeError:
            pass  # told below, with what the side left in its log
        if not answer:
            raise SystemExit(f"a side died:\n{self.log.read_text()[-6000:]}")
        return json.loads(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        try:
            self.process.communicate(timeout=20)  # the end of its input is the end of its work
        except subprocess.TimeoutExpired:
            self.process.kill()


def main() -> None:
    options = _options()
    for case in options.cases:
        model, loss, beta = case.split(":")
        result = measure(options, model, loss, float(beta))
        target = (options.out or RESULTS) / f"online-{model}-{loss}-beta{beta}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["summary"], indent=1), flush=True)


def measure(options: argparse.Namespace, model: str, loss: str, beta: float) -> dict[str, Any]:
    """One case: both sides, their passes alternating."""
    setting: dict[str, Any] = {
        "model": model,
        "loss": loss,
        "beta": beta,
        "prompts": options.prompts or PROMPTS[model],
        "completions": options.completions,
        "micro_completions": options.completions,
        "lengths": options.lengths,
        "budget": options.lengths[0] + options.completions * options.lengths[1],
        "threads": options.threads,
        "checkpointing": False,
    }
    with tempfile.TemporaryDirectory(prefix="bench-online-") as folder:
        setting["folder"] = folder
        (Path(folder) / "setting.json").write_text(json.dumps(setting))
        _prepare(Path(folder))
        facts = json.loads((Path(folder) / "facts.json").read_text())
        workers = {
            side: Worker(
                {**setting, "side": side, "backend": "padded" if side == "padded" else "auto"}, Path(folder) / side
            )
            for side in options.sides
        }
        try:
            measured = _alternate(workers, options.rounds)
            gradients = _compare(workers, Path(folder))
        finally:
            for worker in workers.values():
                worker.close()
    del setting["folder"]
    completions = setting["prompts"] * setting["completions"]
    return {
        "benchmark": "online",
        "setting": setting,
        **facts,
        **provenance(),
        "summary": summary(measured, completions, gradients),
        "measured": measured,
    }


def summary(measured: dict[str, list[dict[str, Any]]], completions: int, gradients: dict[str, float]) -> dict[str, Any]:
    """Medians of each side and of its ratios to ours, taken pass by pass.

    `memory` is the ratio of what a pass adds to resident memory. `speed_without_preparing` leaves out what comes
    before the first forward of the policy: rewards, padding, the reference's forward on TRL's side. `cpu` is the ratio
    of processor seconds, which other processes on the machine disturb less.
    """
    found: dict[str, Any] = {}
    for side, passes in measured.items():
        found[side] = {
            "completions_per_second": statistics.median(completions / one["seconds"] for one in passes),
            "seconds": statistics.median(one["seconds"] for one in passes),
            "added_mib": statistics.median(added(one) for one in passes) / 2**20,
            "loss": passes[0]["loss"],
        }
    for side in measured:
        if side == "ours":
            continue
        both = list(zip(measured["ours"], measured[side], strict=True))
        speed = [other["seconds"] / ours["seconds"] for ours, other in both]
        rest = [(other["seconds"] - other["preparing"]) / (ours["seconds"] - ours["preparing"]) for ours, other in both]
        found[f"ours/{side}"] = {
            "speed": statistics.median(speed),
            "speed_least": min(speed),
            "speed_of_each_pass": speed,
            "speed_without_preparing": statistics.median(rest),
            "cpu": statistics.median(other["cpu_seconds"] / ours["cpu_seconds"] for ours, other in both),
            "memory": statistics.median(added(ours) / added(other) for ours, other in both),
            "loss_difference": max(abs(ours["loss"] - other["loss"]) for ours, other in both),
            "gradient_difference": gradients[side],
        }
    return found


def added(one: dict[str, Any]) -> int:
    """Bytes of a pass's peak above what was resident when it began."""
    return int(one["peak_rss_bytes"] - one["start_rss_bytes"])


def _alternate(workers: dict[str, Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    for worker in workers.values():
        worker.ask("pass")
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
    for number in range(rounds):
        order = list(workers) if number % 2 == 0 else list(workers)[::-1]
        for side in order:
            one = workers[side].ask("pass")
            measured[side].append(one)
            print(
                f"pass {number + 1} {side:>6}: {one['seconds']:.3f} s ({one['preparing']:.3f} before the forward), "
                f"+{added(one) / 2**20:.0f} MiB, loss {one['loss']:.7f}",
                flush=True,
            )
    return measured


def _compare(workers: dict[str, Worker], folder: Path) -> dict[str, float]:
    """||ours - theirs|| / ||theirs|| of the whole gradient, for every other side."""
    gradients = {}
    for side, worker in workers.items():
        path = folder / f"{side}.npy"
        worker.ask(f"gradient {path}")
        gradients[side] = np.load(path).astype(np.float64)
    ours = gradients.pop("ours")
    return {side: float(np.linalg.norm(ours - one) / np.linalg.norm(one)) for side, one in gradients.items()}


def environment(threads: int, home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def _prepare(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.online_prepare", str(folder / "setting.json")],
        cwd=ROOT,
        env=environment(1, folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"bench.online_prepare failed:\n{done.stderr[-6000:]}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.online", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="MODEL:LOSS:BETA")
    parser.add_argument("--prompts", type=int, default=None, help="prompts of a batch; 4 for 7m, 1 for 59m")
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs=2, default=[512, 64], metavar=("PROMPT", "COMPLETION"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=["ours", "trl"], choices=("ours", "padded", "trl"))
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
