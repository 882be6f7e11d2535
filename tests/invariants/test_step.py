"""One optimiser step of every method: exact against the golden twin, whatever the packing, budget and order."""

from __future__ import annotations

import random

import pytest
import torch
from accelerate import Accelerator

from align.methods import METHODS
from align.methods.base import Method
from align.scoring.assemble import columns_needed
from align.testing.steps import engine_for, golden_step, packed_step, random_groups, relative_difference, role_module
from align.testing.tiny import tiny_model

BUILT_IN = sorted(METHODS.entries())
EVERYTHING = 1 << 20


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def models():
    """A policy, and a reference that differs from it."""
    return tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2).eval().requires_grad_(False)


def start(name, models) -> tuple[Method, object, object, list]:
    method = METHODS.get(name)()
    needed = columns_needed(method)
    reference = models[1] if needed.reference or needed.live_reference else None
    return method, role_module(models[0], method), reference, random_groups(method.view, 11, seed=3)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_packed_step_is_the_golden_step(name, models, accelerator):
    method, roles, reference, groups = start(name, models)
    wanted_loss, wanted = golden_step(method, roles, reference, groups, seed=5)
    assert any(float(g.norm()) > 1e-3 for g in wanted.values())
    loss, found, _ = packed_step(engine_for(method, roles, reference, EVERYTHING), accelerator, groups, seed=5)
    assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6)
    assert relative_difference(found, wanted) <= 1e-5


@pytest.mark.parametrize("name", BUILT_IN)
def test_budget_order_and_back_end_do_not_matter(name, models, accelerator):
    method, roles, reference, groups = start(name, models)
    loss, wanted, state = packed_step(engine_for(method, roles, reference, EVERYTHING), accelerator, groups, seed=5)
    shuffled = list(groups)
    random.Random(0).shuffle(shuffled)
    cases = [
        ("tree", 60, groups),
        ("tree", 1, groups),
        ("tree", 60, shuffled),
        ("sdpa", 60, groups),
        ("padded", 90, groups),
    ]
    for backend, budget, order in cases:
        engine = engine_for(method, roles, reference, budget, backend)
        assert budget == EVERYTHING or len(engine.share(engine.ready(order, 5)).micros) > 1
        other_loss, found, other_state = packed_step(engine, accelerator, order, seed=5)
        assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6), (backend, budget)
        assert relative_difference(found, wanted) <= 1e-5, (backend, budget)
        for key, value in state.items():
            torch.testing.assert_close(other_state[key], value, rtol=1e-5, atol=1e-6)


def test_kto_in_four_micro_batches_equals_one(models, accelerator):
    method, roles, reference, groups = start("kto", models)
    groups = random_groups("singles", 8, seed=9)
    whole = engine_for(method, roles, reference, EVERYTHING)
    cut = next(
        engine
        for budget in range(300, 10, -1)
        if len((engine := engine_for(method, roles, reference, budget)).share(engine.ready(groups, 5)).micros) == 4
    )
    loss, wanted, _ = packed_step(whole, accelerator, groups, seed=5)
    other, found, _ = packed_step(cut, accelerator, groups, seed=5)
    assert abs(other - loss) <= 1e-6
    assert relative_difference(found, wanted) <= 1e-6


def test_a_state_is_carried_from_step_to_step(models, accelerator):
    method, roles, reference, groups = start("bco", models)
    engine = engine_for(method, roles, reference, 60)
    _, _, state = packed_step(engine, accelerator, groups)
    _, second, later = packed_step(engine, accelerator, random_groups("singles", 7, seed=8), state)
    assert any(not torch.equal(state[key], later[key]) for key in state)
    _, wanted = golden_step(method, roles, reference, random_groups("singles", 7, seed=8), state)
    assert relative_difference(second, wanted) <= 1e-5


def test_weights_multiply_and_never_count(models, accelerator):
    """Doubling one pair's weight adds exactly that pair's gradient once more; the divisor stays."""
    from dataclasses import replace

    method, roles, reference, groups = start("dpo", models)
    engine = engine_for(method, roles, reference, 60)
    base = [replace(g, preferences=(replace(g.preferences[0], weight=1.0),)) for g in groups]
    heavy = [replace(base[0], preferences=(replace(base[0].preferences[0], weight=2.0),)), *base[1:]]
    _, plain, _ = packed_step(engine, accelerator, base)
    _, weighted, _ = packed_step(engine, accelerator, heavy)
    _, alone, _ = packed_step(engine, accelerator, base[:1])
    wanted = {name: plain[name] + alone[name] / len(base) for name in plain}
    assert relative_difference(weighted, wanted) <= 1e-5
