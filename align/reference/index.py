"""The in-memory index of a log-prob store: 16 bytes an entry, so a million completions cost 16 megabytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_OFFSET_BITS = 44
_MERGE_AT = 65_536


class Index:
    """Record hash (the first 8 bytes of an entry key) -> the places where records with that hash lie.

    Records carry their whole key, so two keys that share a hash cost a second look and never a wrong number. Recent
    entries stand in a dict; they are merged into sorted arrays once there are 65,536 of them.
    """

    def __init__(self) -> None:
        self._hashes = np.empty(0, dtype=np.uint64)
        self._places = np.empty(0, dtype=np.uint64)
        self._recent: dict[int, list[int]] = {}
        self._recent_size = 0

    def __len__(self) -> int:
        return len(self._hashes) + self._recent_size

    def add(self, key: bytes, file: int, offset: int) -> None:
        self._recent.setdefault(_hash(key), []).append(file << _OFFSET_BITS | offset)
        self._recent_size += 1
        if self._recent_size >= _MERGE_AT:
            self._merge()

    def find(self, key: bytes) -> Iterator[tuple[int, int]]:
        """(file, offset) of every record that may hold `key`, newest first."""
        wanted = _hash(key)
        for place in reversed(self._recent.get(wanted, [])):
            yield _unpack(place)
        probe = np.uint64(wanted)
        start = int(np.searchsorted(self._hashes, probe, side="left"))
        stop = int(np.searchsorted(self._hashes, probe, side="right"))
        for position in range(stop - 1, start - 1, -1):
            yield _unpack(int(self._places[position]))

    def _merge(self) -> None:
        pairs = [(hash_, place) for hash_, places in self._recent.items() for place in places]
        hashes = np.fromiter((pair[0] for pair in pairs), dtype=np.uint64, count=len(pairs))
        places = np.fromiter((pair[1] for pair in pairs), dtype=np.uint64, count=len(pairs))
        hashes, places = np.concatenate([self._hashes, hashes]), np.concatenate([self._places, places])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._places = hashes[order], places[order]
        self._recent.clear()
        self._recent_size = 0


def _hash(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


def _unpack(place: int) -> tuple[int, int]:
    return place >> _OFFSET_BITS, place & ((1 << _OFFSET_BITS) - 1)
