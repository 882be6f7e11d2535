"""What of the online benchmark is arithmetic, and a whole small measurement."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import numpy as np
import pytest

from bench import online, online_prepare, online_sides

MIB = 2**20


def one(seconds: float, preparing: float, added: int, loss: float, cpu: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "preparing": preparing,
        "cpu_seconds": cpu,
        "start_rss_bytes": 100 * MIB,
        "peak_rss_bytes": (100 + added) * MIB,
        "loss": loss,
    }


def test_a_summary_takes_ratios_pass_by_pass() -> None:
    measured = {
        "ours": [one(1, 0, 10, 0.5, 2), one(2, 0, 10, 0.5, 2), one(4, 0, 30, 0.5, 2)],
        "trl": [one(6, 2, 40, 0.5, 10), one(8, 2, 40, 0.5001, 12), one(8, 4, 40, 0.5, 8)],
    }
    found = online.summary(measured, 16, {"trl": 1e-6})
    assert found["ours"]["completions_per_second"] == 8
    assert found["trl"]["added_mib"] == 40
    ratio = found["ours/trl"]
    assert ratio["speed_of_each_pass"] == [6, 4, 2]
    assert (ratio["speed"], ratio["speed_least"], ratio["cpu"]) == (4, 2, 5)
    assert ratio["speed_without_preparing"] == 3  # of 4, 3, 1
    assert ratio["memory"] == 0.25  # of 10/40, 10/40, 30/40
    assert ratio["loss_difference"] == pytest.approx(1e-4)
    assert ratio["gradient_difference"] == 1e-6


def test_rollouts_are_seeded_and_of_the_lengths_asked_for() -> None:
    made = online_prepare.rollouts(3, 5, (12, 4), vocabulary=50)
    assert made == online_prepare.rollouts(3, 5, (12, 4), vocabulary=50)
    assert made != online_prepare.rollouts(3, 5, (12, 4), vocabulary=50, seed=1)
    ids = np.array([group["completions"] for group in made])
    assert ids.shape == (3, 5, 4) and ids.min() >= 3 and ids.max() < 50
    assert np.array([group["prompt"] for group in made]).shape == (3, 12)


def test_our_side_trains_on_trls_advantages() -> None:
    """(r - mean) / (std with one degree of freedom less + 1e-4), the same for every token."""
    method = online_sides.our_method({"loss": "dapo", "beta": 0.04, "completions": 5})
    assert (method.aggregation, method.kl_estimator, method.beta) == ("tok", "k3_ratio", 0.04)
    made = online_prepare.rollouts(2, 5, (12, 4), vocabulary=50)
    for group, raw in zip(online_sides.token_groups(made, method), made, strict=True):
        rewards: Any = raw["rewards"]
        mean = sum(rewards) / 5
        std = (sum((r - mean) ** 2 for r in rewards) / 4) ** 0.5
        for completion, reward in zip(group.completions, rewards, strict=True):
            expected = np.full(4, (reward - mean) / (std + 1e-4))
            np.testing.assert_allclose(completion.columns["advantage"], expected, rtol=1e-12)


@pytest.mark.slow
def test_both_sides_have_the_same_loss_and_gradient() -> None:
    options = Namespace(prompts=2, completions=4, lengths=[48, 8], rounds=1, threads=1, sides=["ours", "padded", "trl"])
    found = online.measure(options, "7m", "dapo", 0.04)
    assert json.loads(json.dumps(found))["setting"]["prompts"] == 2
    for side in ("padded", "trl"):
        ratio = found["summary"][f"ours/{side}"]
        assert ratio["loss_difference"] < 1e-6
        assert ratio["gradient_difference"] < 1e-5
    assert abs(found["summary"]["ours"]["loss"]) > 1e-3  # the KL term keeps it from being 0
