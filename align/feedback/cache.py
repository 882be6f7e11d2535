"""Judgements by content, on disk: append-only, crash-safe, so that a paid one is never bought twice."""

from __future__ import annotations

import json
import logging
import os
import uuid
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from align.core.errors import CheckpointError

_log = logging.getLogger(__name__)
SUFFIX = ".jsonl"


class JudgementCache:
    """key (text) -> JSON value.

    Each process writes a file of its own in the folder and reads all of them when the cache is opened. A line counts if
    its checksum holds; one that a kill tore, or that was damaged, is dropped with a line in the log and judged anew.

    Args:
        folder: made when something is written.

    Attributes:
        hits, misses: of `get`. dropped: lines whose checksum does not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.hits = self.misses = self.dropped = 0
        self._values: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        self._pid = 0
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else []:
            self._read(path)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any:
        """The value, or None."""
        value = self._values.get(key)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def put(self, key: str, value: Any) -> None:
        """Append one value, in one write: a killed process loses no line that was put.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written; what is paid for must not be lost.
        """
        body = json.dumps([key, value], separators=(",", ":"))
        line = f"{zlib.crc32(body.encode()):08x} {body}\n".encode()
        try:
            self._writer().write(line)
        except OSError as error:
            raise CheckpointError(
                "the cache of judgements cannot be written",
                where=str(self.folder),
                why=error.strerror or str(error),
                mend="free space, or name another folder in `cache`",
            ) from error
        self._values[key] = value

    def sync(self) -> None:
        """Force what was put to the disk; a kill loses nothing without it, a power cut may."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def _writer(self) -> BinaryIO:
        if self._file is not None and self._pid == os.getpid():
            return self._file
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}{SUFFIX}"
        self._file, self._pid = open(path, "xb", buffering=0), os.getpid()  # noqa: SIM115 - open for the cache's life
        return self._file

    def _read(self, path: Path) -> None:
        dropped = 0
        for line in path.read_bytes().split(b"\n"):
            if not line:
                continue
            sum_, _, body = line.partition(b" ")
            if sum_ != f"{zlib.crc32(body):08x}".encode():
                dropped += 1
                continue
            key, value = json.loads(body)
            self._values[key] = value
        if dropped:
            self.dropped += dropped
            _log.warning("%s: %d damaged lines (a kill tears the last one); they are judged again", path, dropped)
