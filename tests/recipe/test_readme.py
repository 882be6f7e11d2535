"""The README's recipe and Python are run, as far as they go without its model."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from align.core.registry import METHODS
from align.recipe import schema


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_recipe_resolves(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "held_out.jsonl"):
        Path(name).write_text("")
    (text,) = blocks(root, "yaml")
    Path("dpo.yaml").write_text(text)
    commands = [line.split() for line in "".join(blocks(root, "sh")).splitlines() if " train dpo.yaml" in line]
    assert len(commands) == 3
    for words in commands:
        recipe = schema.load("dpo.yaml", words[words.index("dpo.yaml") + 1 :])
        assert recipe.method.name == "dpo"
    assert recipe.train.seed == 7


def test_the_python_fits_the_trainer(root: Path) -> None:
    from align.trainers import AlignConfig, PreferenceTrainer

    (code,) = blocks(root, "python")
    calls = {
        node.func.id: {word.arg for word in node.keywords}
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert set(calls) == {"AlignConfig", "PreferenceTrainer"}
    assert calls["PreferenceTrainer"] <= set(inspect.signature(PreferenceTrainer).parameters)
    assert next(iter(inspect.signature(AlignConfig).parameters)) == "output_dir"


def test_the_methods_named_are_those_there(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", text.split("* Methods:")[1].split(";")[0])
    assert sorted(listed) == sorted(METHODS.entries())
