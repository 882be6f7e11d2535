"""Users' mistakes, one table: each gives a clear error and exit code 2, or a counted rejection. Never a traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from align.testing.tiny import random_pairs, save_tiny
from tests.recipe.mistakes import CASES, Case

PLACE = re.compile(r"^error: (\S+:\d+|argument .*|command line|/\S+|\S+\.jsonl\S*): ")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model that the cases copy or point at."""
    return save_tiny(tmp_path_factory.mktemp("made") / "model")


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_mistake_gives_a_clear_error(name, made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, words = CASES[name]
    case = Case(tmp_path, made)
    change(case)
    capsys.readouterr()
    assert case.run() == 2
    said = capsys.readouterr().err
    shown = said[said.index("error: ") :]
    assert "Traceback" not in said
    for word in words:
        assert word in shown, shown
    assert PLACE.match(shown), shown
    assert "\n  mend: " in shown or "\n  why: " in shown, shown
    assert len(shown) < 2500


def test_there_are_at_least_45_cases():
    assert len(CASES) >= 45


def test_bad_rows_below_the_limit_are_counted_and_nothing_is_lost(made, tmp_path, capsys):
    case = Case(tmp_path, made)
    case.rows = [dict(row) for row in random_pairs(40, seed=5)]
    case.rows[3]["chosen"] = ""
    case.rows[7]["rejected"] = case.rows[7]["chosen"]
    case.rows[9]["prompt"] = case.rows[9]["prompt"] * 40
    case.recipe["data"]["max_bad_fraction"] = 0.1
    case.recipe["train"].pop("max_steps")
    case.recipe["train"]["save_steps"] = 10
    assert case.run() == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [4, 8, 10]
    manifest = json.loads((tmp_path / "out" / "checkpoint-10" / "manifest.json").read_text())
    train = manifest["info"]["data"]["train"]
    assert train["rows"] == 40 == train["kept"] + train["bad"] + train["dropped"]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(made, tmp_path, capsys, monkeypatch):
    """The second save fails for want of space; the first one stands and the run resumes from it."""
    import errno

    from align.trainers import checkpoints

    case = Case(tmp_path, made)
    real, calls = checkpoints.save_state, []

    def full(folder, *rest):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        return real(folder, *rest)

    monkeypatch.setattr(checkpoints, "save_state", full)
    assert case.run() == 2
    said = capsys.readouterr().err
    assert "space" in said and "checkpoint-2" in said and "Traceback" not in said
    assert sorted(p.name for p in (tmp_path / "out").glob("*checkpoint*")) == ["checkpoint-1"]
    assert case.run() == 0
