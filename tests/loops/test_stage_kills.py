"""`align sample`, `align judge` killed at random: the same bytes in the end, no chunk and no judgement twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(kills, tmp_path):
    chunks = 4 * kills + 4
    prompts, answers = 2 * chunks, 4 * chunks
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(tmp_path), str(kills)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"sample", "judge"}
    for command, found in report.items():
        assert found["code"] == 0, found["errors"]
        assert found["kills"] == kills, (command, found)
        assert all(found["kept"]) and len(found["kept"]) == kills, "a finished chunk is not touched again"
        assert found["same"], command
        assert found["files"] == ["key.json", "manifest.json", *(f"part-{k:06d}.parquet" for k in range(chunks))]
        assert found["rows"] == list(range(prompts)) and found["answers"] == answers
        # A kill between a chunk's rename and our note of it may hide a chunk from the log, never show it twice.
        assert len(set(found["chunks"])) == len(found["chunks"]) >= chunks - kills
    judged = report["judge"]
    assert judged["asked"] == answers
    assert 0 <= judged["asked_again"] <= kills, "of a kill at most the one request under way is paid for again"
