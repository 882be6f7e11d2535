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


def uniforms(seed: int, *keys: np.ndarray) -> np.ndarray:
    """One number in (0, 1) for each place of the int64 `keys`, float64: a function of seed and keys alone.

    SplitMix64's finaliser over the keys in turn; many places at once, where `derive` would be called for each.
    """
    state = np.full(keys[0].shape, seed, np.uint64)
    for key in keys:
        state = (state ^ key.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52


def _bits(seed: int, parts: tuple[Any, ...]) -> bytes:
    return hashlib.blake2b(encode([seed, *parts]), digest_size=16).digest()
