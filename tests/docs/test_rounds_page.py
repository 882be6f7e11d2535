"""The pages about loops: their recipes load, and the table names every preset as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.core.registry import LOOPS
from align.recipe import loop
from docs.hooks.pages import generated
from tests.docs.pages import blocks


def test_recipes_of_loops_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [block for block in blocks("yaml") if block.title == 'title="loop.yaml"']
    assert len(shown) >= 3
    found = {}
    for block in shown:
        Path("loop.yaml").write_text(block.text, encoding="utf-8")
        made = loop.read("loop.yaml")
        found[made.loop.preset] = made
    assert set(found) == {"iterative_dpo", "spin", "self_rewarding"}
    assert found["spin"].loop.earlier == [1.0] and found["spin"].loop.rounds == 3
    assert found["self_rewarding"].loop.base == "runs/sft/policy"


def test_the_table_has_a_line_for_each_loop() -> None:
    lines = generated("loops", None).splitlines()
    assert len(lines) == 2 + len(LOOPS.entries())
    dno = next(line for line in lines if line.startswith("| `dno_prct`"))
    assert "30%, 15%" in dno and "`margin`" in dno and "previous" in dno
    options = generated("loop", "options")
    for section in ("`loop`", "`loop.evaluation`", "`loop.accept`"):
        assert f"## {section}" in options
