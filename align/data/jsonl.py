"""JSONL with random access: rows are counted by their newlines, and found again by the offsets of blocks of rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from align.core.errors import DataError
from align.core.files import atomic_write
from align.data.rows import BadRow, Row

BLOCK = 4096
"""Rows whose offsets are kept or forgotten together."""
SCAN_LIMIT = 1 << 30
"""Bytes beyond which rows are not counted at every start."""

_CHUNK = 1 << 20
_CACHED_BLOCKS = 20
_WHITESPACE = b" \t\r\n"


class JsonlFile:
    """One file of JSON lines.

    Memory: 8 bytes for each block of 4,096 rows, and the row offsets of the last 20 blocks in use.
    """

    def __init__(self, path: Path, name: str, max_rows: int | None = None) -> None:
        self.path, self.name = path, name
        self._descriptor: int | None = None
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()
        index = _read_index(path) if max_rows is None else None
        self._rows, self._starts, self.fingerprint = index or _scan(path, name, max_rows)

    def __len__(self) -> int:
        return self._rows

    def read(self, index: int) -> Row | BadRow:
        """Parse one row."""
        offsets = self._offsets(index // BLOCK)
        start, end = int(offsets[index % BLOCK]), int(offsets[index % BLOCK + 1])
        line = os.pread(self._file(), end - start, start)
        return parse_line(line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line)

    def _offsets(self, block: int) -> np.ndarray:
        """Offsets of the rows of a block and of its end: int64 [rows + 1]."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        start, end = int(self._starts[block]), int(self._starts[block + 1])
        ends = [_newlines(chunk) + base + 1 for base, chunk in self._chunks(start, end)]
        offsets = np.concatenate([np.array([start]), *ends])
        rows = min(BLOCK, self._rows - block * BLOCK)
        if len(offsets) == rows:  # the last row of a file without a newline at its end
            offsets = np.append(offsets, end)
        if len(offsets) < rows + 1:
            raise DataError("the file changed while it was in use", where=self.name, mend="start the command again")
        self._blocks[block] = offsets[: rows + 1]
        if len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return self._blocks[block]

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        while start < end:
            chunk = os.pread(self._file(), min(_CHUNK, end - start), start)
            if not chunk:
                return
            yield start, chunk
            start += len(chunk)

    def _file(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        return self._descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None, "_blocks": OrderedDict()}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            with suppress(OSError):
                os.close(self._descriptor)  # type: ignore[arg-type]


def parse_line(line: bytes) -> Row | BadRow:
    """One line as an object, or why it is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("not valid JSON" if line.strip() else "an empty line")
    return value if isinstance(value, dict) else BadRow(f"not an object but {type(value).__name__}")


def write_index(path: str | Path) -> Path:
    """Count the rows of a JSONL file of any size once; later starts read the counts from `FILE.index.json`.

    Returns:
        the index's path.

    Raises:
        DataError: no such file, or a packed one.
        CheckpointError: the index cannot be written.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), mend="name a JSONL file")
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        raise DataError(f"a `{path.suffix}` file has no index", where=str(path), mend="name a plain JSONL file")
    rows, starts, fingerprint = _scan(path, str(path), None, any_size=True)
    content = {**_stamp(path), "rows": rows, "starts": starts.tolist(), "fingerprint": fingerprint}
    return atomic_write(_index_path(path), json.dumps(content))


def unpacked(path: Path, name: str) -> Path:
    """The decompressed twin of a `.gz` file, made once in the cache folder."""
    key = hashlib.blake2b(repr((str(path.resolve()), _stamp(path))).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / "unpacked"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{key}.jsonl"
    if target.exists():
        return target
    aside = folder / f".{key}.{secrets.token_hex(4)}"
    try:
        with gzip.open(path, "rb") as packed, open(aside, "xb") as plain:
            size = 0
            while chunk := packed.read(_CHUNK):
                size += len(chunk)
                if size > SCAN_LIMIT:
                    raise _too_large(name, "unpacked it is", "unpack it, then ")
                plain.write(chunk)
        os.replace(aside, target)
    except (OSError, EOFError) as error:
        raise DataError("cannot be decompressed", where=name, why=str(error), mend="check the file") from error
    finally:
        aside.unlink(missing_ok=True)
    return target


def cache_folder() -> Path:
    """`$ALIGN_CACHE`, else `~/.cache/align`, else (no writable home) a folder of this user under the temporary one."""
    given = os.environ.get("ALIGN_CACHE")
    folder = Path(given) if given else Path(os.path.expanduser("~")) / ".cache" / "align"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="align-"))


def _scan(path: Path, name: str, max_rows: int | None, any_size: bool = False) -> tuple[int, np.ndarray, str]:
    """(rows, byte offsets of the blocks and of the end, fingerprint) in one pass over the bytes."""
    hasher = hashlib.blake2b(digest_size=32)
    starts, seen, base = [0], 0, 0
    with open(path, "rb") as file:
        end = _content_end(file)
        while base < end:
            chunk = file.read(min(_CHUNK, end - base))
            if not chunk:
                break
            newlines = _newlines(chunk)
            first = BLOCK - seen % BLOCK - 1
            starts.extend((newlines[first::BLOCK] + base + 1).tolist())
            hasher.update(chunk)
            seen += len(newlines)
            base += len(chunk)
            if max_rows is not None and seen >= max_rows:
                break
            if base > SCAN_LIMIT and not any_size:
                raise _too_large(name, "it is")
    whole = base >= end
    rows = seen + (1 if whole and end > 0 else 0)
    if max_rows is not None:
        rows = min(rows, max_rows)
    hasher.update(str(rows).encode())
    blocks = -(-rows // BLOCK)
    # `base` stands behind the last row wanted; a block is read up to its own end, so more bytes do no harm.
    offsets = np.array([*starts[:blocks], starts[blocks] if blocks < len(starts) else base], dtype=np.int64)
    return rows, offsets, hasher.hexdigest()


def _content_end(file: Any) -> int:
    """The size of a file without the white space at its end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        tail = file.read(end - start).rstrip(_WHITESPACE)
        if tail:
            end = start + len(tail)
            break
        end = start
    file.seek(0)
    return int(end)


def _newlines(chunk: bytes) -> np.ndarray:
    return np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10)


def _too_large(name: str, subject: str, first: str = "") -> DataError:
    return DataError(
        f"{subject} larger than {SCAN_LIMIT >> 30} GB, and its rows are not counted at every start",
        where=name,
        why="epochs and schedules need the number of rows",
        mend=f"{first}convert it to Parquet, set `max_rows`, or index it once: align data index FILE",
    )


def _index_path(path: Path) -> Path:
    return path.with_name(path.name + ".index.json")


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _read_index(path: Path) -> tuple[int, np.ndarray, str] | None:
    try:
        content = json.loads(_index_path(path).read_text(encoding="utf-8"))
        if {key: content[key] for key in ("size", "mtime_ns")} != _stamp(path):
            return None
        return int(content["rows"]), np.array(content["starts"], dtype=np.int64), str(content["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
