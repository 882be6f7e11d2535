"""A method in one file outside the package trains from a recipe and passes the battery."""

from __future__ import annotations

import json
import sys

import yaml

from align.cli.main import main
from align.testing import check_method
from align.testing.tiny import random_pairs, save_tiny

FILE = '''"""Hinge on the implicit reward, with a target margin."""

from torch import Tensor
from torch.nn.functional import relu

from align.methods import Method, method, option


@method("margin_hinge", paper="2309.06657", view="pairs", needs={"ref_logp"})
class MarginHinge(Method):
    """loss = max(0, margin - beta * (h_w - h_l)), one value per pair."""

    beta: float = option(0.1, above=0, doc="scale of the implicit reward")
    margin: float = option(1.0, at_least=0, doc="reward difference at which a pair counts as learnt")

    def loss(self, pairs) -> Tensor:
        return relu(self.margin - self.beta * pairs.delta)
'''


def test_a_method_of_at_most_40_lines_trains_and_passes_the_battery(tmp_path, monkeypatch):
    assert len(FILE.splitlines()) <= 40
    package = tmp_path / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "my_file.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    save_tiny(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_pairs(24, seed=2)))
    recipe = {
        "model": {"name": "model"},
        "method": {"name": "my_pkg.my_file:MarginHinge", "margin": 2.0},
        "data": {"train": ["rows.jsonl"]},
        "train": {
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "num_train_epochs": 3,
            "logging_steps": 1,
            "output_dir": "out",
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == 2.0  # the margin: policy and reference are equal
    assert losses[-1] < 1.9
    check_method("my_pkg.my_file:MarginHinge", model=True)
