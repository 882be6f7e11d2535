"""The on-disk cache of per-token log-probs: append-only, crash-safe, shared by all methods and runs."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from align.core.errors import CheckpointError, DataError
from align.core.files import atomic_write
from align.core.hashing import digest
from align.reference.index import Index
from align.reference.records import KEY_BYTES, SUFFIX, Walk, encode, read

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers")
_SCORING_VERSION = 1
"""Raise it when a change of `align.scoring` changes log-probs by more than rounding."""


def _versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {**found, "align.scoring": str(_SCORING_VERSION)}


@dataclass(frozen=True)
class StoreKey:
    """All that determines the numbers of a store, and nothing else: no learning rate, method or output folder.

    Attributes:
        weights: hash of the model's weights and configuration (`weights_hash.folder_hash` or `module_hash`).
        adapter: hash of the adapter's weights; empty without one.
        dtype: dtype of the computation, for example `float32`.
        backend: attention back end, for example `tree`.
        temperature: divides the logits.
        softcap: final soft-cap of the logits where it is not the model's own.
        versions: library -> version.
    """

    weights: str
    dtype: str
    backend: str
    adapter: str = ""
    temperature: float = 1.0
    softcap: float | None = None
    versions: Mapping[str, str] = field(default_factory=_versions)

    @property
    def digest(self) -> str:
        return digest(asdict(self))[:32]


def store_key(
    weights: str,
    *,
    dtype: str,
    backend: str,
    adapter: str = "",
    temperature: float = 1.0,
    softcap: float | None = None,
    versions: Mapping[str, str] | None = None,
) -> StoreKey:
    """The key of a store; `versions` are the installed ones by default."""
    return StoreKey(
        weights=weights,
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        adapter=adapter,
        temperature=float(temperature),
        softcap=None if softcap is None else float(softcap),
        versions=dict(_versions() if versions is None else versions),
    )


def entry_key(prompt: np.ndarray, completion: np.ndarray, scored: np.ndarray) -> bytes:
    """The key of one completion: ids of the prompt [P] and of the completion [T], and which tokens count, bool [T]."""
    key = blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    key.update(np.ascontiguousarray(prompt, dtype="<i8").tobytes())
    key.update(np.ascontiguousarray(completion, dtype="<i8").tobytes())
    key.update(np.packbits(np.asarray(scored, dtype=bool)).tobytes())
    return key.digest()


def default_cache_dir() -> Path:
    """`$ALIGN_CACHE/logps`, else `align/logps` in the user's cache folder. Never in an output folder: runs share it."""
    named = os.environ.get("ALIGN_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "align"
    return (Path(named) if named else base).expanduser() / "logps"


class LogpStore:
    """float32 log-probs per scored token of a completion, by `entry_key`.

    Any number of processes may read and write one folder at once: each writes a file of its own and reads all of them.
    A record is used only if its checksum holds. What a killed writer left unfinished is ignored; a damaged record is
    reported once and counts as missing, so that the caller computes it again.

    Args:
        directory: the cache folder; each key has a folder of its own in it.
        key: what determines the numbers.

    Attributes:
        hits, misses, damaged: entries found, not found, and found damaged by `get_many`.
    """

    def __init__(self, directory: str | os.PathLike[str], key: StoreKey) -> None:
        self.key = key
        self.path = Path(directory) / key.digest
        self.hits = self.misses = self.damaged = 0
        self._index = Index()
        self._walks: list[Walk] = []
        self._known: set[Path] = set()
        self._reported: set[tuple[int, int]] = set()
        self._writer: BinaryIO | None = None
        self._writer_number = -1
        self._writer_pid = self._written = 0
        self._full = False
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Take in what other processes have appended since the last look."""
        if not self.path.is_dir():
            return
        for path in sorted(self.path.glob(f"*{SUFFIX}")):
            if path not in self._known:
                self._known.add(path)
                self._walks.append(Walk(path))
        for number, walk in enumerate(self._walks):
            if number == self._writer_number:
                continue
            skipped = walk.skipped_bytes
            for key, offset in walk:
                self._index.add(key, number, offset)
            if walk.skipped_bytes > skipped:
                self._report(walk.path, f"{walk.skipped_bytes - skipped} bytes with a damaged record header")

    def get_many(self, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """Values float32 [T] for each key, None where there are none or they are damaged."""
        found = self._lookup(keys)
        if any(values is None for values in found):
            before = len(self._index)
            self.refresh()
            if len(self._index) > before:
                found = self._lookup(keys)
        hits = sum(values is not None for values in found)
        self.hits += hits
        self.misses += len(found) - hits
        return found

    def put_many(self, entries: Mapping[bytes, np.ndarray]) -> None:
        """Append the entries. Where the disk refuses, say it once and go on without caching."""
        for values in entries.values():
            _check(values)
        if not entries or self._full:
            return
        records = {key: encode(key, values) for key, values in entries.items()}
        writer = self._open_writer()
        start = self._written
        try:
            _write_all(writer.fileno(), b"".join(records.values()))
        except OSError as error:
            os.ftruncate(writer.fileno(), start)
            self._full = True
            log.warning("%s: cannot write the log-prob cache (%s); going on without it", self.path, error.strerror)
            return
        for key, record in records.items():
            self._index.add(key, self._writer_number, start)
            start += len(record)
        self._written = start

    def sync(self) -> None:
        """Force what was written to the disk. A killed process loses nothing without it; a power cut may."""
        if self._writer is not None:
            os.fsync(self._writer.fileno())

    def close(self) -> None:
        if self._writer is not None:
            self.sync()
            self._writer.close()
            # The file stays readable under its number, and all of it is in the index; a later write opens a new one.
            self._walks[self._writer_number].position = self._written
            self._writer, self._writer_number = None, -1

    def _lookup(self, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """Candidates are read file by file in the order of their offsets; the newest record that holds wins."""
        found: list[np.ndarray | None] = [None] * len(keys)
        candidates = [list(self._index.find(key)) for key in keys]
        for attempt in range(max(map(len, candidates), default=0)):
            places = [
                (*options[attempt], position)
                for position, options in enumerate(candidates)
                if found[position] is None and attempt < len(options)
            ]
            for number, items in groupby(sorted(places), key=lambda place: place[0]):
                try:
                    with open(self._walks[number].path, "rb") as file:
                        for _, offset, position in items:
                            found[position] = self._read(file, number, offset, keys[position])
                except FileNotFoundError:
                    continue
        return found

    def _read(self, file: BinaryIO, number: int, offset: int, key: bytes) -> np.ndarray | None:
        record = read(file, offset)
        if record is None:
            if (number, offset) not in self._reported:
                self._reported.add((number, offset))
                self._report(self._walks[number].path, f"the record at byte {offset} fails its checksum")
            return None
        return record[1] if record[0] == key else None

    def _report(self, path: Path, what: str) -> None:
        self.damaged += 1
        log.warning("%s: %s; it is computed again", path, what)

    def _open_writer(self) -> BinaryIO:
        if self._writer is not None and self._writer_pid == os.getpid():
            return self._writer
        if self._writer is not None:  # a fork: the file belongs to the parent
            self._writer.close()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._describe()
            path = self.path / f"{os.getpid()}-{uuid.uuid4().hex[:12]}{SUFFIX}"
            self._writer = open(path, "xb", buffering=0)  # noqa: SIM115 - open for the life of the store
        except OSError as error:
            raise CheckpointError(
                "the log-prob cache cannot be written",
                where=str(self.path),
                why=error.strerror or str(error),
                mend="name a folder that can be written in ALIGN_CACHE",
            ) from error
        self._writer_pid, self._written = os.getpid(), 0
        self._writer_number = len(self._walks)
        self._walks.append(Walk(path))
        self._known.add(path)
        return self._writer

    def _describe(self) -> None:
        """What the folder's name stands for, for a reader with an editor; nothing reads it back."""
        target = self.path / "key.json"
        if not target.exists():
            atomic_write(target, json.dumps(asdict(self.key), indent=2, sort_keys=True) + "\n")


class MemoryStore:
    """The same lookups over values in memory, for log-probs that the user supplies with the data."""

    def __init__(self) -> None:
        self._values: dict[bytes, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get_many(self, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        return [self._values.get(key) for key in keys]

    def put_many(self, entries: Mapping[bytes, np.ndarray]) -> None:
        for key, values in entries.items():
            _check(values)
            self._values[key] = np.asarray(values, dtype=np.float32)


def _check(values: np.ndarray) -> None:
    if values.ndim != 1:
        raise DataError(f"log-probs of one completion have shape {values.shape}, expected [T]")
    if not np.isfinite(values).all():
        raise DataError("log-probs to be cached are not finite", mend="look at the reference model and its dtype")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
