"""Which files and which split: `train` is found under its usual names, and a test split is never taken for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from align.core.errors import DataError

_DATA = (".parquet", ".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".ndjson.gz")
_HELD_OUT = re.compile(r"(^|[_\-. ])(test|val|valid|validation|dev|eval|evaluation|holdout|heldout)([_\-. ]|\d*$)")
_TRAIN = re.compile(r"(^|[_\-. ])train(ing)?([_\-. ]|\d*$)")
_SHARD = re.compile(r"[-_.]\d{1,6}(-of-\d{1,6})?$")
_METADATA = {"dataset_info.json", "state.json", "dataset_infos.json", "manifest.json", "config.json"}


def choose_split(there: Sequence[str], asked: str | None, where: str) -> str:
    """The split to read; see `open_source`."""
    if asked is not None:
        if asked in there:
            return asked
        raise DataError(
            f"there is no split `{asked}`", where=where, why=_listed(there), mend="set `split` to one of them"
        )
    if "train" in there:
        return "train"
    train = [name for name in there if _TRAIN.search(name) and not _HELD_OUT.search(name)]
    open_ones = train or [name for name in there if not _HELD_OUT.search(name)]
    if len(open_ones) == 1:
        return open_ones[0]
    raise DataError(
        "there is no split `train`" if not open_ones else "there are several splits to train on",
        where=where,
        why=_listed(there),
        mend="set `split` to one of them",
    )


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder (and its `data` folder) under the split that their names tell."""
    files = sorted(
        file
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in place.iterdir()
        if file.is_file()
        and file.name.endswith(_DATA)
        and file.name not in _METADATA
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
    )
    if not files:
        there = sorted(entry.name for entry in folder.iterdir())[:20]
        raise DataError(
            "there are no data files in this folder",
            where=str(folder),
            why=f"it holds: {', '.join(there) or 'nothing'}",
            mend="put .jsonl, .json or .parquet files there, or a folder of `datasets.save_to_disk`",
        )
    stems = {file: _SHARD.sub("", file.name.split(".")[0]) for file in files}
    if not any(_HELD_OUT.search(stem) or _TRAIN.search(stem) for stem in stems.values()):
        return {"train": files}  # names that tell no split: parts of one set
    found: dict[str, list[Path]] = {}
    for file, stem in stems.items():
        found.setdefault(stem, []).append(file)
    return found


def _listed(there: Sequence[str]) -> str:
    return "there are: " + ", ".join(f"`{name}`" for name in there)
