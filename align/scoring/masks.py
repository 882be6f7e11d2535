"""Which token sees which in a packed row, as a dense mask or as a block mask of flex attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from align.scoring.facts import FULL, SLIDING, Windows
from align.scoring.layout import Grid

BLOCK = 128


def by_layer_type(windows: Windows, make: Callable[[int | None], Any]) -> Any:
    """One mask, or one per layer type where windowed and full layers alternate."""
    if windows.mixed:
        return {FULL: make(None), SLIDING: make(windows.window)}
    return make(windows.window)


def dense_allowed(grid: Grid, window: int | None) -> np.ndarray:
    """bool [R, 1, L, L], true where the query (rows) sees the key (columns).

    A token sees its own tree's prompt and its own branch up to its own depth; padding sees itself, so that no row of
    a softmax is empty. A window counts depths, as it does in a plain sequence.
    """
    tree, branch, depth = grid.tree, grid.branch, grid.depth
    allowed = tree[:, :, None] == tree[:, None, :]
    allowed &= (branch[:, None, :] < 0) | (branch[:, :, None] == branch[:, None, :])
    distance = depth[:, :, None] - depth[:, None, :]
    allowed &= distance >= 0
    if window is not None:
        allowed &= distance < window
    allowed &= tree[:, None, :] >= 0
    allowed |= np.eye(tree.shape[1], dtype=bool)
    return np.asarray(allowed[:, None])


def dense_mask(grid: Grid, window: int | None, additive: torch.dtype | None) -> Tensor:
    """The dense mask as bool (for `sdpa`), or additive in the given dtype (for `eager`, which adds what it gets)."""
    allowed = torch.from_numpy(dense_allowed(grid, window))
    if additive is None:
        return allowed
    mask = torch.zeros(allowed.shape, dtype=additive)
    return mask.masked_fill_(~allowed, torch.finfo(additive).min)


def block_mask(grid: Grid, window: int | None, device: torch.device | str) -> BlockMask:
    """The same rule as a `BlockMask`; the row length must be a multiple of 128.

    Which blocks are empty or full follows from the layout, without looking at pairs of tokens: flex attention's own
    `create_block_mask` makes several tensors of [L, L] for it, gigabytes for a row of 16,384 tokens.
    """
    tree, branch, depth = (torch.from_numpy(part).to(device) for part in (grid.tree, grid.branch, grid.depth))

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_tree = tree[row, query] == tree[row, key]
        on_path = (branch[row, key] < 0) | (branch[row, query] == branch[row, key])
        distance = depth[row, query] - depth[row, key]
        rule = same_tree & on_path & (distance >= 0)
        return rule if window is None else rule & (distance < window)

    counts = torch.from_numpy(block_counts(grid, window))[:, None]
    full = counts == BLOCK * BLOCK
    length = grid.ids.shape[1]
    return BlockMask.from_kv_blocks(
        *_ordered((counts > 0) & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(length, length),
    ).to(device)


def block_counts(grid: Grid, window: int | None) -> np.ndarray:
    """int64 [R, L / 128, L / 128]: visible pairs of tokens in every block of queries (rows) and keys (columns).

    A query sees at most two runs of keys: some of its tree's prompt, and its own branch up to itself.
    """
    rows, length = grid.ids.shape
    place = np.broadcast_to(np.arange(length), (rows, length))
    real, in_branch = grid.tree >= 0, grid.branch >= 0
    # Of each token's tree: where it starts in the row, and its prompt's length. Padding sees all of the padding.
    trees = len(grid.start)
    prompts = np.bincount(grid.tree[real & ~in_branch], minlength=trees)
    trunk = np.where(real, grid.start[grid.tree] % length, length - (~real).sum(axis=1, keepdims=True))
    prompt = np.where(real, prompts[grid.tree], 0)
    oldest = np.zeros_like(place) if window is None else np.maximum(grid.depth - window + 1, 0)
    first = np.where(in_branch, place - (grid.depth - prompt), trunk)
    low = first + np.maximum(oldest - np.where(in_branch, prompt, 0), 0)
    high = np.where(real, place + 1, length)
    shared_low = trunk + np.minimum(oldest, prompt)
    shared_high = np.where(in_branch, trunk + prompt, shared_low)
    ends = ((high, 1), (low, -1), (shared_high, 1), (shared_low, -1))
    return np.asarray(sum(sign * _below(end) for end, sign in ends))


def _below(ends: np.ndarray) -> np.ndarray:
    """Keys before `ends` (int64 [R, L], one per query), summed over each block of queries, per block of keys."""
    rows, length = ends.shape
    blocks = length // BLOCK
    block, rest = np.divmod(ends, BLOCK)
    line = np.arange(rows)[:, None] * blocks + np.arange(length) // BLOCK
    cell = (line * (blocks + 1) + block).ravel()
    size = rows * blocks * (blocks + 1)
    reach = np.bincount(cell, minlength=size).reshape(rows, blocks, blocks + 1)
    partial = np.bincount(cell, weights=rest.ravel(), minlength=size).astype(np.int64).reshape(reach.shape)
    beyond = reach[..., ::-1].cumsum(axis=-1)[..., ::-1] - reach
    return (partial + BLOCK * beyond)[..., :blocks]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [R, 1, B, B] as counts and indices, the true ones first: int32 [R, 1, B] and [R, 1, B, B]."""
    chosen = blocks.to(torch.int32)
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
