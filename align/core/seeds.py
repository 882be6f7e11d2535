"""Seeds derived from names: what is random is a function of (seed, what it is for), never of the place in a run."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from align.core.hashing import encode


def derive(seed: int, *parts: Any) -> int:
    """A seed in [0, 2**63) from a seed and the parts that name its use, for example `derive(0, "epoch", 3)`."""
    return int.from_bytes(_bits(seed, parts)[:8], "little") >> 1


def generator(seed: int, *parts: Any) -> np.random.Generator:
    """A Philox generator keyed by a seed and the parts that name its use."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_bits(seed, parts), "little")))


def _bits(seed: int, parts: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(encode([seed, *parts]), digest_size=16).digest()
