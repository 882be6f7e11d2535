"""The YAML of recipes: strict scalars, lines that are right, overrides laid over."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from align.core.errors import ConfigError, ErrorList
from align.recipe.document import parse, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.e-6", 1e-6),
        ("-1E3", -1000.0),
        (".5", 0.5),
        ("10", 10),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("'1'", "1"),
        ("-.inf", -math.inf),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = parse(text, "x").plain()
    assert found == value
    assert type(found) is type(value)


def test_lines_are_those_of_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("# a comment\nmodel:\n\n  name: x\n  peft:\n    r: 8\ndata: {train: [a,\n  b]}\n")
    root = read(path)
    model = root.value["model"]
    assert model.where == f"{path}:2"
    assert model.value["name"].where == f"{path}:4"
    assert model.value["peft"].value["r"].where == f"{path}:6"
    assert root.value["data"].value["train"].value[1].where == f"{path}:8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"x:2: `a` is there twice"),
        ("a: {b: 1, b: 2}", r"x:1: `b` is there twice"),
        ("a: [1\nb: 2", r"x:2: is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !mine 3", "tag"),
        ("a: !!int x", "is no int"),
        ("[1]: 2", "a key is one word"),
        ("base: &b {x: 1}\na: {<<: *b}", r"x:2: a key is one word"),
        ("a: &a [*a]", "contains itself"),
        ("a: 1\n--- \nb: 2", "not YAML"),
        ("a: \t'", "not YAML"),
        ("a: \x01", "not YAML"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, "x")


def test_aliases_stand_for_their_values() -> None:
    assert parse("a: &r {x: 1}\nb: *r", "x").plain() == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.b=2"], {"a": {"b": 2, "c": [1, 2]}}),
        (["--a.b=2"], {"a": {"b": 2, "c": [1, 2]}}),
        (["--a.b", "2"], {"a": {"b": 2, "c": [1, 2]}}),
        (["--a.b", "-1e-3"], {"a": {"b": -1e-3, "c": [1, 2]}}),
        (["a.b=x=y"], {"a": {"b": "x=y", "c": [1, 2]}}),
        (["a.c.1=9"], {"a": {"b": 1, "c": [1, 9]}}),
        (["a.c=[]", "a.d.e=true"], {"a": {"b": 1, "c": [], "d": {"e": True}}}),
        (["a.b.x=3"], {"a": {"b": {"x": 3}, "c": [1, 2]}}),
        (["a.b=1", "a.b=5"], {"a": {"b": 5, "c": [1, 2]}}),
        (["a.b="], {"a": {"b": None, "c": [1, 2]}}),
    ],
)
def test_overrides(tmp_path: Path, words: list[str], expected: object) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: {b: 1, c: [1, 2]}")
    assert read(path, words).plain() == expected


def test_faulty_overrides_come_together(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: {c: [1, 2]}")
    with pytest.raises(ErrorList) as caught:
        read(path, ["nonsense", "a.c.2=1", "a..b=1", "a.b=[", "=3", "--x"])
    assert len(caught.value.errors) == 6


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), (b"- a", "mapping")]
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(path)
