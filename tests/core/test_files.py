"""Atomic files and folders: what a crash, a full disk and a flipped byte leave behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.core import files
from align.core.errors import CheckpointError


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fill(folder: Path, text: str = "weights") -> None:
    (folder / "sub").mkdir()
    (folder / "a.bin").write_text(text)
    (folder / "sub" / "b.bin").write_bytes(b"\0" * 100)


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    files.atomic_write(target, "one")
    files.atomic_write(target, b"two")
    assert target.read_bytes() == b"two"
    assert listing(target.parent) == {"file.txt"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    target = files.atomic_write(tmp_path / "file", "old")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="disk is full") as caught:
        files.atomic_write(target, "new")
    assert caught.value.where == str(target)
    assert target.read_text() == "old"
    assert listing(tmp_path) == {"file"}


def test_unwritable_place_is_not_called_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        files.atomic_write(tmp_path / "file" / "below", "x")


def test_directory_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-1"
    with files.atomic_directory(target, {"step": 1}) as folder:
        fill(folder)
        assert not target.exists()
    assert files.verify_manifest(target) == {"step": 1}
    assert set(json.loads((target / files.MANIFEST).read_text())["files"]) == {"a.bin", "sub/b.bin"}
    assert listing(tmp_path) == {"checkpoint-1"}


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "d"
    with files.atomic_directory(target) as folder:
        fill(folder)
    with files.atomic_directory(target) as folder:
        (folder / "only").write_text("x")
    assert listing(target) == {"only", files.MANIFEST}
    assert listing(tmp_path) == {"d"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_in_the_middle_of_a_save(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "d"
    with files.atomic_directory(target, {"step": 1}) as folder:
        fill(folder)
    with pytest.raises(CheckpointError, match="disk is full"), files.atomic_directory(target) as folder:
        (folder / "half").write_text("x")
        raise error
    assert files.verify_manifest(target) == {"step": 1}
    assert listing(tmp_path) == {"d"}


def test_other_errors_pass_through_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.atomic_directory(tmp_path / "d"):
        raise ZeroDivisionError
    assert listing(tmp_path) == set()


def test_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "d"
    with files.atomic_directory(target, {"step": 1}) as folder:
        fill(folder)
    rename = os.rename

    def refuse(source: Path, destination: Path) -> None:
        if Path(source) == files.partial_directory(target):
            raise OSError(errno.EIO, "broken")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError), files.atomic_directory(target) as folder:
        fill(folder, "new")
    assert files.verify_manifest(target) == {"step": 1}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda d: (d / "a.bin").unlink(), "a.bin"),
        (lambda d: (d / "a.bin").write_text("weightS"), "a.bin"),
        (lambda d: (d / "sub" / "b.bin").write_bytes(b"\0" * 99), "b.bin"),
        (lambda d: (d / "manifest.json").write_text('{"format": 1, "fil'), "manifest.json"),
        (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json"),
        (lambda d: (d / "manifest.json").write_text('{"format": 1, "info": {}, "files": {"a": 3}}'), "manifest.json"),
        (lambda d: (d / "manifest.json").write_text('{"format": 2, "info": {}, "files": {}}'), "manifest.json"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_damage_is_named(tmp_path: Path, spoil, named: str) -> None:  # type: ignore[no-untyped-def]
    with files.atomic_directory(tmp_path / "d") as folder:
        fill(folder)
    spoil(tmp_path / "d")
    with pytest.raises(CheckpointError, match=named):
        files.verify_manifest(tmp_path / "d")


def test_sizes_alone_do_not_read_contents(tmp_path: Path) -> None:
    with files.atomic_directory(tmp_path / "d") as folder:
        fill(folder)
    (tmp_path / "d" / "a.bin").write_text("weightS")
    files.verify_manifest(tmp_path / "d", hashes=False)
    (tmp_path / "d" / "a.bin").write_text("weight")
    with pytest.raises(CheckpointError):
        files.verify_manifest(tmp_path / "d", hashes=False)


def test_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    target = tmp_path / "d"
    with files.atomic_directory(target, {"step": 1}) as folder:
        fill(folder)
    os.rename(target, tmp_path / ".d.old")
    files.stage_directory(tmp_path / "other")
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".file.tmp-0123").write_text("half")
    assert len(files.clean_leftovers(tmp_path)) == 4
    assert files.verify_manifest(target) == {"step": 1}
    assert listing(tmp_path) == {"d"}


_KILLED = """
import sys
from pathlib import Path
from align.core.files import atomic_directory
root = Path(sys.argv[1])
for step in range(10_000):
    with atomic_directory(root / "d", {"step": step}) as folder:
        for name in range(5):
            (folder / str(name)).write_text(str(step) * 1000)
    print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.013 * attempt)
        process.kill()
        done = [int(line) for line in process.stdout.read().split()] or [0]
        process.wait()
        files.clean_leftovers(tmp_path)
        step = files.verify_manifest(tmp_path / "d")["step"]
        assert step >= done[-1]
        assert listing(tmp_path) == {"d"}
        assert {(tmp_path / "d" / str(name)).read_text() for name in range(5)} == {str(step) * 1000}
