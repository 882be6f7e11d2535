"""Sources: counted without parsing, read in any order, damaged lines as values, and errors that list what is there."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from align.core.errors import DataError
from align.data import jsonl
from align.data.rows import BadRow
from align.data.sources import open_source

ROWS = [{"prompt": f"p{i}", "chosen": "a" * (i % 7), "rejected": "ü"} for i in range(9000)]


def write_jsonl(path: Path, rows: list[Any], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def make(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Any:
    if kind == "list":
        return rows
    if kind == "Dataset":
        return Dataset.from_list(rows)
    if kind == "saved":
        Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
        return folder / "rows.parquet"
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows))
        return folder / "rows.json"
    if kind == "gz":
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "plain", rows).read_bytes()))
        return folder / "rows.jsonl.gz"
    if kind == "folder":
        (folder / "set").mkdir()
        write_jsonl(folder / "set" / "part1.jsonl", rows[:5000])
        write_jsonl(folder / "set" / "part2.jsonl", rows[5000:])
        return folder / "set"
    return write_jsonl(folder / f"rows.{kind}", rows)


@pytest.mark.parametrize("kind", ["list", "Dataset", "saved", "parquet", "json", "gz", "folder", "jsonl"])
def test_every_kind_counts_and_reads_any_row(kind: str, tmp_path: Path) -> None:
    source = open_source(make(kind, tmp_path, ROWS))
    assert len(source) == len(ROWS)
    assert source.rows_parsed == (len(ROWS) if kind == "json" else 0)
    wanted = [8999, 0, 4095, 4096, 4097, 8191, 8192, 0, 5000, 4999]
    assert source.read(wanted) == [ROWS[i] for i in wanted]
    again = open_source(make(kind, tmp_path / "b", ROWS) if kind == "list" else source_name(kind, tmp_path))
    assert again.fingerprint == source.fingerprint


def source_name(kind: str, folder: Path) -> Any:
    names = {"saved": "saved", "parquet": "rows.parquet", "json": "rows.json", "gz": "rows.jsonl.gz", "folder": "set"}
    return Dataset.from_list(ROWS) if kind == "Dataset" else folder / names.get(kind, "rows.jsonl")


@pytest.mark.parametrize("kind", ["list", "Dataset", "saved", "parquet", "json", "gz", "folder", "jsonl"])
def test_max_rows_takes_the_first(kind: str, tmp_path: Path) -> None:
    source = open_source(make(kind, tmp_path, ROWS), max_rows=4097)
    assert len(source) == 4097
    assert source.read([4096]) == [ROWS[4096]]


@pytest.mark.parametrize("kind", ["list", "Dataset", "parquet", "jsonl"])
def test_fingerprint_is_of_the_content(kind: str, tmp_path: Path) -> None:
    first = open_source(make(kind, tmp_path, ROWS[:50])).fingerprint
    (tmp_path / "other").mkdir()
    changed = [*ROWS[:49], {**ROWS[49], "chosen": "other"}]
    assert open_source(make(kind, tmp_path / "other", changed)).fingerprint != first


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 8192])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n  \n"])
def test_block_edges_and_file_ends(count: int, end: str, tmp_path: Path) -> None:
    rows = [{"i": i} for i in range(count)]
    source = open_source(write_jsonl(tmp_path / "rows.jsonl", rows, end))
    assert len(source) == count
    assert source.read(range(count)) == rows


def test_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert open_source(path).read([0, 1]) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"[1, 2]", "not an object but list"),
        (b'"text"', "not an object but str"),
        (b"null", "not an object but NoneType"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"", "an empty line"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_line_is_a_value_and_moves_nothing(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"i": 0}\n' + line + b'\n{"i": 2}\n')
    assert open_source(path).read([2, 1, 0]) == [{"i": 2}, BadRow(reason), {"i": 0}]


def test_a_list_may_hold_what_is_no_row() -> None:
    assert open_source([{"a": 1}, 3]).read([1]) == [BadRow("not an object but int")]


def test_a_source_travels_to_a_worker(tmp_path: Path) -> None:
    source = open_source(write_jsonl(tmp_path / "rows.jsonl", ROWS[:10]))
    source.read([1])
    assert pickle.loads(pickle.dumps(source)).read([3]) == [ROWS[3]]  # noqa: S301


def test_row_ids_name_the_file_of_a_folder(tmp_path: Path) -> None:
    source = open_source(make("folder", tmp_path, ROWS))
    assert str(source.row_id(5001)) == f"{tmp_path / 'set' / 'part2.jsonl'}:2"


def test_index_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    line = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n'

    def held(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        path.write_bytes(line * rows)
        tracemalloc.start()
        source = open_source(path)
        for start in range(0, rows, 1000):
            source.read([start])
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/align/data/*")])
        tracemalloc.stop()
        assert len(source) == rows
        return sum(trace.size for trace in snapshot.traces)

    small, large = held(2_000), held(200_000)
    assert 20 * 8 * 4096 // 2 < large - small < 1 << 20


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_file_too_large_to_count_says_what_to_do(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "SCAN_LIMIT", 1 << 20)
    monkeypatch.setattr(jsonl, "_CHUNK", 1 << 16)
    path = tmp_path / f"rows.{suffix}"
    data = b'{"a": "%s"}\n' % (b"x" * 1000) * 3000
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(DataError, match=r"larger than.*\n.*\n.*Parquet, set `max_rows`, or index it once"):
        open_source(path)
    if suffix == "jsonl":
        assert len(open_source(path, max_rows=5)) == 5
        jsonl.write_index(path)
        source = open_source(path)
        assert len(source) == 3000
        assert source.read([2999])[0]["a"] == "x" * 1000  # type: ignore[index]
        path.write_bytes(data[:-1])  # the index is of another file now
        with pytest.raises(DataError, match="larger than"):
            open_source(path)


def splits(folder: Path, *names: str) -> Path:
    DatasetDict({name: Dataset.from_list([{"prompt": name}]) for name in names}).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    ("names", "asked", "found"),
    [
        (("train", "test"), None, "train"),
        (("train", "test"), "test", "test"),
        (("train_prefs", "test_prefs"), None, "train_prefs"),
        (("everything", "test"), None, "everything"),
    ],
)
def test_the_split_that_is_meant(names: tuple[str, ...], asked: str | None, found: str, tmp_path: Path) -> None:
    assert open_source(splits(tmp_path / "set", *names), split=asked).read([0]) == [{"prompt": found}]


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (("train_prefs", "test_prefs"), "train"),
        (("train_sft", "train_prefs", "test_prefs"), None),
        (("test", "validation"), None),
        (("test_prefs",), None),
    ],
)
def test_a_missing_split_lists_what_is_there(names: tuple[str, ...], asked: str | None, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(splits(tmp_path / "set", *names), split=asked)
    assert all(f"`{name}`" in str(caught.value) for name in names)


def test_files_of_a_folder_are_not_mixed_over_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", [{"s": "train0"}])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", [{"s": "train1"}])
    write_jsonl(tmp_path / "test.jsonl", [{"s": "test"}])
    assert open_source(tmp_path).read([0, 1]) == [{"s": "train0"}, {"s": "train1"}]
    assert open_source(tmp_path, split="test").read([0]) == [{"s": "test"}]
    with pytest.raises(IndexError):
        open_source(tmp_path).read([2])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.jsonl", ["no such file or folder", "there.txt"]),
        ("missing/", ["no such file or folder", "there.txt"]),
        ("nobody/nothing", ["no file or folder `nobody/nothing`", "hub"]),
        ("there.txt", ["this kind of file is not read", ".parquet"]),
        ("empty", ["no data files", "nothing"]),
        ("empty.jsonl", ["there are no rows"]),
        ("broken.parquet", ["cannot be read as Parquet"]),
        ("broken.json", ["not valid JSON"]),
        ("broken.jsonl.gz", ["cannot be decompressed"]),
    ],
)
def test_what_cannot_be_opened(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 cut short")
    (tmp_path / "broken.json").write_text('[{"a": 1}, ')
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:40])
    with pytest.raises(DataError) as caught:
        open_source(name)
    assert [word for word in words if word not in str(caught.value)] == []
