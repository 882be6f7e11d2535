"""Two processes give the gradient of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.methods import METHODS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One launch for all methods: importing costs more than the steps."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "step_worker.py"), str(out)], env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


STEEP = {"discopop": 1e-4}
"""Its slope changes by up to 1 / tau^2 = 400 a unit of the margin: the last digit of a float32 margin is 1e-5 of it."""


@pytest.mark.parametrize("case", ["even", "one_micro", "fewer_groups_than_ranks"])
@pytest.mark.parametrize("name", sorted(METHODS.entries()))
def test_two_ranks_give_the_gradient_of_one(two_ranks, name, case):
    assert two_ranks["world"] == 2
    first, second = (rank[f"{name}/{case}"] for rank in two_ranks["ranks"])
    for found in (first, second):
        assert found["gradient"] <= STEEP.get(name, 1e-5)
        assert found["loss"] <= 1e-5
    assert first["state"] == second["state"]
