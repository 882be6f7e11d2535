"""Content hashes: the same value gives the same digest in every process, on every machine."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np


def digest(value: Any) -> str:
    """The blake2b-256 of a nested value, as 64 hexadecimal digits.

    Takes None, bool, int, float, str, bytes, paths, numpy scalars and arrays, and mappings, sequences and sets of
    these. Types are part of the value (`1`, `1.0`, `True` and `"1"` differ); a list equals a tuple; the order of a
    mapping or set does not matter; memory order and byte order of an array do not matter.

    Raises:
        TypeError: the value holds something else, whose text would not be stable.
    """
    return hashlib.blake2b(encode(value), digest_size=32).hexdigest()


def file_digest(path: str | Path) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode(value: Any) -> bytes:
    """A prefix-free encoding of a nested value: a tag, a length, the content."""
    tag, content = _content(value)
    return tag + struct.pack("<Q", len(content)) + content


def _content(value: Any) -> tuple[bytes, bytes]:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return b"n", b""
    if isinstance(value, bool):
        return b"b", b"1" if value else b"0"
    if isinstance(value, int):
        return b"i", str(value).encode()
    if isinstance(value, float):
        return b"f", struct.pack("<d", value) if value == value else b"nan"
    if isinstance(value, (str, Path)):
        return b"s", str(value).encode("utf-8", "surrogatepass")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return b"y", bytes(value)
    if isinstance(value, np.ndarray):
        return b"a", _array(value)
    if isinstance(value, Mapping):
        return b"m", b"".join(sorted(encode(key) + encode(item) for key, item in value.items()))
    if isinstance(value, Set):
        return b"t", b"".join(sorted(encode(item) for item in value))
    if isinstance(value, (list, tuple)):
        return b"l", b"".join(encode(item) for item in value)
    raise TypeError(f"no stable digest of a {type(value).__module__}.{type(value).__qualname__}")


def _array(value: np.ndarray) -> bytes:
    if value.dtype.hasobject:
        raise TypeError("no stable digest of an array of Python objects")
    little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
    return encode([little.dtype.str, list(value.shape)]) + little.tobytes()
