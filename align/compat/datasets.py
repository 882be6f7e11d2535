"""What we use of `datasets` (5.2), public and private.

Private: `Dataset._fingerprint`, present since 1.0; only ever one part of a key, and guarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load_saved(folder: Path) -> Any:
    """A `Dataset` or `DatasetDict` written by `save_to_disk`."""
    from datasets import load_from_disk

    return load_from_disk(str(folder))


def load_parquet(files: Sequence[Path]) -> Any:
    """Parquet files as one memory-mapped `Dataset` (converted once into the cache of `datasets`)."""
    from datasets import load_dataset

    return load_dataset("parquet", data_files=[str(file) for file in files], split="train")


def load_hub(name: str, config: str | None, data_dir: str | None, revision: str | None) -> Any:
    """All splits of a data set of the hub, as a `DatasetDict`."""
    from datasets import load_dataset

    return load_dataset(name, config, data_dir=data_dir, revision=revision)


def is_dataset(value: Any) -> bool:
    return _is(value, "Dataset")


def is_dataset_dict(value: Any) -> bool:
    return _is(value, "DatasetDict")


def is_iterable_dataset(value: Any) -> bool:
    return _is(value, "IterableDataset") or _is(value, "IterableDatasetDict")


def private_fingerprint(dataset: Any) -> str:
    return str(getattr(dataset, "_fingerprint", ""))


def _is(value: Any, kind: str) -> bool:
    if not any(base.__module__.split(".")[0] == "datasets" for base in type(value).__mro__):
        return False
    import datasets

    return isinstance(value, getattr(datasets, kind))
