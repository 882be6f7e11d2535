"""What all tests share: no network, few threads, and the data sets that are not part of the project."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch or a hub client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.browser import browser, open_page

__all__ = ["browser", "open_page"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets that are not committed: `ALIGN_SHARED`, else `../shared/data`."""
    folder = Path(os.environ.get("ALIGN_SHARED", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}: set ALIGN_SHARED to the folder that holds them")
    return folder
