"""SIGKILL at random moments, while saving too: the resumed run ends with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 10


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(folder), str(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def test_runs_were_killed_and_some_while_saving(report):
    assert report["kills"] >= KILLS
    assert report["while_saving"] >= 1


def test_every_resumed_run_ends_with_the_same_bytes(report):
    for case in report["cases"]:
        assert case["code"] == 0, case
        assert case["same_weights"], case


def test_every_resumed_run_logs_the_same_numbers(report):
    for case in report["cases"]:
        assert case["same_log"], case
