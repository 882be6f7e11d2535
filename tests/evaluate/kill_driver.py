"""Kills `align evaluate` at random moments, runs it again, and compares what it ends with, byte for byte.

Run as a script: it imports torch once and forks, so a run costs its sampling and no start-up.
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

import peft  # noqa: E402, F401

import align.evaluate  # noqa: E402, F401
from align.cli.main import main as command  # noqa: E402
from align.testing.tiny import random_pairs, save_tiny  # noqa: E402

PROMPTS, CHUNK = 96, 4
REWARD = '''
import os

def reward(prompts, completions, number, **columns):
    """Counts its calls: one line a completion."""
    with open(os.environ["CALLS"], "a") as file:
        file.write("".join(f"{one}\\n" for one in number))
    return [float(len(text) % 7) for text in completions]
'''


def child(folder: Path, out: Path, calls: Path) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ["CALLS"] = str(calls)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        arguments = ["evaluate", "policy", "--against", "start", "--data", "rows.jsonl", "--reward", "counted:reward"]
        arguments += ["--max-new-tokens", "16", "--chunk-size", str(CHUNK), "--output", str(out)]
        code = 1
        try:
            code = command(
                [str(folder / one) if one in ("policy", "start", "rows.jsonl") else one for one in arguments]
            )
        finally:
            os._exit(code)
    return pid


def finish(*arguments: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child(*arguments), 0)[1])


def result(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("result.json", "completions.jsonl")}


def killed(chunks: int, delay: float, folder: Path, out: Path, calls: Path) -> bool:
    """Kill a run `delay` seconds after so many of its chunks are finished; true where it had not ended before."""
    pid = child(folder, out, calls)
    while len(finished(out)) < chunks:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(delay)
    if os.waitpid(pid, os.WNOHANG)[0]:
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def finished(out: Path) -> set[int]:
    return {int(file.stem) for file in (out / "work").glob("0*.jsonl")}


def main(folder: Path, kills: int) -> None:
    rng = random.Random(0)
    save_tiny(folder / "start", "qwen3", seed=0)
    save_tiny(folder / "policy", "qwen3", seed=1)
    (folder / "counted.py").write_text(REWARD)
    sys.path.insert(0, str(folder))
    rows = [row | {"number": number} for number, row in enumerate(random_pairs(PROMPTS, seed=1))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert finish(folder, folder / "warm", folder / "warm-calls") == 0
    start = time.monotonic()
    assert finish(folder, folder / "whole", folder / "whole-calls") == 0
    chunk_seconds = (time.monotonic() - start) * CHUNK / PROMPTS
    wanted = result(folder / "whole")
    report = {"whole_calls": len((folder / "whole-calls").read_text().split()), "cases": []}
    for number in range(kills):
        out, case = folder / f"killed-{number}", {"killed": 0, "finished_before": [], "redone": 0}
        done: set[int] = set()
        for part in range(2):
            calls = folder / f"calls-{number}-{part}"
            calls.touch()
            moment = rng.randrange(len(done), len(done) + 8)
            case["killed"] += killed(moment, rng.uniform(0, 1.5) * chunk_seconds, folder, out, calls)
            case["redone"] += sum(int(one) // CHUNK in done for one in calls.read_text().split())
            done = finished(out)
            case["finished_before"].append(len(done))
        calls = folder / f"calls-{number}-last"
        calls.touch()
        case["code"] = finish(folder, out, calls)
        case["redone"] += sum(int(one) // CHUNK in done for one in calls.read_text().split())
        case["same"] = case["code"] == 0 and result(out) == wanted
        case["leftovers"] = [path.name for path in out.rglob(".*")]
        report["cases"].append(case)
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
