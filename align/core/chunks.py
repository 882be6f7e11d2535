"""Work in numbered chunks: a finished chunk is on disk whole and is never done again, whatever kills the process.

A work folder holds `key.json` (everything that determines the result) and a file for each finished chunk. `Chunks`
keeps them as JSONL until the result is assembled into one file, and then `done.json` with the result's digest in their
place; `align.data.artefacts` keeps them as Parquet for good.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.errors import CheckpointError, ConfigError
from align.core.files import atomic_lines, atomic_write, clean_leftovers
from align.core.hashing import digest, file_digest

_KEY, _DONE = "key.json", "done.json"


class Numbered(ABC):
    """Numbered chunks of `total` items, `size` items each (the last one may be shorter).

    Args:
        folder: the work folder; made where it is not there.
        key: name -> value (JSON) of everything that determines the result: model hash, parameters, data. `total` and
            `size` are added to it.
        total: items in all. size: items of a chunk.
        restart: throw away what another key left there.

    Raises:
        CheckpointError: the folder holds work of another key; the error names what differs.
    """

    def __init__(
        self, folder: str | Path, key: Mapping[str, Any], total: int, size: int, restart: bool = False
    ) -> None:
        if size < 1:
            raise ConfigError(f"the chunk size is {size}", mend="use 1 or more")
        self.folder, self.total, self.size = Path(folder), total, size
        self.key = json.loads(json.dumps({**key, "total": total, "chunk_size": size}))
        self.digest = digest(self.key)
        found = self._found()
        if found is not None and found != self.key and not restart:
            raise self._other(found)
        if found != self.key:
            shutil.rmtree(self.folder, ignore_errors=True)
            atomic_write(self.folder / _KEY, json.dumps(self.key, indent=1, ensure_ascii=False) + "\n")
        clean_leftovers(self.folder)

    def __len__(self) -> int:
        """The number of chunks."""
        return -(-self.total // self.size)

    def items(self, chunk: int) -> range:
        """The numbers of a chunk's items."""
        return range(chunk * self.size, min((chunk + 1) * self.size, self.total))

    @property
    def finished(self) -> list[int]:
        """Chunks that are done, in order. Whole by their names: a chunk file appears by one rename."""
        return [chunk for chunk in range(len(self)) if self._file(chunk).is_file()]

    @property
    def missing(self) -> list[int]:
        """Chunks to do, in order."""
        return [chunk for chunk in range(len(self)) if not self._file(chunk).is_file()]

    def write(self, chunk: int, rows: Sequence[Mapping[str, Any]], account: Mapping[str, Any] | None = None) -> None:
        """Finish a chunk: its rows (any number of them), atomically.

        Args:
            account: what is to be told of the chunk later (JSON), beside its rows.

        Raises:
            CheckpointError: it is finished already, or the disk is full.
        """
        if chunk not in range(len(self)):
            raise IndexError(chunk)
        if self._file(chunk).exists():
            raise CheckpointError(f"chunk {chunk} is finished already", where=str(self.folder))
        head = {"chunk": chunk, "key": self.digest, "rows": len(rows)}
        self._store(self._file(chunk), head if account is None else {**head, "account": dict(account)}, rows)

    def read(self, chunk: int) -> list[dict[str, Any]]:
        """The rows of a finished chunk.

        Raises:
            CheckpointError: it is not there, or not what was written.
        """
        file = self._file(chunk)
        try:
            head, rows = self._load(file)
        except (OSError, ValueError) as error:
            raise self._damaged(file, str(error)) from error
        self._check(file, head, chunk, len(rows))
        return rows

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all chunks in order; all must be finished."""
        for chunk in range(len(self)):
            yield from self.read(chunk)

    def remove(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @abstractmethod
    def _name(self, chunk: int) -> str:
        """The name of a chunk's file in the folder."""

    @abstractmethod
    def _store(self, file: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a chunk's file, atomically."""

    @abstractmethod
    def _load(self, file: Path) -> tuple[Any, list[dict[str, Any]]]:
        """(head, rows) of a chunk's file; raises OSError or ValueError where it is not whole."""

    def _file(self, chunk: int) -> Path:
        return self.folder / self._name(chunk)

    def _check(self, file: Path, head: Any, chunk: int, rows: int) -> None:
        told = {name: head.get(name) for name in ("chunk", "key", "rows")} if isinstance(head, dict) else {}
        if told != {"chunk": chunk, "key": self.digest, "rows": rows}:
            raise self._damaged(file, "it is not what was written there")

    def _found(self) -> dict[str, Any] | None:
        """The key in the folder; None where there is no work."""
        file = self.folder / _KEY
        if not file.is_file():
            # A kill while the key was written leaves the folder with a part of it.
            there = self.folder.iterdir() if self.folder.is_dir() else ()
            if any(not entry.name.startswith(f".{_KEY}") for entry in there):
                raise CheckpointError(
                    "the work folder holds other things", where=str(self.folder), mend="name another output"
                )
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(file, str(error)) from error
        return found if isinstance(found, dict) else {}

    def _other(self, found: Mapping[str, Any]) -> CheckpointError:
        before, now = _flat(found), _flat(self.key)
        pairs = {name: (before.get(name), now.get(name)) for name in {**before, **now}}
        changes = [f"`{name}` was {_short(a)}, is {_short(b)}" for name, (a, b) in pairs.items() if a != b]
        return CheckpointError(
            "the work that was begun here is of other settings",
            where=str(self.folder),
            why="; ".join(changes),
            mend="give the settings it was begun with, name another output, or throw that work away: --restart",
        )

    def _damaged(self, file: Path, why: str) -> CheckpointError:
        return CheckpointError("a file of the work folder cannot be used", where=str(file), why=why, mend="remove it")


class Chunks(Numbered):
    """Chunks as JSONL, a file each, which become one file in the end."""

    def assemble(self, output: str | Path) -> Path:
        """Write the rows of all chunks, in order, to one JSONL file, atomically; the chunks are then removed.

        Raises:
            CheckpointError: a chunk is missing or damaged, or the disk is full.
        """
        output = Path(output)
        if self.missing:
            raise CheckpointError(f"{len(self.missing)} of {len(self)} chunks are missing", where=str(self.folder))
        atomic_lines(output, (line for chunk in range(len(self)) for line in self._lines(chunk)))
        atomic_write(self.folder / _DONE, json.dumps({"output": output.name, "sha256": file_digest(output)}) + "\n")
        self._remove_chunks()
        return output

    def assembled(self, output: str | Path) -> bool:
        """Whether `output` is the result of this key, assembled before and not changed since."""
        try:
            done = json.loads((self.folder / _DONE).read_text(encoding="utf-8"))
            same = bool(done["sha256"] == file_digest(output))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if same:
            self._remove_chunks()  # a kill may have left some
        return same

    def _remove_chunks(self) -> None:
        for chunk in range(len(self)):
            self._file(chunk).unlink(missing_ok=True)

    def _name(self, chunk: int) -> str:
        return f"{chunk:06d}.jsonl"

    def _store(self, file: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        atomic_lines(file, (_line(row) for row in (head, *rows)))

    def _load(self, file: Path) -> tuple[Any, list[dict[str, Any]]]:
        head, lines = _head_and_lines(file)
        return head, [json.loads(line) for line in lines]

    def _lines(self, chunk: int) -> list[bytes]:
        file = self._file(chunk)
        try:
            head, lines = _head_and_lines(file)
        except (OSError, ValueError) as error:
            raise self._damaged(file, str(error)) from error
        self._check(file, head, chunk, len(lines))
        return lines


def _head_and_lines(file: Path) -> tuple[Any, list[bytes]]:
    head, *lines = file.read_bytes().splitlines(keepends=True)
    if not all(line.endswith(b"\n") for line in lines):
        raise ValueError("its last line is cut")
    return json.loads(head), lines


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold
        return (json.dumps(row) + "\n").encode()


def _flat(key: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in key.items():
        below = _flat(value) if isinstance(value, dict) else {}
        flat |= {f"{name}.{inner}": one for inner, one in below.items()} if below else {name: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
