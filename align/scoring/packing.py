"""Trees to a `PackedBatch`, one function per back end. All give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from align.core.errors import DataError
from align.scoring.facts import Windows
from align.scoring.layout import (
    Branches,
    Grid,
    PackedBatch,
    Tree,
    TreeLayout,
    lay_out,
    ramp,
    readouts,
    rows_of,
    spans_of,
)
from align.scoring.masks import BLOCK, block_mask, by_layer_type, dense_mask


def pack_tree(trees: Sequence[Tree]) -> PackedBatch:
    """All trees in one row without padding; the spans travel to the attention function."""
    grid = lay_out(trees, [range(len(trees))])
    return _batch("tree", grid, trees, TreeLayout(spans_of(trees, grid.start)))


def pack_sdpa(trees: Sequence[Tree], windows: Windows, width: int, additive: torch.dtype | None) -> PackedBatch:
    """Several trees a row up to `width` tokens, several rows, and a dense mask."""
    grid = lay_out(trees, rows_of(trees, width))
    mask = by_layer_type(windows, lambda window: dense_mask(grid, window, additive))
    return _batch("sdpa", grid, trees, mask)


def pack_flex(trees: Sequence[Tree], windows: Windows, device: torch.device | str) -> PackedBatch:
    """All trees in one row, its length a multiple of 128, with a block mask; made on `device`."""
    grid = lay_out(trees, [range(len(trees))], multiple=BLOCK)
    mask = by_layer_type(windows, lambda window: block_mask(grid, window, device))
    return _batch("flex", grid, trees, mask).to(device)


def pack_padded(trees: Sequence[Tree]) -> PackedBatch:
    """One sequence `prompt + completion` a row, padded on the right: the golden twin of the others."""
    if not trees:
        raise DataError("there are no trees to pack", mend="run a dummy tree and multiply its loss by zero")
    branches = Branches.of(trees)
    sizes = branches.prompt + branches.length
    length = int(sizes.max())
    start = np.arange(len(sizes)) * length
    ids, real = np.zeros(len(sizes) * length, dtype=np.int64), np.zeros(len(sizes) * length, dtype=np.int64)
    place = np.repeat(start, sizes) + ramp(sizes)
    ids[place] = np.concatenate([part for tree in trees for branch in tree.branches for part in (tree.prompt, branch)])
    real[place] = 1
    first = start + branches.prompt
    return PackedBatch(
        backend="padded",
        input_ids=torch.from_numpy(ids.reshape(-1, length)),
        position_ids=None,
        attention=torch.from_numpy(real.reshape(-1, length)),
        **readouts(trees, branches, first, first - 1),
    )


def _batch(name: str, grid: Grid, trees: Sequence[Tree], attention: object) -> PackedBatch:
    return PackedBatch(
        backend=name,
        input_ids=torch.from_numpy(grid.ids),
        position_ids=torch.from_numpy(grid.depth),
        attention=attention,
        **grid.indices(trees),
    )
