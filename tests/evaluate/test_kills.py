"""SIGKILL at random moments: the rerun ends with the same bytes and redoes no finished chunk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("runs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_evaluations_end_with_the_same_bytes(tmp_path, runs):
    """Each run is killed twice, then left to end."""
    command = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(tmp_path), str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stderr[-2000:] + log[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["whole_calls"] == 2 * 96  # each completion is judged once
    assert sum(case["killed"] for case in report["cases"]) >= 2 * runs - 1
    # Some runs were killed between their first chunk and their last, or nothing was resumed.
    assert sum(0 < count < 24 for case in report["cases"] for count in case["finished_before"]) >= runs
    for case in report["cases"]:
        assert case["code"] == 0 and case["same"] and case["redone"] == 0 and not case["leftovers"], (case, log[-2000:])
