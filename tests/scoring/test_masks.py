"""The block mask that is made from the layout against the one that flex attention makes from pairs of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from align.scoring.layout import Grid, Tree, lay_out
from align.scoring.masks import BLOCK, block_counts, block_mask, dense_allowed


def grid_of(seed: int, rows: int = 1) -> Grid:
    rng = np.random.default_rng(seed)
    longest = int(rng.choice([3, 90, 400]))
    trees = [
        Tree.of(range(rng.integers(1, longest + 1)), [range(rng.integers(1, longest + 1)) for _ in range(count)])
        for count in rng.integers(1, 6, int(rng.integers(rows, 9)))
    ]
    return lay_out(trees, [range(len(trees))[row::rows] for row in range(rows)], multiple=BLOCK)


@pytest.mark.parametrize("window", [None, 1, 8, 130, 1000])
@pytest.mark.parametrize("rows", [1, 2])
def test_blocks_hold_the_pairs_of_the_dense_mask(window: int | None, rows: int) -> None:
    for seed in range(6):
        grid = grid_of(seed, rows)
        dense = dense_allowed(grid, window)[:, 0]
        padding = grid.tree < 0
        dense |= padding[:, :, None] & padding[:, None, :]
        number = dense.shape[1] // BLOCK
        wanted = dense.reshape(rows, number, BLOCK, number, BLOCK).sum(axis=(2, 4))
        np.testing.assert_array_equal(block_counts(grid, window), wanted)


def test_a_block_with_one_hidden_pair_is_not_full() -> None:
    grid = lay_out([Tree.of(range(255), [[1]])], [[0]], multiple=BLOCK)
    assert block_counts(grid, 255)[0].tolist() == [[8256, 0], [BLOCK * BLOCK - 1, 8256]]
    assert block_mask(grid, 255, "cpu").full_kv_num_blocks.flatten().tolist() == [0, 0]
    assert block_mask(grid, 256, "cpu").full_kv_num_blocks.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("window", [None, 130])
def test_the_block_mask_is_that_of_flex_attention(window: int | None) -> None:
    for seed in range(4):
        grid = grid_of(seed)
        found = block_mask(grid, window, "cpu")
        length = grid.ids.shape[1]
        wanted = create_block_mask(found.mask_mod, 1, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
        assert found.shape == wanted.shape and found.BLOCK_SIZE == wanted.BLOCK_SIZE
        for name in ("kv", "full_kv", "q", "full_q"):
            counts, others = getattr(found, f"{name}_num_blocks"), getattr(wanted, f"{name}_num_blocks")
            assert counts.dtype == others.dtype and torch.equal(counts, others)
            indices, theirs = getattr(found, f"{name}_indices"), getattr(wanted, f"{name}_indices")
            assert indices.dtype == theirs.dtype and indices.shape == theirs.shape
            used = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(indices[used], theirs[used])
