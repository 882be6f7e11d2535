"""Which files and which split: `train` is found under its usual names, and a test split is never taken for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from align.core.errors import DataError

Purpose = Literal["train", "eval"]

_log = logging.getLogger(__name__)
_USUAL: dict[Purpose, tuple[str, ...]] = {
    "train": ("train",),
    "eval": ("test", "test_prefs", "validation"),
}
_DATA = (".parquet", ".jsonl", ".jsonl.gz", ".ndjson", ".json", ".json.gz", ".ndjson.gz")
_HELD_OUT = re.compile(r"(^|[_\-. ])(test|val|valid|validation|dev|eval|evaluation|holdout|heldout)([_\-. ]|\d*$)")
_TRAIN = re.compile(r"(^|[_\-. ])train(ing)?([_\-. ]|\d*$)")
_SHARD = re.compile(r"[-_.]\d{1,6}(-of-\d{1,6})?$")
_METADATA = {"dataset_info.json", "state.json", "dataset_infos.json", "manifest.json", "key.json", "config.json"}


def choose_split(
    there: Sequence[str], asked: str | None, where: str, purpose: Purpose = "train", prefer: Sequence[str] = ()
) -> str:
    """The split to read.

    The one asked for; else the first of `prefer`; else for training `train`, or the only train split, or the only one
    that is no test split; for evaluation `test`, `test_prefs` or `validation`, or the only test split, or the only
    split there is.

    Raises:
        DataError: not there, or several would do; it lists what is there.
    """
    if asked is not None:
        if asked not in there:
            raise DataError(
                f"there is no split `{asked}`", where=where, why=_listed(there), mend="set `split` to one of them"
            )
        if purpose == "train" and _HELD_OUT.search(asked) and len(there) > 1:
            _log.warning("%s: `%s` is a held-out split, and is trained on because `split` says so", where, asked)
        return asked
    usual = _USUAL[purpose]
    for name in (*prefer, *usual):
        if name in there:
            return name
    held_out = [name for name in there if _HELD_OUT.search(name)]
    if purpose == "eval":
        open_ones = held_out or list(there)
    else:
        train = [name for name in there if _TRAIN.search(name) and name not in held_out]
        open_ones = train or [name for name in there if name not in held_out]
    if len(open_ones) == 1:
        return open_ones[0]
    wanted = "train on" if purpose == "train" else "evaluate on"
    raise DataError(
        f"there is no split `{usual[0]}`" if not open_ones else f"there are several splits to {wanted}",
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
