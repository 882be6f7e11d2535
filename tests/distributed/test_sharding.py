"""Ten steps on two ranks of unequal lengths, DDP and ZeRO-3, have the gradients of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from align.testing.steps import whole_difference
from align.testing.tiny import random_pairs, save_tiny

HERE = Path(__file__).parent
METHODS = ("dpo", "dro_v", "kto")
STEPS = 10


def launch(command, folder, **environment):
    places = (str(folder / "model"), str(folder / "rows.jsonl"))
    done = subprocess.run(
        [*command, str(HERE / "train_worker.py"), *places, ",".join(METHODS), str(folder / environment["KIND"])],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {method: load_file(folder / environment["KIND"] / f"{method}.safetensors") for method in METHODS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    save_tiny(folder / "model", "qwen3")
    rows = random_pairs(28, seed=3)
    for number, row in enumerate(rows):
        row["chosen"] += " and so on" * (number % 5)  # lengths that no even split balances
    labelled = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen", "reward": float(key == "chosen")}
        for row in rows
        for key in ("chosen", "rejected")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (folder / "rows.jsonl").write_text((folder / "pairs.jsonl").read_text())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(HERE / "zero3.yaml")]
    return {
        "one": launch([sys.executable], folder, KIND="one"),
        "ddp": launch(torchrun, folder, KIND="ddp"),
        "zero3": launch(accelerate, folder, KIND="zero3", DS_ACCELERATOR="cpu"),
    }


@pytest.mark.parametrize("kind", ["ddp", "zero3"])
@pytest.mark.parametrize("method", METHODS)
def test_each_step_has_the_gradient_of_one_process(runs, kind, method):
    one, many = runs["one"][method], runs[kind][method]
    assert one["world"].tolist() == [1, 0]
    assert many["world"].tolist() == [2, int(kind == "zero3")]
    assert abs(one["losses"] - many["losses"]).max() <= 1e-5
    for step in range(STEPS):
        prefix = f"{step}."
        wanted = {k: v for k, v in one.items() if k.startswith(prefix)}
        found = {k: v for k, v in many.items() if k.startswith(prefix)}
        assert wanted
        if method == "dro_v":
            assert any(".value." in key for key in wanted)
        assert whole_difference(found, wanted) <= 1e-5, step
