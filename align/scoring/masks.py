"""Which token sees which in a packed row, as a dense mask or as a block mask of flex attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

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
    """The same rule as a `BlockMask`; the row length must be a multiple of 128."""
    tree, branch, depth = (torch.from_numpy(part).to(device) for part in (grid.tree, grid.branch, grid.depth))

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_tree = tree[row, query] == tree[row, key]
        on_path = (branch[row, key] < 0) | (branch[row, query] == branch[row, key])
        distance = depth[row, query] - depth[row, key]
        rule = same_tree & on_path & (distance >= 0)
        return rule if window is None else rule & (distance < window)

    rows, length = grid.ids.shape
    return create_block_mask(seen, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=str(device), BLOCK_SIZE=BLOCK)
