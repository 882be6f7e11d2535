"""Chunks on disk: whole or not there, of one key, never done twice."""

from __future__ import annotations

import json

import pytest

from align.core.chunks import Chunks
from align.core.errors import CheckpointError, ConfigError

KEY = {"model": "m", "seed": 0}


def rows(chunk, items):
    return [{"chunk": chunk, "item": item, "text": f"\u2028 line\n{item}"} for item in items]


def fill(chunks, only=None):
    for chunk in chunks.missing:
        if only is None or chunk in only:
            chunks.write(chunk, rows(chunk, chunks.items(chunk)))


def test_chunks_come_back_in_order_and_assemble(tmp_path):
    chunks = Chunks(tmp_path / "work", KEY, total=7, size=3)
    assert len(chunks) == 3
    assert [list(chunks.items(chunk)) for chunk in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    fill(chunks, {2, 0})
    again = Chunks(tmp_path / "work", dict(reversed(KEY.items())), total=7, size=3)
    assert (again.finished, again.missing) == ([0, 2], [1])
    with pytest.raises(CheckpointError, match="1 of 3 chunks are missing"):
        again.assemble(tmp_path / "out.jsonl")
    with pytest.raises(CheckpointError, match="finished already"):
        again.write(0, [])
    fill(again)
    wanted = [row for chunk in range(3) for row in rows(chunk, again.items(chunk))]
    assert list(again.rows()) == wanted
    assert not again.assembled(tmp_path / "out.jsonl")
    again.assemble(tmp_path / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()] == wanted
    assert again.assembled(tmp_path / "out.jsonl")
    assert Chunks(tmp_path / "work", KEY, total=7, size=3).assembled(tmp_path / "out.jsonl")
    assert not list((tmp_path / "work").glob("0*.jsonl"))
    (tmp_path / "out.jsonl").write_text("changed")
    assert not again.assembled(tmp_path / "out.jsonl")


def test_another_key_is_refused_with_what_changed_and_restart_throws_it_away(tmp_path):
    fill(Chunks(tmp_path / "work", KEY, total=4, size=2))
    for key, total, size, says in (
        ({**KEY, "seed": 1}, 4, 2, "`seed` was 0, is 1"),
        ({"model": "m"}, 4, 2, "`seed` was 0, is null"),
        (KEY, 5, 2, "`total` was 4, is 5"),
        (KEY, 4, 1, "`chunk_size` was 2, is 1"),
    ):
        with pytest.raises(CheckpointError, match=says):
            Chunks(tmp_path / "work", key, total, size)
    assert Chunks(tmp_path / "work", KEY, 4, 2).missing == []
    assert Chunks(tmp_path / "work", KEY, 4, 2, restart=True).missing == [], "the same work is kept"
    assert Chunks(tmp_path / "work", {**KEY, "seed": 1}, 4, 2, restart=True).missing == [0, 1]


def test_damage_and_strangers_are_refused(tmp_path):
    chunks = Chunks(tmp_path / "work", KEY, total=4, size=2)
    fill(chunks)
    file = tmp_path / "work" / "000001.jsonl"
    whole = file.read_bytes()
    for content in (whole[:-5], whole.replace(b'"rows": 2', b'"rows": 3'), b"", whole + whole, b"no json\n"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be used"):
            chunks.assemble(tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()
    other = Chunks(tmp_path / "other", {**KEY, "seed": 1}, total=4, size=2)
    other.write(1, [])
    file.write_bytes((tmp_path / "other" / "000001.jsonl").read_bytes())  # a chunk of another key
    with pytest.raises(CheckpointError, match="cannot be used"):
        chunks.read(1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="holds other things"):
        Chunks(tmp_path / "mine", KEY, 4, 2, restart=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(ConfigError, match="chunk size is 0"):
        Chunks(tmp_path / "x", KEY, 4, 0)


def test_a_killed_write_leaves_no_chunk_and_half_a_surrogate_is_written(tmp_path):
    chunks = Chunks(tmp_path / "work", KEY, total=2, size=2)
    (tmp_path / "work" / ".000000.jsonl.tmp-0123456789ab").write_text("half of a")
    again = Chunks(tmp_path / "work", KEY, total=2, size=2)
    assert again.missing == [0]
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["key.json"]
    chunks.write(0, [{"text": "\ud800"}])
    assert chunks.read(0) == [{"text": "\ud800"}]
