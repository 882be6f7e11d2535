"""Faults planted in the methods are caught: some files in the fast suite, all in the slow one."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from align.core.registry import METHODS
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.operators import Mutant, Source
from tests.mutation.runner import Result, run, sources

CAUGHT = 0.95
EQUIVALENT_AT_MOST = 0.05
SAMPLED_FILES, SAMPLED_MUTANTS = 5, 24


def by_hash(name: str) -> str:
    """An order that has nothing to do with names and changes little when one is added."""
    return hashlib.sha256(name.encode()).hexdigest()


def sample() -> list[tuple[Source, Mutant]]:
    """Some mutants of some methods."""
    files = {entry.module.rpartition(".")[2] for entry in METHODS.entries().values()}
    some = sources(sorted(files, key=by_hash)[:SAMPLED_FILES])
    return [(one, m) for one in some for m in sorted(one.mutants, key=lambda m: by_hash(m.key))[:SAMPLED_MUTANTS]]


def mentions(names: set[str]) -> Callable[[pytest.Item], bool]:
    """Tests whose id, function or class writes one of the names."""
    word = re.compile("|".join(rf"(?<![a-z0-9_])({re.escape(name)})(?![a-z0-9_])" for name in sorted(names)))

    @functools.cache
    def written(where: Any) -> bool:
        return bool(word.search(inspect.getsource(where)))

    def keep(item: pytest.Item) -> bool:
        where = getattr(item, "cls", None) or getattr(item, "function", None)
        return bool(word.search(item.nodeid.partition("::")[2])) or (where is not None and written(where))

    return keep


def check(result: Result) -> None:
    assert not result.failing, "these fail without a fault"
    assert not result.uncollected
    assert not [mutant.key for mutant in result.wrongly_listed], "listed as equivalent, and caught"
    survived = "\n".join(f"{m.module}:{m.line}: {m.key}" for m in result.survived)
    assert result.share() >= CAUGHT, survived


def test_faults_in_a_sample_of_methods_are_caught() -> None:
    chosen = sample()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(chosen, keep=mentions({source.name for source, _ in chosen}))
    assert len(chosen) - len(result.broken) > 50
    check(result)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_faults_in_all_methods_are_caught() -> None:
    result = run([(source, mutant) for source in sources() for mutant in source.mutants])
    check(result)
    for module, numbers in result.by_module().items():
        assert result.share(module) >= 0.8, (module, numbers["survivors"])


def test_equivalent_mutants_are_few_exist_and_have_a_reason() -> None:
    keys = {mutant.key for source in sources() for mutant in source.mutants}
    assert not set(EQUIVALENT) - keys, "no such mutants any more"
    assert len(EQUIVALENT) <= EQUIVALENT_AT_MOST * len(keys)
    assert all(len(reason.split()) > 3 for reason in EQUIVALENT.values())


def test_without_tests_everything_survives() -> None:
    (source,) = sources(["dpo"])
    result = run([(source, mutant) for mutant in source.mutants], keep=lambda item: False)
    assert len(result.survived) == len(source.mutants)
    assert result.share() == 0


def test_a_test_that_fails_by_itself_catches_nothing_and_is_named() -> None:
    (source,) = sources(["dpo"])
    inside = [(source, mutant) for mutant in source.mutants if mutant.place == "DPO.loss"][:1]

    def only(item: pytest.Item) -> bool:
        if item.name != "test_battery[dpo]":
            return False
        item.obj = fails  # type: ignore[attr-defined]
        return True

    def fails(name: str) -> None:
        raise AssertionError

    result = run(inside, keep=only)
    assert result.failing == ["tests/invariants/test_battery.py::test_battery[dpo]"]
    assert len(result.survived) == 1
