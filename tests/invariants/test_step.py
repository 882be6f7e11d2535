"""One optimiser step of every method: exact against the golden twin, whatever the packing, budget and order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from align.methods import METHODS
from align.methods.base import Method, finish, method
from align.testing import model_battery
from align.testing.on_model import EVERYTHING, Bench
from align.testing.steps import engine_for, golden_step, packed_step, random_groups, relative_difference


@pytest.mark.parametrize("name", sorted(METHODS.entries()))
def test_every_method_passes_the_battery_on_a_model(name):
    """Golden step, packing, budget, order, back ends; stopped and resumed bit for bit."""
    problems = [str(check) for check in model_battery(name, seed=5) if not check.ok]
    assert not problems


def test_the_battery_on_a_model_catches_a_method_that_counts_by_itself():
    """A mean in place of one value per unit makes a micro-batch's size matter."""
    results = {check.name: check for check in model_battery(Averaging)}
    assert results["golden step"].ok
    assert not results["packing"].ok


@method("averaging", view="pairs")
class Averaging(Method):
    """What a method must not do."""

    def loss(self, pairs):
        mean = (pairs.rejected.mean_logp - pairs.chosen.mean_logp).mean()
        return mean.expand(len(pairs))


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def start(name: str) -> tuple[Method, Any, Any, list]:
    bench = Bench(METHODS.get(name)())
    return bench.method, bench.roles, bench.reference, bench.groups


def test_kto_in_four_micro_batches_equals_one(accelerator):
    method, roles, reference, groups = start("kto")
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


def test_a_state_is_carried_from_step_to_step(accelerator):
    method, roles, reference, groups = start("bco")
    engine = engine_for(method, roles, reference, 60)
    _, _, state = packed_step(engine, accelerator, groups)
    _, second, later = packed_step(engine, accelerator, random_groups("singles", 7, seed=8), state)
    assert any(not torch.equal(state[key], later[key]) for key in state)
    _, wanted = golden_step(method, roles, reference, random_groups("singles", 7, seed=8), state)
    assert relative_difference(second, wanted) <= 1e-5


def test_weights_multiply_and_never_count(accelerator):
    """Doubling one pair's weight adds exactly that pair's gradient once more; the divisor stays."""
    method, roles, reference, groups = start("dpo")
    engine = engine_for(method, roles, reference, 60)
    base = [replace(g, preferences=(replace(g.preferences[0], weight=1.0),)) for g in groups]
    heavy = [replace(base[0], preferences=(replace(base[0].preferences[0], weight=2.0),)), *base[1:]]
    _, plain, _ = packed_step(engine, accelerator, base)
    _, weighted, _ = packed_step(engine, accelerator, heavy)
    _, alone, _ = packed_step(engine, accelerator, base[:1])
    wanted = {name: plain[name] + alone[name] / len(base) for name in plain}
    assert relative_difference(weighted, wanted) <= 1e-5


def test_dropout_of_an_adapter_falls_alike_in_both_passes(accelerator):
    """With dropout, two passes over four micro-batches have the gradient of one pass over what they drew."""
    from peft import LoraConfig, get_peft_model

    from align.testing.tiny import tiny_model
    from align.trainers.roles import RoleModule

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    roles = RoleModule({"policy": get_peft_model(tiny_model(), config)}).train()
    groups = random_groups("singles", 8, seed=9)
    engine = engine_for(METHODS.get("kto")(), roles, tiny_model(seed=3).eval().requires_grad_(False), 60)
    assert len(engine.share(engine.ready(groups, 5)).micros) > 2
    torch.manual_seed(1)
    _, found, _ = packed_step(engine, accelerator, groups, seed=5)
    share = engine.share(engine.ready(groups, 5))
    torch.manual_seed(1)
    parts = [engine.outputs(micro) for micro in share.micros]  # one pass, all graphs alive
    view = engine.view(share.groups, joined(engine, share, parts), {}, 5)
    finish(engine.method.loss(view), view).total().backward()
    wanted = {name: p.grad for name, p in roles.named_parameters() if p.grad is not None}
    assert relative_difference(found, wanted) <= 1e-5


def joined(engine, share, parts):
    """Outputs of all micro-batches in the order of the batch, with their gradients."""
    found = {}
    for name in engine.needed.outputs:
        table = torch.zeros(share.completions, share.width)
        for micro, part in zip(share.micros, parts, strict=True):
            table = table.index_copy(
                0, micro.rows, torch.nn.functional.pad(part[name], (0, share.width - part[name].shape[1]))
            )
        found[name] = table
    return found
