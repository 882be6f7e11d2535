"""The records of a log-prob store's files: how one is written, and how a file is walked past torn and damaged ones."""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

KEY_BYTES = 16
SUFFIX = ".logp"

_MAGIC = b"aLP1"
_HEADER = struct.Struct(f"<4s{KEY_BYTES}sI8sI")
"""magic, key, number of float32 values, blake2b-64 of key and values, crc32 of the header before it."""
_CRC = struct.Struct("<I")


def encode(key: bytes, values: np.ndarray) -> bytes:
    """One record. `values` float32 [T]."""
    payload = np.ascontiguousarray(values, dtype="<f4").tobytes()
    fields = _HEADER.pack(_MAGIC, key, len(payload) // 4, _checksum(key, payload), 0)[: -_CRC.size]
    return fields + _CRC.pack(zlib.crc32(fields)) + payload


def read(file: BinaryIO, offset: int) -> tuple[bytes, np.ndarray] | None:
    """The key and the values of the record at `offset`, or None where it is damaged."""
    file.seek(offset)
    header = _parse(file.read(_HEADER.size))
    if header is None:
        return None
    payload = file.read(4 * header.count)
    if len(payload) < 4 * header.count or _checksum(header.key, payload) != header.checksum:
        return None
    return header.key, np.frombuffer(payload, dtype="<f4").astype(np.float32)


@dataclass
class Walk:
    """Walks a file's records from `position`. Afterwards `position` is where the next complete record may begin.

    Only headers are read; values are checked when they are wanted. A header that fails its checksum is skipped up to
    the next one that holds. An incomplete record at the end is left alone: its writer may be alive and not finished.
    """

    path: Path
    position: int = 0
    skipped_bytes: int = 0

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        """(key, offset) of each complete record."""
        size = self.path.stat().st_size
        if size - self.position < _HEADER.size:
            return
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
            while self.position + _HEADER.size <= size:
                header = _parse(view[self.position : self.position + _HEADER.size])
                if header is None:
                    found = _next_header(view, self.position + 1)
                    if found is None:
                        return
                    self.skipped_bytes += found - self.position
                    self.position = found
                    continue
                end = self.position + _HEADER.size + 4 * header.count
                if end > size:
                    return
                yield header.key, self.position
                self.position = end


@dataclass(frozen=True)
class _Header:
    key: bytes
    count: int
    checksum: bytes


def _parse(data: bytes) -> _Header | None:
    if len(data) < _HEADER.size:
        return None
    magic, key, count, checksum, crc = _HEADER.unpack(data)
    if magic != _MAGIC or zlib.crc32(data[: -_CRC.size]) != crc:
        return None
    return _Header(key, count, checksum)


def _next_header(view: mmap.mmap, start: int) -> int | None:
    while (found := view.find(_MAGIC, start)) >= 0:
        if _parse(view[found : found + _HEADER.size]) is not None:
            return found
        start = found + 1
    return None


def _checksum(key: bytes, payload: bytes) -> bytes:
    return blake2b(payload, digest_size=8, key=key).digest()
