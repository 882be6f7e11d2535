"""`align train`, killed at random moments, ends with the bytes of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipe.small import small_run

KILLS, STEPS = 5, 60


def start(folder: Path) -> subprocess.Popen[bytes]:
    words = ["train.save_steps=4", "train.logging_steps=1", "eval.every=10"]
    command = [sys.executable, "-m", "align", "train", str(folder / "recipe.yaml"), *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)


def steps_logged(folder: Path) -> int:
    log = folder / "run" / "log.jsonl"
    return sum(b'"loss"' in line for line in log.read_bytes().splitlines()) if log.exists() else 0


def logged(folder: Path) -> list[dict]:
    """What does not depend on the clock."""
    timed = {"units_per_second", "eval_runtime"}
    lines = (json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "train_runtime" not in line]


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(time.time_ns())
    for name in ("whole", "killed"):
        small_run(tmp_path / name, steps=STEPS)
    whole = start(tmp_path / "whole")
    assert whole.wait(240) == 0
    moments = []
    for number in range(KILLS):
        run = start(tmp_path / "killed")
        goal = (number + 1) * STEPS // (KILLS + 1) + rng.randrange(-4, 5)
        while steps_logged(tmp_path / "killed") < goal and run.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)  # anywhere in a step, or while a checkpoint is written
        assert run.poll() is None, "it ended before it could be killed"
        run.send_signal(signal.SIGKILL)
        run.wait(30)
        moments.append(steps_logged(tmp_path / "killed"))
    last = start(tmp_path / "killed")
    _, said = last.communicate(timeout=240)
    assert last.returncode == 0, said.decode()[-2000:]
    print(f"killed after steps {moments}")
    for name in ("policy/model.safetensors", "checkpoint-60/policy/model.safetensors"):
        first, second = ((tmp_path / run / "run" / name).read_bytes() for run in ("whole", "killed"))
        assert first == second, name
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
