"""Neither memory nor work before the first step grows with the data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL, LARGE, BATCH = 2_000, 200_000, 16
MIB = 2**20


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    driver = Path(__file__).with_name("stream_driver.py")
    command = [sys.executable, str(driver), str(folder), f"{SMALL},{LARGE}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    return {size: json.loads((folder / str(size) / "report.json").read_text()) for size in (SMALL, LARGE)}


def test_rows_parsed_before_the_first_step(reports):
    large = reports[LARGE]["data"]["train"]
    assert large["rows"] == LARGE
    assert 0 < large["rows_parsed_before_first_step"] <= 10_000 + 2 * BATCH


def test_memory_at_step_one(reports):
    assert reports[LARGE]["memory"] - reports[SMALL]["memory"] <= 64 * MIB
