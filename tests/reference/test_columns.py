"""Frozen policies as columns: every kind gives the same numbers, and only what may be reused is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.core.errors import CheckpointError, ConfigError, DataError
from align.reference.columns import AdapterOff, Cached, Column, Ema, Frozen, supplied
from align.reference.records import SUFFIX
from align.reference.store import LogpStore, MemoryStore, store_key
from align.reference.weights_hash import module_hash
from align.scoring.backends import Backend, prepare
from align.scoring.engine import score
from align.scoring.layout import Tree
from align.testing.tiny import tiny_model

NEEDS = frozenset({"ref_logp"})


def random_trees(count: int = 4, seed: int = 0) -> list[Tree]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        branches = tuple(random.integers(3, 300, random.integers(1, 9)) for _ in range(random.integers(1, 4)))
        scored = tuple(random.random(len(branch)) < 0.8 for branch in branches)
        found.append(Tree(random.integers(3, 300, random.integers(1, 9)), branches, scored))
    return found


class Counting:
    """A live column that counts its calls and the trees it was given."""

    def __init__(self, column: Frozen) -> None:
        self.inner, self.calls, self.trees = column, 0, 0
        self.name, self.model, self.context, self.check = column.name, column.model, column.context, column.check

    def column(self, packed: Any, trees: Sequence[Tree], needs: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        self.trees += len(trees)
        return self.inner.column(packed, trees, needs)


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def backend(policy: Any) -> Backend:
    return prepare(policy, "tree")


def read(column: Column, backend: Backend, trees: list[Tree]) -> torch.Tensor:
    return column.column(backend.pack(trees), trees, NEEDS)["ref_logp"]


def key_of(model: Any, **changes: Any) -> Any:
    given: dict[str, Any] = {"weights": module_hash(model), "dtype": "float32", "backend": "tree"}
    return store_key(**{**given, **changes})


def test_frozen_equals_the_policy_and_has_no_gradient(policy: Any, backend: Backend) -> None:
    trees = random_trees()
    frozen = Frozen(copy.deepcopy(policy).train())
    assert not any(module.training for module in frozen.model.modules())
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
    packed = backend.pack(trees)
    found = frozen.column(packed, trees, {"ref_logp", "ref_entropy", "kl_ref_policy", "logp"})
    assert set(found) == {"ref_logp", "ref_entropy"}, "what belongs to the policy's own pass is left to it"
    assert not found["ref_logp"].requires_grad
    with torch.no_grad():
        expected = score(policy, packed, {"logp", "entropy"})
    torch.testing.assert_close(found["ref_logp"], expected["logp"], rtol=0, atol=0)
    torch.testing.assert_close(found["ref_entropy"], expected["entropy"], rtol=0, atol=0)
    assert Frozen(policy, "guide").column(packed, trees, {"ref_logp"}) == {}
    policy.requires_grad_(True)


def test_frozen_is_scored_as_it_is_told(policy: Any, backend: Backend) -> None:
    frozen = Frozen(copy.deepcopy(policy), call=lambda packed, needs: {name: torch.ones(2, 3) for name in needs})
    assert read(frozen, backend, random_trees(1)).sum() == 6


def test_adapter_off_equals_a_frozen_copy_of_the_base(policy: Any, backend: Backend) -> None:
    base = copy.deepcopy(policy)
    model = get_peft_model(
        copy.deepcopy(policy),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False),
    ).train()
    mine = prepare(model, "tree", probe=False)
    trees = random_trees()
    packed = mine.pack(trees)
    off, frozen = AdapterOff(model), Frozen(base)
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    found = off.column(packed, trees, NEEDS)["ref_logp"]
    torch.testing.assert_close(found, frozen.column(packed, trees, NEEDS)["ref_logp"], rtol=0, atol=1e-6)
    with torch.no_grad():
        assert (score(model.eval(), packed)["logp"] - found).abs().max() > 1e-3, "the adapter must be at work outside"
        model.train()
    assert modes == [module.training for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]


def test_adapter_off_needs_an_adapter(policy: Any) -> None:
    with pytest.raises(ConfigError, match="needs a policy with an adapter"):
        AdapterOff(policy)


def test_cached_equals_live_and_runs_it_once(policy: Any, backend: Backend, tmp_path: Path) -> None:
    trees = random_trees(6)
    live = Counting(Frozen(copy.deepcopy(policy)))
    expected = read(live.inner, backend, trees)
    cached = Cached(LogpStore(tmp_path, key_of(policy)), live, backend.pack)
    torch.testing.assert_close(read(cached, backend, trees), expected, rtol=0, atol=0)
    assert (live.calls, live.trees) == (1, 6)
    again = read(cached, backend, trees[::-1])
    assert (live.calls, live.trees) == (1, 6)
    sizes = [len(tree.branches) for tree in trees]
    backwards = torch.cat(torch.split(expected, sizes)[::-1])
    torch.testing.assert_close(again, backwards, rtol=0, atol=0)


def test_only_what_is_missing_is_computed(policy: Any, backend: Backend, tmp_path: Path) -> None:
    trees = random_trees(6)
    live = Counting(Frozen(copy.deepcopy(policy)))
    cached = Cached(LogpStore(tmp_path, key_of(policy)), live, backend.pack)
    read(cached, backend, trees[:4])
    mixed = [trees[4], *trees[:4], trees[5]]
    found = read(cached, backend, mixed)
    assert live.trees == 6
    torch.testing.assert_close(found, read(live.inner, backend, mixed), rtol=0, atol=1e-6)


def test_a_changed_token_or_mask_is_another_entry(policy: Any, backend: Backend, tmp_path: Path) -> None:
    tree = random_trees(1)[0]
    live = Counting(Frozen(copy.deepcopy(policy)))
    cached = Cached(LogpStore(tmp_path, key_of(policy)), live, backend.pack)
    read(cached, backend, [tree])
    prompt = tree.prompt.copy()
    prompt[0] += 1
    flags = tuple(~scored for scored in tree.scored)
    for changed in (Tree(prompt, tree.branches, tree.scored), Tree(tree.prompt, tree.branches, flags)):
        found = read(cached, backend, [changed])
        torch.testing.assert_close(found, read(live.inner, backend, [changed]), rtol=0, atol=1e-6)
    assert live.calls == 3


def test_a_later_run_reads_and_another_model_does_not(policy: Any, backend: Backend, tmp_path: Path) -> None:
    """A run has a learning rate, a method, an output folder: none of them is in the key, so nothing is recomputed."""
    trees = random_trees(3)
    read(Cached(LogpStore(tmp_path, key_of(policy)), Frozen(copy.deepcopy(policy)), backend.pack), backend, trees)
    later = Counting(Frozen(copy.deepcopy(policy)))
    read(Cached(LogpStore(tmp_path, key_of(policy)), later, backend.pack), backend, trees)
    assert later.calls == 0
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        weight = next(moved.parameters()).view(-1)
        weight.view(torch.int32)[5] ^= 1
    for key in (key_of(moved), key_of(policy, dtype="bfloat16"), key_of(policy, backend="sdpa")):
        other = Counting(Frozen(copy.deepcopy(policy)))
        read(Cached(LogpStore(tmp_path, key), other, backend.pack), backend, trees)
        assert other.calls == 1


def test_a_damaged_record_is_computed_again(policy: Any, backend: Backend, tmp_path: Path) -> None:
    trees = random_trees(3)
    store = LogpStore(tmp_path, key_of(policy))
    expected = read(Cached(store, Frozen(copy.deepcopy(policy)), backend.pack), backend, trees)
    path = next(store.path.glob(f"*{SUFFIX}"))
    content = bytearray(path.read_bytes())
    content[50] ^= 0x40
    path.write_bytes(bytes(content))
    live = Counting(Frozen(copy.deepcopy(policy)))
    found = read(Cached(LogpStore(tmp_path, key_of(policy)), live, backend.pack), backend, trees)
    assert live.calls == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_ranks_run_the_live_model_together_or_not_at_all(policy: Any, backend: Backend, tmp_path: Path) -> None:
    trees = random_trees(2)
    live = Counting(Frozen(copy.deepcopy(policy)))
    cached = Cached(LogpStore(tmp_path, key_of(policy)), live, backend.pack, any_rank=lambda missing: True)
    first = read(cached, backend, trees)
    torch.testing.assert_close(read(cached, backend, trees), first, rtol=0, atol=0)
    assert live.calls == 2, "another rank lacks something, so this one takes part in its forward"


def test_a_cache_gives_log_probs_only(policy: Any, backend: Backend) -> None:
    cached = Cached(MemoryStore(), Frozen(copy.deepcopy(policy)), backend.pack)
    cached.check(NEEDS)
    for need in ("kl_ref_policy", "kl_policy_ref", "ref_entropy"):
        with pytest.raises(ConfigError, match=need):
            cached.check({"ref_logp", need})
    with pytest.raises(ConfigError, match="moving reference"):
        Cached(MemoryStore(), Ema(copy.deepcopy(policy), 0.5), backend.pack)


def test_supplied_log_probs(policy: Any, backend: Backend) -> None:
    trees = random_trees(2)
    expected = read(Frozen(copy.deepcopy(policy)), backend, trees)
    rows, numbers = [], iter(expected.numpy())
    for tree in trees:
        for ids, scored in zip(tree.branches, tree.scored, strict=True):
            rows.append((tree.prompt, ids, scored, next(numbers)[: len(ids)]))
    torch.testing.assert_close(read(Cached(supplied(rows)), backend, trees), expected, rtol=0, atol=0)
    with pytest.raises(DataError, match="1 of 3 groups have no `ref_logp`"):
        read(Cached(supplied(rows)), backend, [*trees, random_trees(1, seed=9)[0]])
    prompt, ids, scored, values = rows[0]
    with pytest.raises(DataError, match="one number per completion token"):
        supplied([(prompt, ids, scored, np.append(values, 0.0))])


def test_ema_arithmetic(policy: Any, backend: Backend) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, every second step, in float32."""
    moving, trained = copy.deepcopy(policy).to(torch.bfloat16), copy.deepcopy(policy)
    start = {name: value.float().clone() for name, value in moving.named_parameters()}
    reference = Ema(moving, 0.25, every=2)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5)
    reference.after_step(trained)
    assert all(torch.equal(value, start[name]) for name, value in reference.model.named_parameters())
    reference.after_step(torch.nn.ModuleDict({"module": trained}))
    target = dict(trained.named_parameters())
    for name, value in reference.model.named_parameters():
        torch.testing.assert_close(value, 0.25 * target[name] + 0.75 * start[name], rtol=0, atol=1e-6)
        assert not value.requires_grad
    saved = copy.deepcopy(reference.state_dict())
    resumed = Ema(copy.deepcopy(policy), 0.25, every=2)
    resumed.load_state_dict(saved)
    for one in (reference, resumed):
        one.after_step(trained)
        one.after_step(trained)
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), reference.model.parameters(), strict=True))
    trees = random_trees()
    torch.testing.assert_close(read(resumed, backend, trees), read(reference, backend, trees), rtol=0, atol=1e-5)
    assert resumed.steps == 4
    hard = Ema(copy.deepcopy(policy), 1.0)
    hard.after_step(trained)
    assert all(torch.equal(a, b) for a, b in zip(hard.model.parameters(), trained.parameters(), strict=True))


def test_ema_refuses_what_makes_no_sense(policy: Any) -> None:
    for alpha, every in ((0.0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(ConfigError):
            Ema(copy.deepcopy(policy), alpha, every)
    reference = Ema(copy.deepcopy(policy), 0.5)
    with pytest.raises(CheckpointError, match="another model"):
        reference.load_state_dict({"steps": 1, "weights": {"other": torch.zeros(1)}})
