"""Files and folders that are whole or not there, and manifests that prove it.

A folder is written aside as `.NAME.partial` and renamed when it is complete; where it replaces one, the old folder
waits as `.NAME.old`. What a killed save leaves behind has one of these names; `clean_leftovers` removes it, or puts
the old folder back where the kill fell between the two renames.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from align.core.errors import CheckpointError
from align.core.hashing import file_digest

MANIFEST = "manifest.json"
_FORMAT = 1
_PARTIAL, _OLD, _TEMPORARY = ".partial", ".old", ".tmp-"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Write a file so that a reader, a crash or a full disk sees the old content or the new, nothing between.

    Raises:
        CheckpointError: the disk is full or the place cannot be written; the old content stands.
    """
    return atomic_lines(path, [data.encode() if isinstance(data, str) else data])


def atomic_lines(path: str | Path, lines: Iterable[bytes]) -> Path:
    """`atomic_write` of parts end to end, which are not held in memory together."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


@contextmanager
def atomic_directory(path: str | Path, info: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield a folder to write into; when the block ends it becomes `path`, with a manifest, in one rename.

    Where the block raises, `path` stays as it was. `info` goes into the manifest.

    Raises:
        CheckpointError: the disk is full or the place cannot be written; the old folder stands.
    """
    path = Path(path)
    try:
        partial = stage_directory(path)
        yield partial
        commit_directory(path, info)
    except BaseException as error:
        shutil.rmtree(partial_directory(path), ignore_errors=True)
        if _is_disk_full(error) and not isinstance(error, CheckpointError):
            raise _write_error(path, error) from error
        raise


def partial_directory(path: str | Path) -> Path:
    """Where `path` is written aside: a function of `path`, so that every rank of a run knows it."""
    path = Path(path)
    return path.with_name(f".{path.name}{_PARTIAL}")


def stage_directory(path: str | Path) -> Path:
    """Make the empty folder that `commit_directory` turns into `path`. One process calls it; others may write there."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean(path)
        partial = partial_directory(path)
        partial.mkdir()
    except OSError as error:
        raise _write_error(path, error) from error
    return partial


def commit_directory(path: str | Path, info: Mapping[str, Any] | None = None) -> Path:
    """Flush the staged folder to disk, write its manifest and rename it to `path`."""
    path = Path(path)
    partial, old = partial_directory(path), _old_directory(path)
    try:
        write_manifest(partial, info)
        _sync_tree(partial)
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(partial, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    shutil.rmtree(old, ignore_errors=True)
    return path


def clean_leftovers(parent: str | Path) -> list[Path]:
    """Remove what killed saves left in a folder; return what was removed or put back. One process calls it."""
    parent = Path(parent)
    hidden = sorted(parent.glob(".*")) if parent.is_dir() else []
    folders = [entry for entry in hidden if entry.is_dir() and entry.name.endswith((_PARTIAL, _OLD))]
    files = [entry for entry in hidden if entry.is_file() and _TEMPORARY in entry.name]
    for folder in folders:
        _clean(parent / folder.name.removesuffix(_PARTIAL).removesuffix(_OLD)[1:])
    for file in files:
        file.unlink(missing_ok=True)
    return folders + files


def write_manifest(directory: str | Path, info: Mapping[str, Any] | None = None) -> Path:
    """Write names, sizes and sha256 of all files under a folder to its `manifest.json`, last and atomically."""
    directory = Path(directory)
    files = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": file_digest(file)}
        for file in _files(directory)
    }
    content = {"format": _FORMAT, "info": dict(info or {}), "files": files}
    return atomic_write(directory / MANIFEST, json.dumps(content, indent=1, sort_keys=True) + "\n")


def verify_manifest(directory: str | Path, hashes: bool = True) -> dict[str, Any]:
    """Check a folder against its manifest and return the manifest's `info`. Files that it does not list are ignored.

    Args:
        hashes: read every file; otherwise names and sizes alone are compared.

    Raises:
        CheckpointError: names the first file that is missing, of another size or of other content.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    for name, entry in sorted(manifest["files"].items()):
        file = directory / name
        if not file.is_file():
            raise _damaged(file, "is missing")
        if file.stat().st_size != entry["size"]:
            raise _damaged(file, f"has {file.stat().st_size} bytes, not {entry['size']}")
        if hashes and file_digest(file) != entry["sha256"]:
            raise _damaged(file, "has other content than was saved")
    return dict(manifest["info"])


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "there is no manifest.json", where=str(directory), why="the folder is not a finished save of align"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, "cannot be read") from error
    entries = manifest.get("files") if isinstance(manifest, dict) else None
    whole = isinstance(entries, dict) and all(
        isinstance(entry, dict) and {"size", "sha256"} <= entry.keys() for entry in entries.values()
    )
    if not whole or manifest.get("format") != _FORMAT or not isinstance(manifest.get("info"), dict):
        raise _damaged(path, f"is not a manifest of format {_FORMAT}")
    return manifest


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"`{file.name}` {what}",
        where=str(file),
        why="the save was cut short or the file was changed since",
        mend="use an earlier checkpoint, or restore the file",
    )


def _clean(path: Path) -> None:
    old = _old_directory(path)
    if old.is_dir() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial_directory(path), ignore_errors=True)


def _old_directory(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OLD}")


def _files(directory: Path) -> list[Path]:
    manifest = directory / MANIFEST
    return sorted(file for file in directory.rglob("*") if file.is_file() and file != manifest)


def _sync_tree(directory: Path) -> None:
    for file in [*_files(directory), directory / MANIFEST]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for folder in [*(entry for entry in directory.rglob("*") if entry.is_dir()), directory]:
        _sync_directory(folder)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to flush it
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: BaseException | None) -> bool:
    """Libraries that write from Rust or C++ report a full disk as text, or as the cause of an error of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        if isinstance(error, Exception) and "no space left on device" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_error(path: Path, error: BaseException) -> CheckpointError:
    if _is_disk_full(error):
        return CheckpointError(
            "the disk is full",
            where=str(path),
            why=f"{error}; what was saved before is untouched",
            mend="free space, or lower `save_total_limit`, then run again",
        )
    return CheckpointError("cannot be written", where=str(path), why=str(error), mend="check the path and its rights")
