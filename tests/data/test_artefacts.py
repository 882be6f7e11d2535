"""Artefacts: rollouts come back bit for bit, the same rows give the same bytes, and a folder says what it is."""

from __future__ import annotations

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from align.core.errors import CheckpointError
from align.data.artefacts import Artefact
from align.data.groups import RowId
from align.data.rollout_rows import SCHEMA, from_row, to_row
from align.data.rollouts import Answer, RolloutGroup

KEY = {"command": "sample", "seed": 3}


def answer(rng, length, **given):
    return Answer(
        ids=rng.integers(0, 2**40, length),
        text=given.pop("text", "été \u2028 \U0001f98a\n"),
        logp=rng.normal(size=length).astype(np.float32) * np.float32(1e-3),
        **given,
    )


def groups():
    rng = np.random.default_rng(0)
    wins = np.array([[0.5, 0.1, np.nan], [0.9, 0.5, 1 / 3], [np.nan, 2 / 3, 0.5]])
    plain = RolloutGroup(
        RowId("a.jsonl", 4, line=5),
        "Say: \u2029 \\",
        rng.integers(0, 9, 7),
        (
            answer(rng, 3, rewards={"gold": 0.1, "len": np.nan}),
            answer(rng, 1, finished=False, temperature=0.7, model="runs/x", rewards={"gold": -np.inf, "len": 1e-300}),
            Answer(np.array([1, 2]), "given", origin="data", rewards={"gold": np.nan, "len": 2.0}),
        ),
        wins=wins,
        columns={"task": "sum", "n": 3, "nested": {"a": [1.5, None, True]}},
        iteration=2,
    )
    turns = ({"role": "user", "content": "x", "name": "Ann"}, {"role": "user", "content": ""})
    chat = RolloutGroup(
        RowId("set", 0, file="part-2"), turns, np.array([7]), (answer(rng, 2),), tools=[{"name": "f", "of": [1]}]
    )
    return [plain, chat, RolloutGroup(RowId("set", 1), "empty", np.array([1, 2]), ())]


def same(a, b):
    assert (a.row, a.row.line, a.row.file, a.iteration) == (b.row, b.row.line, b.row.file, b.iteration)
    assert (a.prompt, a.tools, dict(a.columns), len(a)) == (b.prompt, b.tools, dict(b.columns), len(b))
    assert a.prompt_ids.dtype == b.prompt_ids.dtype and np.array_equal(a.prompt_ids, b.prompt_ids)
    assert (a.wins is None) == (b.wins is None)
    if a.wins is not None:
        assert b.wins.dtype == np.float64 and a.wins.tobytes() == b.wins.tobytes()
    for x, y in zip(a.answers, b.answers, strict=True):
        assert x.ids.tobytes() == y.ids.tobytes() and x.ids.dtype == y.ids.dtype
        assert (x.logp is None) == (y.logp is None)
        assert x.logp is None or (x.logp.tobytes() == y.logp.tobytes() and y.logp.dtype == np.float32)
        assert (x.text, x.finished, x.origin, x.model, x.temperature) == (
            y.text,
            y.finished,
            y.origin,
            y.model,
            y.temperature,
        )
        assert list(x.rewards) == list(y.rewards)
        np.testing.assert_array_equal(list(x.rewards.values()), list(y.rewards.values()))


def filled(folder, rows, size=2, only=None, key=KEY):
    made = Artefact(folder, key, len(rows), size, SCHEMA)
    for chunk in made.missing:
        if only is None or chunk in only:
            made.write(chunk, [rows[item] for item in made.items(chunk)], {"lost": {"x": chunk + 1}})
    return made


def test_rollouts_come_back_bit_for_bit(tmp_path):
    wanted = groups()
    made = filled(tmp_path / "a", [to_row(group) for group in wanted])
    made.finish({"command": "align sample"})
    read = Artefact.open(tmp_path / "a", "")
    for before, after in zip(wanted, map(from_row, read.rows()), strict=True):
        same(before, after)
    raw = pq.read_table(tmp_path / "a" / "part-000000.parquet").to_pylist()[0]
    assert raw["answers"][0]["rewards"][1] == {"name": "len", "value": None}, "missing is null in the file, and no 0"
    assert raw["wins"][0][2] is None


def test_the_same_rows_give_the_same_bytes_in_any_order_of_work(tmp_path):
    rows = [to_row(group) for group in groups()] * 3
    whole = filled(tmp_path / "a", rows)
    parts = filled(tmp_path / "b", rows, only={3, 1})
    assert parts.missing == [0, 2, 4]
    with pytest.raises(CheckpointError, match="3 of 5 chunks are missing"):
        parts.finish({})
    filled(tmp_path / "b", rows)
    for made in (whole, parts):
        made.finish({"command": "align sample"})
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == ["key.json", "manifest.json", *(f"part-{chunk:06d}.parquet" for chunk in range(5))]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    other = filled(tmp_path / "c", rows, key={**KEY, "seed": 4})
    other.finish({"command": "align sample"})
    assert other.content != whole.content, "what determined the rows is part of what a later stage is keyed by"


def test_counts_of_chunks_add_up_and_a_finished_chunk_is_not_written_again(tmp_path):
    rows = [to_row(group) for group in groups()]
    made = filled(tmp_path / "a", rows)
    assert made.finish({})["counts"] == {"lost": {"x": 3}}
    assert made.done and made.info["chunks"] == 2
    with pytest.raises(CheckpointError, match="finished already"):
        made.write(0, [])
    again = Artefact(tmp_path / "a", KEY, len(rows), 2, SCHEMA)
    assert again.done and not again.missing


def test_another_key_is_refused_with_what_differs_and_restart_throws_it_away(tmp_path):
    rows = [to_row(group) for group in groups()]
    filled(tmp_path / "a", rows).finish({})
    with pytest.raises(CheckpointError, match="`seed` was 3, is 4"):
        Artefact(tmp_path / "a", {**KEY, "seed": 4}, len(rows), 2, SCHEMA)
    fresh = Artefact(tmp_path / "a", {**KEY, "seed": 4}, len(rows), 2, SCHEMA, restart=True)
    assert fresh.missing == [0, 1] and not fresh.done


def test_what_is_not_finished_or_was_changed_is_not_opened(tmp_path):
    rows = [to_row(group) for group in groups()]
    with pytest.raises(CheckpointError, match="is not there"):
        Artefact.open(tmp_path / "a", "make it")
    made = filled(tmp_path / "a", rows)
    with pytest.raises(CheckpointError, match="is begun and not finished"):
        Artefact.open(tmp_path / "a", "make it")
    made.finish({})
    part = tmp_path / "a" / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"part-000001.parquet` has other content"):
        Artefact.open(tmp_path / "a", "make it")
    os.truncate(part, 10)
    with pytest.raises(CheckpointError, match="cannot be used"):
        made.read(1)


def test_a_part_of_another_chunk_or_of_another_tool_is_found_out(tmp_path):
    rows = [to_row(group) for group in groups()]
    made = filled(tmp_path / "a", rows)
    first, second = (tmp_path / "a" / f"part-00000{chunk}.parquet" for chunk in range(2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="not what was written there"):
        made.read(1)
    pq.write_table(pq.read_table(first).replace_schema_metadata(), second)
    with pytest.raises(CheckpointError, match="no part of an artefact"):
        made.read(1)


def test_what_a_kill_leaves_behind_does_not_stop_the_next_run(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / ".key.json.tmp-0a1b").write_text("{")  # killed while the key was written
    made = filled(folder, [to_row(group) for group in groups()], only={0})
    (folder / ".part-000001.parquet.tmp-0a1b").write_bytes(b"PAR1")
    again = Artefact(folder, KEY, made.total, 2, SCHEMA)
    assert again.missing == [1]
    assert sorted(file.name for file in folder.iterdir()) == ["key.json", "part-000000.parquet"]
    (folder / "key.json").unlink()
    with pytest.raises(CheckpointError, match="holds other things"):
        Artefact(folder, KEY, made.total, 2, SCHEMA)
