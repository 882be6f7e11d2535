"""The weight of the KL follows its target, step by step, with a state that a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from align.shaping import Batch, make, run
from align.shaping.controllers import adapted
from tests.shaping.batches import batch

KEY = "kl_in_reward.beta"


def rollouts(kl: float, state: dict[str, Any] | None = None) -> Batch:
    """Four answers of three tokens whose log-ratios sum to `kl` on average."""
    ratios = [[kl / 3 + more] * 3 for more in (0.1, -0.1, 0.2, -0.2)]
    return batch([[1.0, 2.0], [0.0, 3.0]], log_ratio=ratios, state=state)


def test_the_rule() -> None:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)."""
    assert adapted(0.1, 6.0, 6.0, 0.5) == 0.1
    assert adapted(0.1, 6.6, 6.0, 0.5) == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    assert adapted(0.1, 600.0, 6.0, 0.5) == pytest.approx(0.1 * (1 + 0.2 * 0.5))
    assert adapted(0.1, 5.4, 6.0, 0.5) == pytest.approx(0.1 * (1 - 0.1 * 0.5))
    assert adapted(0.1, -3.0, 6.0, 1.0) == pytest.approx(0.1 * 0.8)


@pytest.mark.parametrize("id_", ["kl_in_reward", "token_returns"])
def test_beta_is_the_states_and_moves_for_the_next_step(id_: str) -> None:
    stage = make(id_, {"beta": 0.1, "target": 2.0, "horizon": 8})
    first = stage(rollouts(2.2))
    assert first.metrics["kl_beta"] == 0.1 and first.metrics["kl"] == pytest.approx(2.2)
    assert float(first.state[f"{id_}.beta"]) == pytest.approx(0.1 * (1 + 0.1 * 4 / 8))
    second = stage(rollouts(2.2, dict(first.state)))
    assert second.metrics["kl_beta"] == pytest.approx(0.105)
    charged = rollouts(2.2)
    assert charged.log_ratio is not None
    kl = charged.log_ratio.sum(1)
    paid = second.reward if id_ == "kl_in_reward" else second.advantage[:, 0]
    np.testing.assert_allclose(paid, charged.reward - 0.105 * kl, atol=1e-12)


def test_a_fixed_beta_has_no_state() -> None:
    found = make("kl_in_reward", {"beta": 0.1})(rollouts(5.0, {KEY: 0.7}))
    assert found.metrics["kl_beta"] == 0.1
    assert found.state == {KEY: np.array(0.7)}
    assert make("kl_in_reward", {"beta": 0.1})(rollouts(5.0)).state == {}


def test_it_settles_where_the_kl_is_the_target() -> None:
    """A policy whose KL is 1 / beta: from either side beta ends at 1 / target."""
    stage = make("kl_in_reward", {"beta": 0.1, "target": 4.0, "horizon": 4})
    for start in (0.02, 3.0):
        state: dict[str, Any] = {KEY: start}
        for _ in range(200):
            state = dict(stage(rollouts(1 / float(state[KEY]), state)).state)
        assert float(state[KEY]) == pytest.approx(0.25, rel=1e-6)


def test_states_of_others_are_carried_on() -> None:
    stage = make("kl_in_reward", {"beta": 0.1, "target": 4.0})
    made = replace(rollouts(1.0), state={"other": np.arange(3.0)})
    found = run([stage, make("leave_one_out", {})], made)
    assert set(found.state) == {"other", KEY}
    assert float(found.state[KEY]) < 0.1
