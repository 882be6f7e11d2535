"""An entry of TRL's `datasets` as streams of a recipe: a hub data set, or files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core.errors import ConfigError, suggestion

KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")
FILES = ("json", "parquet")
"""`path` names that mean files, of the kinds that are read here."""
OTHER_FILES = ("csv", "text", "arrow", "pandas", "xml", "sql", "webdataset", "imagefolder", "audiofolder")


def streams_of(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The streams of one entry (`path` and its options as in `load_dataset`), joined in this order.

    Raises:
        ConfigError: an option that has no counterpart, files of another kind, or no files.
    """
    path, files = str(entry["path"]), entry.get("data_files")
    for key in entry:
        if key not in KEYS:
            raise ConfigError(f"TRL's `datasets` have no `{key}`", mend=suggestion(str(key), KEYS))
    if entry.get("fraction") is not None:
        why = "TRL keeps a share of each so that the mixture has these shares"
        raise ConfigError(f"`fraction` of `{path}` has no counterpart", why=why, mend="write `weight` or `max_rows`")
    if path in OTHER_FILES:
        raise ConfigError(f"`path: {path}` names files that are not read", mend="save them as JSONL or Parquet")
    if path in FILES:
        return _of_files(path, files, entry.get("data_dir"), str(entry.get("split", "train")))
    if files is None:
        stream = {"name": path, "split": entry.get("split", "train")}
        return [stream | {ours: entry[key] for key, ours in _HUB.items() if entry.get(key)}]
    if path[0] in "./~" or Path(path).expanduser().is_dir():
        folder = os.path.join(path, entry["data_dir"]) if entry.get("data_dir") else path
        return _of_files(path, files, folder, str(entry.get("split", "train")))
    raise ConfigError(f"`data_files` of `{path}` has no counterpart", mend="download the file and name it as `path`")


_HUB = {"name": "config", "data_dir": "data_dir"}


def _of_files(path: str, files: Any, folder: Any, split: str) -> list[dict[str, Any]]:
    """One stream a file. Files without splits of their own are the split `train`, as in `load_dataset`."""
    if isinstance(files, Mapping):
        if split not in files:
            raise ConfigError(f"`data_files` of `{path}` has no `{split}`", mend=f"name a file for `{split}`")
        files = files[split]
    elif split != "train":
        why = "files that are not given by split are `train`"
        raise ConfigError(f"`split: {split}` of `{path}`", why=why, mend="remove `split`")
    if files is None:
        if folder is None:
            raise ConfigError(f"`path: {path}` names no file", mend="add `data_files:`")
        return [{"name": str(folder)}]
    names = [str(name) for name in files] if isinstance(files, list) else [str(files)]
    for name in names:
        if any(mark in name for mark in "*?["):
            raise ConfigError(f"`data_files: {name}` is a pattern", mend="name each file, or the folder as `path`")
        if "://" in name:
            raise ConfigError(f"`data_files: {name}` lies elsewhere", mend="download it, and name the file")
    return [{"name": os.path.join(folder, name) if folder else name} for name in names]
