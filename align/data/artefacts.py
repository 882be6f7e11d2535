"""Artefacts: folders of Parquet parts, one a numbered chunk of work, that are made once and say what they are.

    samples/
      key.json               everything that determines the rows, written first
      part-000000.parquet    a chunk each; a part is there whole or not at all
      manifest.json          written last: counts, the command, versions, sha256 of every file

The same rows give the same bytes: the settings of the writer are fixed and nothing holds a time. `data.train: [FOLDER]`
reads the parts of a folder as one data set.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.core.chunks import Numbered
from align.core.errors import CheckpointError
from align.core.files import MANIFEST, atomic_write, verify_manifest, write_manifest
from align.core.hashing import file_digest

_HEAD = b"align"
_KEY = "key.json"
_OWN = ("total", "chunk_size")
"""What `Numbered` adds to a key."""
Counts = Mapping[str, Mapping[str, int]]
"""What became of the items of a chunk: kind -> name -> number."""


class Artefact(Numbered):
    """Numbered chunks of rows as Parquet parts. See `Numbered` for `missing`, `items`, `write` and `read`.

    Args:
        folder: where; made where it is not there.
        key: what determines the rows (JSON).
        total, size: items in all, and of a chunk. A chunk may have any number of rows.
        schema: of the rows; None for an artefact that is read only.
        restart: throw away what another key left there.

    Raises:
        CheckpointError: the folder holds work of another key; the error names what differs.
    """

    def __init__(
        self,
        folder: str | Path,
        key: Mapping[str, Any],
        total: int,
        size: int,
        schema: pa.Schema | None = None,
        restart: bool = False,
    ) -> None:
        super().__init__(folder, key, total, size, restart)
        self.schema = schema

    @classmethod
    def open(cls, folder: str | Path, mend: str) -> Artefact:
        """A finished artefact, every file of it checked.

        Args:
            mend: how to make it, for the error.

        Raises:
            CheckpointError: it is not there, not finished, or not as it was written.
        """
        folder = Path(folder)
        if not (folder / _KEY).is_file() or not (folder / MANIFEST).is_file():
            begun = (folder / _KEY).is_file()
            raise CheckpointError(
                "is begun and not finished" if begun else "is not there", where=str(folder), mend=mend
            )
        verify_manifest(folder)
        key = json.loads((folder / _KEY).read_text(encoding="utf-8"))
        own = {name: value for name, value in key.items() if name not in _OWN}
        return cls(folder, own, key["total"], key["chunk_size"])

    @property
    def done(self) -> bool:
        """Whether it was finished."""
        return self.info is not None

    @property
    def info(self) -> dict[str, Any] | None:
        """What `finish` noted; None before."""
        if not (self.folder / MANIFEST).is_file():
            return None
        return verify_manifest(self.folder, hashes=False)

    @property
    def content(self) -> str:
        """A digest of the finished artefact: of its rows and of all that it says of them."""
        return file_digest(self.folder / MANIFEST)

    def counts(self) -> dict[str, dict[str, int]]:
        """The sums of what the finished chunks' accounts counted."""
        sums: dict[str, Counter[str]] = {}
        for chunk in self.finished:
            for kind, numbers in self.account(chunk).items():
                sums.setdefault(kind, Counter()).update(numbers)
        return {kind: dict(sorted(numbers.items())) for kind, numbers in sorted(sums.items())}

    def account(self, chunk: int) -> Counts:
        """What `write` was told of a finished chunk beside its rows."""
        head = _head(pq.read_schema(self._file(chunk)))
        return head.get("account", {})  # type: ignore[no-any-return]

    def finish(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Write the manifest; return its `info`: the given one with the key's digest and the counts.

        Args:
            info: what is told of the whole, the same for the same rows (no times).

        Raises:
            CheckpointError: a chunk is missing.
        """
        if self.missing:
            raise CheckpointError(f"{len(self.missing)} of {len(self)} chunks are missing", where=str(self.folder))
        whole = {**info, "key": self.digest, "chunks": len(self), "counts": self.counts()}
        write_manifest(self.folder, whole)
        return whole

    def reopen(self, chunk: int) -> None:
        """Throw a finished chunk away, and the manifest with it: the artefact is not finished before that is done."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        self._file(chunk).unlink(missing_ok=True)

    def _name(self, chunk: int) -> str:
        return f"part-{chunk:06d}.parquet"

    def _store(self, file: Path, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        if self.schema is None:
            raise CheckpointError("the artefact was opened to be read", where=str(self.folder))
        schema = self.schema.with_metadata({_HEAD: json.dumps(head, sort_keys=True, ensure_ascii=True).encode()})
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        sink = pa.BufferOutputStream()
        # Every setting that reaches the bytes is written down: defaults may change with a version.
        pq.write_table(
            table,
            sink,
            compression="zstd",
            compression_level=3,
            version="2.6",
            data_page_version="1.0",
            use_dictionary=True,
        )
        atomic_write(file, sink.getvalue().to_pybytes())

    def _load(self, file: Path) -> tuple[Any, list[dict[str, Any]]]:
        table = pq.ParquetFile(file).read()
        return _head(table.schema), table.to_pylist()


def _head(schema: pa.Schema) -> dict[str, Any]:
    """What `Numbered` wrote of a part.

    Raises:
        ValueError: nothing is there.
    """
    metadata = schema.metadata or {}
    if _HEAD not in metadata:
        raise ValueError("it is no part of an artefact")
    return dict(json.loads(metadata[_HEAD]))
