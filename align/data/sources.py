"""Where rows come from: files, folders, `datasets` objects, hub ids and lists, all counted without parsing a row."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.compat import datasets as hf
from align.core.errors import DataError
from align.core.hashing import digest
from align.data.groups import RowId
from align.data.jsonl import SCAN_LIMIT, JsonlFile, unpacked
from align.data.rows import BadRow, Row
from align.data.splits import Purpose, choose_split, files_by_split

_JSON_LIMIT = 64 << 20
_SAMPLED_ROWS = 256


class Source(ABC):
    """Rows by number.

    Attributes:
        name: the source as the user named it.
        rows_parsed: rows turned into objects so far in this process.
        fingerprint: a digest of the content; files up to 1 GB are read whole, larger ones by their ends.
        of_lines: whether the rows are the lines of the file `name`.
    """

    def __init__(self, name: str, fingerprint: str, rows: int) -> None:
        self.name, self.fingerprint, self._rows = name, fingerprint, rows
        self.rows_parsed = 0
        self.of_lines = False

    def __len__(self) -> int:
        return self._rows

    def read(self, indices: Sequence[int]) -> list[Row | BadRow]:
        """The rows at `indices`, in that order; a row that cannot be read is a `BadRow`."""
        self.rows_parsed += len(indices)
        return self._read([int(index) for index in indices])

    def row_id(self, index: int) -> RowId:
        """The file and line, or the name and number, under which a user finds the row."""
        return RowId(self.name, int(index), line=int(index) + 1 if self.of_lines else None)

    def rename(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def _read(self, indices: list[int]) -> list[Row | BadRow]: ...


def open_source(
    name: Any,
    split: str | None = None,
    max_rows: int | None = None,
    revision: str | None = None,
    *,
    config: str | None = None,
    data_dir: str | None = None,
    purpose: Purpose = "train",
    prefer: Sequence[str] = (),
) -> Source:
    """Open rows of any kind.

    Args:
        name: a `.jsonl`, `.jsonl.gz`, `.json` or `.parquet` file, a folder of them or of `save_to_disk`, a hub id,
            a `datasets.Dataset`, or a sequence of dictionaries.
        split: which split, where there are several; otherwise see `choose_split`.
        max_rows: only the first rows.
        revision, config, data_dir: of a hub id.
        purpose: training takes no test split unless it is named; evaluation takes one where there is one.
        prefer: splits that are taken first where they are there.

    Raises:
        DataError: nothing is there, or not that split; it lists what is there.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"`max_rows` is {max_rows}", where=str(name), mend="use a number above 0, or leave it out")
    if isinstance(name, (str, Path)):
        choose = partial(choose_split, asked=split, where=str(name), purpose=purpose, prefer=prefer)
        source = _open_name(str(name), choose, max_rows, revision, config, data_dir)
    elif hf.is_iterable_dataset(name):
        raise DataError(
            "an `IterableDataset` has no length and no random access",
            mend="save it as JSONL or Parquet, or pass a `datasets.Dataset`",
        )
    elif hf.is_dataset_dict(name):
        chosen = choose_split(list(name), split, "the `DatasetDict`", purpose, prefer)
        source = _from_dataset(name[chosen], "dataset", max_rows)
    elif hf.is_dataset(name):
        source = _from_dataset(name, "dataset", max_rows)
    elif isinstance(name, Sequence):
        source = _Rows(name, "rows", max_rows)
    else:
        raise DataError(f"data of type {type(name).__name__}", mend="give a file, folder, hub id, Dataset or list")
    if not len(source):
        raise DataError("there are no rows", where=source.name, mend="name a file or split that holds some")
    return source


def _open_name(
    name: str,
    choose: Callable[[Sequence[str]], str],
    max_rows: int | None,
    revision: str | None,
    config: str | None,
    data_dir: str | None,
) -> Source:
    path = Path(name).expanduser()
    _refuse_hub_options(path, name, revision=revision, config=config, data_dir=data_dir)
    if path.is_file():
        choose(["train"])
        return _open_files([path], name, max_rows)
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            saved = hf.load_saved(path)
            return _from_dataset(saved[choose(list(saved))], name, max_rows)
        if (path / "state.json").exists() and (path / "dataset_info.json").exists():
            return _from_dataset(hf.load_saved(path), name, max_rows)
        files = files_by_split(path)
        return _open_files(files[choose(list(files))], name, max_rows)
    if _looks_like_path(name):
        raise _missing(path, name)
    return _open_hub(name, choose, max_rows, revision, config, data_dir)


def _refuse_hub_options(path: Path, name: str, **options: str | None) -> None:
    """A local path has no revision, config or data folder: an option that nothing reads is an error."""
    given = [option for option, value in options.items() if value is not None]
    if given and path.exists():
        raise DataError(
            f"`{given[0]}` is stated for a file or folder",
            where=name,
            why="it says what to load from the hub",
            mend=f"remove `{given[0]}`" + ("; name the folder itself" if given[0] == "data_dir" else ""),
        )


def _open_files(files: list[Path], name: str, max_rows: int | None) -> Source:
    kinds = {_kind(file) for file in files}
    if kinds == {"parquet"}:
        return _from_dataset(_load_parquet(files, name), name, max_rows, fingerprint=_files_digest(files))
    if kinds <= {"jsonl", "gz", "json"}:
        if len(files) == 1 and kinds == {"json"} and _first_byte(files[0]) == b"[":
            return _json_list(files[0], name, max_rows)
        return _Jsonl(files, name, max_rows)
    raise DataError(
        "this kind of file is not read",
        where=name,
        why=", ".join(sorted({file.name for file in files})[:5]),
        mend="use .jsonl, .jsonl.gz, .json or .parquet",
    )


def _kind(file: Path) -> str:
    if file.name.endswith((".jsonl.gz", ".json.gz", ".ndjson.gz")):
        return "gz"
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}.get(file.suffix, "other")


class _Jsonl(Source):
    """One JSONL file or several, end to end."""

    def __init__(self, files: list[Path], name: str, max_rows: int | None) -> None:
        self._files: list[JsonlFile] = []
        left = max_rows
        for file in files:
            plain = unpacked(file, str(file)) if _kind(file) == "gz" else file
            opened = JsonlFile(plain, name if len(files) == 1 else str(file), left)
            if len(opened):
                self._files.append(opened)
            left = None if left is None else left - len(opened)
            if left == 0:
                break
        self._ends = list(itertools.accumulate(len(file) for file in self._files))
        fingerprint = digest([file.fingerprint for file in self._files])
        super().__init__(name, fingerprint, self._ends[-1] if self._ends else 0)

    def _read(self, indices: list[int]) -> list[Row | BadRow]:
        return [file.read(row) for file, row in map(self._locate, indices)]

    def row_id(self, index: int) -> RowId:
        file, row = self._locate(int(index))
        return RowId(self.name if len(self._files) == 1 else file.name, row, line=row + 1)

    def rename(self, name: str) -> None:
        for file in self._files:
            file.name = file.name + name.removeprefix(self.name)
        super().rename(name)

    def _locate(self, index: int) -> tuple[JsonlFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        return self._files[place], index - (self._ends[place - 1] if place else 0)


class _Rows(Source):
    """Dictionaries in memory."""

    def __init__(self, rows: Sequence[Any], name: str, max_rows: int | None, fingerprint: str = "") -> None:
        count = len(rows) if max_rows is None else min(max_rows, len(rows))
        self._items = rows
        super().__init__(name, fingerprint or _rows_digest(itertools.islice(rows, count)), count)

    def _read(self, indices: list[int]) -> list[Row | BadRow]:
        found = [self._items[index] for index in indices]
        return [dict(row) if isinstance(row, Mapping) else _not_an_object(row) for row in found]


class _Dataset(Source):
    """A memory-mapped (or in-memory) `datasets.Dataset`."""

    def __init__(self, dataset: Any, name: str, fingerprint: str) -> None:
        self._dataset = dataset.with_format(None)
        super().__init__(name, fingerprint, len(dataset))

    def _read(self, indices: list[int]) -> list[Row | BadRow]:
        return _dataset_rows(self._dataset, indices)


def _dataset_rows(dataset: Any, indices: list[int]) -> list[Row | BadRow]:
    if not indices:
        return []
    columns = dataset[indices]
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _from_dataset(dataset: Any, name: str, max_rows: int | None, fingerprint: str = "") -> Source:
    if max_rows is not None and max_rows < len(dataset):
        dataset = dataset.select(range(max_rows))
    if not fingerprint:
        fingerprint = _dataset_digest(dataset)
    return _Dataset(dataset, name, digest([fingerprint, len(dataset)]))


def _dataset_digest(dataset: Any) -> str:
    """Of the files behind it, and of rows evenly spaced in it (which tell a shuffled or filtered one)."""
    count = len(dataset)
    spaced = sorted({index * count // _SAMPLED_ROWS for index in range(_SAMPLED_ROWS)}) if count else []
    files = [Path(file["filename"]) for file in dataset.cache_files]
    rows = _rows_digest(_dataset_rows(dataset.with_format(None), spaced))
    # Without files the private fingerprint is a hash of the table; with them it holds times of change.
    own = hf.private_fingerprint(dataset) if not files else _files_digest(files)
    return digest([count, list(dataset.column_names), own, rows])


def _load_parquet(files: list[Path], name: str) -> Any:
    try:
        return hf.load_parquet(files)
    except Exception as error:  # `datasets` wraps what pyarrow raises in types of its own
        raise DataError(
            "cannot be read as Parquet",
            where=name,
            why=str(error.__cause__ or error).splitlines()[0],
            mend="check that the file is whole",
        ) from error


def _json_list(file: Path, name: str, max_rows: int | None) -> Source:
    if file.stat().st_size > _JSON_LIMIT:
        raise DataError(
            f"a JSON list of more than {_JSON_LIMIT >> 20} MB must be parsed whole to count its rows",
            where=name,
            mend="write it as JSONL: one object a line",
        )
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError("not valid JSON", where=name, why=str(error), mend="check that the file is whole") from error
    source = _Rows(rows, name, max_rows, digest(_files_digest([file])))
    source.rows_parsed = len(rows)
    return source


def _open_hub(
    name: str,
    choose: Callable[[Sequence[str]], str],
    max_rows: int | None,
    revision: str | None,
    config: str | None,
    data_dir: str | None,
) -> Source:
    try:
        loaded = hf.load_hub(name, config, data_dir, revision)
    except Exception as error:  # the hub client raises dozens of types: offline, not found, gated, script-based
        lines = str(error).splitlines()
        raise DataError(
            f"there is no file or folder `{name}`, and it cannot be loaded from the hub",
            why=lines[0] if lines else type(error).__name__,
            mend="check the name, the network (HF_HUB_OFFLINE) and the rights; `config` or `data_dir` may be needed",
        ) from error
    return _from_dataset(loaded[choose(list(loaded))], name, max_rows)


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or name.endswith((".jsonl", ".json", ".gz", ".parquet", ".ndjson", "/", ".csv", ".txt", ".arrow"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    )


def _missing(path: Path, name: str) -> DataError:
    parent = path.parent
    there = sorted(entry.name for entry in parent.iterdir())[:20] if parent.is_dir() else []
    return DataError(
        "there is no such file or folder",
        where=name,
        why=f"`{parent}` holds: {', '.join(there) or 'nothing'}" if parent.is_dir() else f"`{parent}` is no folder",
        mend="check the path",
    )


def _files_digest(files: Sequence[Path]) -> str:
    hasher = hashlib.blake2b(digest_size=32)
    total = sum(file.stat().st_size for file in files)
    for file in files:
        size = file.stat().st_size
        hasher.update(str(size).encode())
        with open(file, "rb") as opened:
            if total <= SCAN_LIMIT:
                while chunk := opened.read(1 << 20):
                    hasher.update(chunk)
            else:
                hasher.update(opened.read(1 << 20))
                opened.seek(max(0, size - (1 << 20)))
                hasher.update(opened.read())
    return hasher.hexdigest()


def _rows_digest(rows: Any) -> str:
    hasher = hashlib.blake2b(digest_size=32)
    for row in rows:
        hasher.update(json.dumps(row, sort_keys=True, default=repr, skipkeys=True).encode() + b"\n")
    return hasher.hexdigest()


def _first_byte(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _not_an_object(value: Any) -> BadRow:
    return BadRow(f"not an object but {type(value).__name__}")
