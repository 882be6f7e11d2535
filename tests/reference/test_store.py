"""The log-prob cache: what is complete survives, what is torn or damaged is never used."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from align.core.errors import CheckpointError, DataError
from align.reference.records import SUFFIX
from align.reference.store import LogpStore, MemoryStore, StoreKey, default_cache_dir, entry_key, store_key

ROOT = Path(__file__).parents[2]
KEY = store_key("0" * 32, dtype="float32", backend="tree", versions={})


def entry(writer: int, number: int) -> tuple[bytes, np.ndarray]:
    """The entry that a writer's number stands for; a reader knows what it must hold."""
    values = np.random.default_rng([writer, number]).normal(size=50 + number % 300)
    return blake2b(f"{writer}:{number}".encode(), digest_size=16).digest(), values.astype(np.float32)


def write_forever(folder: Path, writer: int) -> None:
    """What the child processes run: they say how many entries are written, after the write has returned."""
    store = LogpStore(folder, KEY)
    for number in range(0, 40_000, 8):
        store.put_many(dict(entry(writer, number + i) for i in range(8)))
        print(number + 8, flush=True)


def start(folder: Path, writer: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder), str(writer)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def told(process: subprocess.Popen[str]) -> int:
    """How many entries the writer has said to be written, once it is gone."""
    assert process.stdout is not None
    lines = [line for line in process.stdout.read().split("\n")[:-1] if line]
    process.wait()
    return int(lines[-1]) if lines else 0


def check_all(store: LogpStore, writer: int, count: int) -> None:
    found = store.get_many([entry(writer, number)[0] for number in range(count)])
    for number, values in enumerate(found):
        assert values is not None, f"entry {number} of writer {writer} is lost"
        np.testing.assert_array_equal(values, entry(writer, number)[1])


def files(store: LogpStore) -> list[Path]:
    return sorted(store.path.glob(f"*{SUFFIX}"))


def test_what_is_put_is_found_by_this_and_later_stores(tmp_path: Path) -> None:
    store = LogpStore(tmp_path, KEY)
    assert store.get_many([entry(0, 0)[0]]) == [None]
    store.put_many(dict(entry(0, number) for number in range(100)))
    check_all(store, 0, 100)
    check_all(LogpStore(tmp_path, KEY), 0, 100)
    store.close()
    store.put_many(dict(entry(0, number) for number in range(100, 110)))
    check_all(store, 0, 110)
    check_all(LogpStore(tmp_path, KEY), 0, 110)
    assert len(store) == 110


def test_a_killed_writer_loses_nothing_that_was_complete(tmp_path: Path) -> None:
    """Ten kills at random moments into one folder; the reader that stood open all the time sees everything too."""
    standing = LogpStore(tmp_path, KEY)
    moments = random.Random(0)
    counts = []
    for writer in range(10):
        process = start(tmp_path, writer)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        counts.append(max(told(process), int(first)))
    assert all(count > 0 for count in counts)
    for store in (LogpStore(tmp_path, KEY), standing):
        for writer, count in enumerate(counts):
            check_all(store, writer, count)
        assert store.damaged == 0


@pytest.mark.parametrize("cut", [1, 7, 30, 33, 100])
def test_a_torn_tail_is_ignored_and_written_again(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    store = LogpStore(tmp_path, KEY)
    store.put_many(dict(entry(0, number) for number in range(5)))
    path = files(store)[0]
    os.truncate(path, path.stat().st_size - cut)
    again = LogpStore(tmp_path, KEY)
    check_all(again, 0, 4)
    assert again.get_many([entry(0, 4)[0]]) == [None]
    assert not caplog.records, "an unfinished tail is no fault: its writer may be alive"
    again.put_many(dict([entry(0, 4)]))
    check_all(again, 0, 5)
    check_all(LogpStore(tmp_path, KEY), 0, 5)


def test_a_tail_that_its_writer_finishes_is_taken_in(tmp_path: Path) -> None:
    store = LogpStore(tmp_path, KEY)
    store.put_many(dict(entry(0, number) for number in range(3)))
    path = files(store)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    reader = LogpStore(tmp_path, KEY)
    assert reader.get_many([entry(0, 2)[0]]) == [None]
    path.write_bytes(whole)
    check_all(reader, 0, 3)


def test_every_damaged_byte_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One flipped bit anywhere in a record of a file costs that record, is reported, and costs no other record."""
    entries = {entry(0, number)[0]: np.arange(3, dtype=np.float32) + number for number in range(3)}
    keys = list(entries)
    store = LogpStore(tmp_path, KEY)
    store.put_many(entries)
    path = files(store)[0]
    whole = path.read_bytes()
    size = len(whole) // 3
    for position in range(size, 2 * size):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        caplog.clear()
        reader = LogpStore(tmp_path, KEY)
        found = reader.get_many(keys)
        assert found[1] is None, f"byte {position - size} of the record was believed"
        np.testing.assert_array_equal(found[0], entries[keys[0]])
        np.testing.assert_array_equal(found[2], entries[keys[2]])
        assert reader.damaged == 1
        assert path.name in caplog.text


def test_a_damaged_record_is_replaced_for_good(tmp_path: Path) -> None:
    store = LogpStore(tmp_path, KEY)
    store.put_many(dict(entry(0, number) for number in range(3)))
    path = files(store)[0]
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 1
    path.write_bytes(bytes(damaged))
    reader = LogpStore(tmp_path, KEY)
    assert reader.get_many([entry(0, 0)[0]]) == [None]
    reader.put_many(dict([entry(0, 0)]))
    check_all(reader, 0, 3)
    check_all(LogpStore(tmp_path, KEY), 0, 3)


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, writer) for writer in range(2)]
    reader = LogpStore(tmp_path, KEY)
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    time.sleep(0.3)
    check_all(reader, 0, 8)
    check_all(reader, 1, 8)
    for process in processes:
        process.kill()
    counts = [told(process) for process in processes]
    for writer, count in enumerate(counts):
        assert count > 8
        check_all(reader, writer, count)
    assert len(files(reader)) == 2


def test_a_forked_child_writes_a_file_of_its_own(tmp_path: Path) -> None:
    store = LogpStore(tmp_path, KEY)
    store.put_many(dict([entry(0, 0)]))
    child = os.fork()
    if child == 0:
        store.put_many(dict([entry(0, 1)]))
        os._exit(0)
    os.waitpid(child, 0)
    store.put_many(dict([entry(0, 2)]))
    assert len(files(store)) == 2
    check_all(store, 0, 3)


def test_many_entries_and_shared_hashes(tmp_path: Path) -> None:
    """Keys that agree in their first eight bytes are told apart, before and after the index is merged."""
    store = LogpStore(tmp_path, KEY)
    entries = {bytes(8) + number.to_bytes(8, "big"): np.full(2, number, np.float32) for number in range(40)}
    filler = {number.to_bytes(16, "little"): np.zeros(1, np.float32) for number in range(1, 70_000)}
    store.put_many(entries)
    store.put_many(filler)
    for one in (store, LogpStore(tmp_path, KEY)):
        for (_, values), found in zip(entries.items(), one.get_many(list(entries)), strict=True):
            np.testing.assert_array_equal(values, found)
        assert one.get_many([bytes(8) + (99).to_bytes(8, "big")]) == [None]


def test_what_the_key_depends_on(tmp_path: Path) -> None:
    base = {"weights": "a" * 32, "dtype": "float32", "backend": "tree", "versions": {"torch": "2.13.0"}}
    changes: list[dict[str, object]] = [
        {"weights": "b" * 32},
        {"dtype": "bfloat16"},
        {"backend": "sdpa"},
        {"adapter": "c" * 32},
        {"temperature": 0.7},
        {"softcap": 30.0},
        {"versions": {"torch": "2.12.0"}},
    ]
    digests = {store_key(**base).digest, *(store_key(**{**base, **change}).digest for change in changes)}  # type: ignore[arg-type]
    assert len(digests) == 1 + len(changes)
    assert store_key(**{**base, "dtype": "torch.float32"}).digest == store_key(**base).digest  # type: ignore[arg-type]
    store = LogpStore(tmp_path, store_key(**base))  # type: ignore[arg-type]
    store.put_many(dict([entry(0, 0)]))
    assert (store.path / "key.json").is_file()
    for change in changes:
        other = LogpStore(tmp_path, store_key(**{**base, **change}))  # type: ignore[arg-type]
        assert other.get_many([entry(0, 0)[0]]) == [None]


def test_what_an_entry_depends_on() -> None:
    prompt, ids, scored = np.array([1, 2, 3]), np.array([4, 5]), np.array([True, True])
    keys = {
        entry_key(prompt, ids, scored),
        entry_key(np.array([1, 2, 9]), ids, scored),
        entry_key(prompt, np.array([4, 6]), scored),
        entry_key(prompt, ids, np.array([True, False])),
        entry_key(np.array([1, 2]), np.array([3, 4, 5]), np.array([True, True, True])),
        entry_key(np.array([1, 2, 3, 4]), np.array([5]), np.array([True])),
    }
    assert len(keys) == 6
    assert entry_key(prompt.astype(np.int32), ids, scored) == entry_key(prompt, ids, scored)


def test_numbers_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    for store in (LogpStore(tmp_path, KEY), MemoryStore()):
        for values in (
            np.array([0.0, np.nan], np.float32),
            np.array([-np.inf], np.float32),
            np.zeros((2, 2), np.float32),
        ):
            with pytest.raises(DataError):
                store.put_many({bytes(16): values})


def test_a_full_disk_stops_the_cache_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = LogpStore(tmp_path, KEY)
    store.put_many(dict([entry(0, 0)]))
    real = os.write

    def short(descriptor: int, data: bytes) -> int:
        if len(data) > 100:
            return real(descriptor, bytes(data[:100]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("align.reference.store.os.write", short)
    store.put_many(dict([entry(0, 1)]))
    store.put_many(dict([entry(0, 2)]))
    monkeypatch.undo()
    assert caplog.text.count("No space left on device") == 1
    check_all(LogpStore(tmp_path, KEY), 0, 1)
    assert LogpStore(tmp_path, KEY).get_many([entry(0, 1)[0]]) == [None]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = LogpStore(tmp_path / "file", KEY)
    with pytest.raises(CheckpointError, match="cannot be written"):
        store.put_many(dict([entry(0, 0)]))


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "logps"
    monkeypatch.delenv("ALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache_dir() == Path("/cache/align/logps")


def test_the_versions_are_the_installed_ones() -> None:
    key = store_key("0" * 32, dtype="float32", backend="tree")
    assert isinstance(key, StoreKey)
    assert set(key.versions) == {"torch", "transformers", "align.scoring"}


if __name__ == "__main__":
    write_forever(Path(sys.argv[1]), int(sys.argv[2]))
