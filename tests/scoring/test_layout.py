"""Trees as arrays: positions, depths, read-outs and masks, against loops over single tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.core.errors import DataError
from align.scoring.facts import Windows
from align.scoring.layout import PackedBatch, Tree, TreeLayout, rows_of
from align.scoring.masks import block_mask, dense_allowed
from align.scoring.packing import lay_out, pack_padded, pack_sdpa, pack_tree
from tests.scoring.golden import random_trees

PACKERS = {
    "tree": pack_tree,
    "sdpa": lambda trees: pack_sdpa(trees, Windows(), 90, None),
    "padded": pack_padded,
}


def paths(trees: list[Tree]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [(t.prompt, b, s) for t in trees for b, s in zip(t.branches, t.scored, strict=True)]


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 4))
def test_every_read_out_stands_where_a_loop_finds_it(name: str, seed: int, count: int) -> None:
    trees = random_trees(seed, count)
    packed = PACKERS[name](trees)
    flat = packed.input_ids.reshape(-1)
    branches = paths(trees)
    assert packed.n_branches == len(branches)
    assert packed.width == max(len(body) for _, body, _ in branches)
    reads = {int(c): (int(p), int(t)) for c, p, t in zip(packed.read_cell, packed.read_position, packed.read_target)}  # noqa: B905
    states = dict(zip(packed.state_cell.tolist(), packed.state_position.tolist(), strict=True))
    assert len(reads) == len(packed.read_cell) == packed.scored_tokens
    assert len(states) == sum(len(body) + 1 for _, body, _ in branches)
    for n, (prompt, body, scored) in enumerate(branches):
        for t, token in enumerate(body):
            before = int(prompt[-1]) if t == 0 else int(body[t - 1])
            state = states[n * (packed.width + 1) + t]
            assert int(flat[state]) == before
            cell = n * packed.width + t
            assert (cell in reads) == bool(scored[t])
            if scored[t]:
                assert reads[cell] == (state, int(token))
        assert int(flat[states[n * (packed.width + 1) + len(body)]]) == int(body[-1])
    assert packed.mask.sum() == sum(scored.sum() for _, _, scored in branches)
    assert packed.unique_tokens == sum(t.tokens for t in trees)
    assert packed.naive_tokens == sum(len(prompt) + len(body) for prompt, body, _ in branches)


@pytest.mark.parametrize("window", [None, 5])
def test_masks_follow_the_path_from_the_root(window: int | None) -> None:
    trees = random_trees(3, count=4, longest=9)
    grid = lay_out(trees, rows_of(trees, 60), multiple=128)
    allowed = dense_allowed(grid, window)[:, 0]
    for row in range(grid.ids.shape[0]):
        length = grid.ids.shape[1]
        for q in range(length):
            for k in range(length):
                if grid.tree[row, q] < 0:
                    expected = q == k
                else:
                    ancestor = grid.branch[row, k] in (-1, grid.branch[row, q])
                    distance = grid.depth[row, q] - grid.depth[row, k]
                    expected = grid.tree[row, q] == grid.tree[row, k] and ancestor and distance >= 0
                    expected = expected and (window is None or distance < window)
                if allowed[row, q, k] != expected:
                    pytest.fail(f"row {row}, query {q}, key {k}: {allowed[row, q, k]}, wanted {expected}")
    block = block_mask(grid, window, "cpu")
    rows, length = grid.ids.shape
    index = torch.arange(length)
    seen = torch.stack(
        [block.mask_mod(torch.tensor(r), torch.tensor(0), index[:, None], index[None, :]) for r in range(rows)]
    )
    real = torch.from_numpy(grid.tree >= 0)
    assert torch.equal(seen[real], torch.from_numpy(allowed)[real])


def test_one_tree_by_hand() -> None:
    packed = pack_tree([Tree.of([5, 6, 7], [[1, 2], [3]])])
    assert packed.input_ids.tolist() == [[5, 6, 7, 1, 2, 3]]
    assert packed.position_ids is not None
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert packed.read_position.tolist() == [2, 3, 2]
    assert packed.read_target.tolist() == [1, 2, 3]
    assert packed.read_cell.tolist() == [0, 1, 2]
    assert packed.state_position.tolist() == [2, 3, 2, 4, 5]
    assert packed.state_cell.tolist() == [0, 1, 3, 2, 4]
    assert (packed.unique_tokens, packed.naive_tokens) == (6, 9)


def test_rows_hold_every_tree_once_within_their_width() -> None:
    trees = random_trees(1, count=12)
    rows = rows_of(trees, 150)
    assert sorted(i for row in rows for i in row) == list(range(12))
    assert all(len(row) == 1 or sum(trees[i].tokens for i in row) <= 150 for row in rows)
    assert len(rows) < 12


def test_a_batch_moves_with_all_its_tensors() -> None:
    trees = random_trees(1)
    for pack in PACKERS.values():
        packed = pack(trees)
        moved = packed.to("meta")
        assert isinstance(moved, PackedBatch)
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert isinstance(packed.attention, torch.Tensor | TreeLayout)
        assert packed.to("cpu") is packed


@pytest.mark.parametrize(
    ("prompt", "branches", "message"),
    [([], [[1]], "empty prompt"), ([1], [], "no branches"), ([1], [[2], []], "branch 1 of a tree is empty")],
)
def test_empty_parts_are_refused(prompt: list[int], branches: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Tree.of(prompt, branches)


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_an_empty_batch_is_refused(pack: object) -> None:
    with pytest.raises(DataError, match="no trees"):
        pack([])  # type: ignore[operator]
