"""Prompt trees as arrays, and a packed batch of them as tensors.

A tree is a prompt and the completions (branches) that continue it. Packed, the prompt's tokens stand once and each
branch after it; the position id of a token is its depth, so every branch starts at the prompt's length.

Sizes: R rows of L tokens; N branches in all, the longest of T tokens; M scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.core.errors import DataError


@dataclass(frozen=True, eq=False, slots=True)
class Tree:
    """A prompt and its branches.

    Attributes:
        prompt: int64 [P], P >= 1.
        branches: one int64 [T_b] per branch, T_b >= 1.
        scored: one bool [T_b] per branch, true where the token's log-probability is wanted.
    """

    prompt: np.ndarray
    branches: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise DataError("a tree has an empty prompt", mend="the first scored token needs a token before it")
        if not self.branches:
            raise DataError("a tree has no branches", mend="drop groups without completions before packing")
        for index, (branch, scored) in enumerate(zip(self.branches, self.scored, strict=True)):
            if not len(branch):
                raise DataError(f"branch {index} of a tree is empty", mend="drop empty completions before packing")
            if len(branch) != len(scored):
                raise DataError(f"branch {index} has {len(branch)} tokens and {len(scored)} scored flags")

    @classmethod
    def of(cls, prompt: Sequence[int], branches: Sequence[Sequence[int]]) -> Tree:
        """A tree from plain lists, with every completion token scored."""
        arrays = tuple(np.asarray(branch, dtype=np.int64) for branch in branches)
        return cls(np.asarray(prompt, dtype=np.int64), arrays, tuple(np.ones(len(a), dtype=bool) for a in arrays))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.branches))

    @property
    def tokens(self) -> int:
        """Unique tokens: the prompt once and every branch."""
        return len(self.prompt) + sum(self.lengths)

    @property
    def naive_tokens(self) -> int:
        """Tokens with the prompt repeated for each branch."""
        return len(self.prompt) * len(self.branches) + sum(self.lengths)


@dataclass(frozen=True, eq=False, slots=True)
class Span:
    """Where one tree stands in a row: `prompt` tokens from `start`, then the branches one after another."""

    start: int
    prompt: int
    branches: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """What the `tree` attention function needs: the spans of one row, and masks shared by all layers.

    `record`, where given, receives the window that each attention call was made with.
    """

    spans: tuple[Span, ...]
    masks: dict[Any, Tensor] = field(default_factory=dict)
    record: list[int | None] | None = None

    @property
    def longest_prompt(self) -> int:
        return max(span.prompt for span in self.spans)

    @property
    def longest_branch(self) -> int:
        return max(max(span.branches) for span in self.spans)


Attention = None | TreeLayout | Tensor | Mapping[str, Any]
"""What makes attention respect the trees: nothing, spans, a mask, or masks per layer type (also block masks)."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Trees as the model reads them.

    Attributes:
        backend: the back end that packed it.
        input_ids: long [R, L].
        position_ids: long [R, L] depths, or None where each row is one plain sequence.
        attention: see `Attention`. A padded batch carries a long [R, L] mask of its real tokens.
        read_position: long [M], position in the flattened [R * L] whose hidden state predicts a scored token.
        read_target: long [M], that token.
        read_cell: long [M], its place in the flattened [N, T] grid.
        state_position: long [S], position whose hidden state is the state before token t (or the end, t = T_n).
        state_cell: long [S], its place in the flattened [N, T + 1] grid.
        n_branches: N. width: T.
        unique_tokens: tokens with each prompt once. naive_tokens: with the prompt repeated for each branch.
        temperature: log-probs are those of softmax(logits / temperature), of every model that scores the batch.
    """

    backend: str
    input_ids: Tensor
    position_ids: Tensor | None
    attention: Any
    read_position: Tensor
    read_target: Tensor
    read_cell: Tensor
    state_position: Tensor
    state_cell: Tensor
    n_branches: int
    width: int
    unique_tokens: int
    naive_tokens: int
    temperature: float = 1.0

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device (itself if it is there)."""
        if self.input_ids.device == torch.device(device):
            return self
        return replace(self, **{part.name: _moved(getattr(self, part.name), device) for part in fields(self)})

    @property
    def scored_tokens(self) -> int:
        return int(self.read_cell.shape[0])

    @property
    def mask(self) -> Tensor:
        """bool [N, T], true at scored tokens."""
        flat = torch.zeros(self.n_branches * self.width, dtype=torch.bool, device=self.read_cell.device)
        flat[self.read_cell] = True
        return flat.view(self.n_branches, self.width)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, TreeLayout):
        return TreeLayout(value.spans)
    if isinstance(value, Mapping):
        return {key: _moved(part, device) for key, part in value.items()}
    return value.to(device) if hasattr(value, "to") else value


@dataclass(frozen=True, eq=False)
class Branches:
    """Numbers of every branch of a list of trees, in order: all int64 [N]."""

    tree: np.ndarray
    prompt: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Branches:
        counts = [len(tree.branches) for tree in trees]
        return cls(
            tree=np.repeat(np.arange(len(trees)), counts),
            prompt=np.repeat(np.array([len(tree.prompt) for tree in trees], dtype=np.int64), counts),
            length=np.array([length for tree in trees for length in tree.lengths], dtype=np.int64),
        )


def ramp(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each n of `lengths`, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def readouts(trees: Sequence[Tree], branches: Branches, first: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """The index fields of a `PackedBatch`.

    Args:
        first: int64 [N], flat position of each branch's first token.
        before: int64 [N], flat position of the last prompt token that each branch continues.
    """
    n, width = len(branches.length), int(branches.length.max())
    offset, owner = ramp(branches.length), np.repeat(np.arange(n), branches.length)
    position = first[owner] + offset
    predictor = np.where(offset == 0, before[owner], position - 1)
    scored = np.concatenate([flags for tree in trees for flags in tree.scored])
    tokens = np.concatenate([branch for tree in trees for branch in tree.branches])
    branch_ids = np.arange(n)
    states = {
        "state_position": np.concatenate([predictor, first + branches.length - 1]),
        "state_cell": np.concatenate([owner * (width + 1) + offset, branch_ids * (width + 1) + branches.length]),
    }
    reads = {
        "read_position": predictor[scored],
        "read_target": tokens[scored],
        "read_cell": (owner * width + offset)[scored],
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in (reads | states).items()}
    return tensors | {
        "n_branches": n,
        "width": width,
        "unique_tokens": sum(tree.tokens for tree in trees),
        "naive_tokens": int(branches.prompt.sum() + branches.length.sum()),
    }


def rows_of(trees: Sequence[Tree], width: int) -> list[list[int]]:
    """Trees to rows of at most `width` tokens, in order of falling size into the first row with room.

    A tree larger than `width` has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(trees)), key=lambda i: (-trees[i].tokens, i)):
        need = trees[index].tokens
        row = next((r for r, left in enumerate(room) if left >= need), None)
        if row is None:
            rows.append([index])
            room.append(width - need)
        else:
            rows[row].append(index)
            room[row] -= need
    return rows


@dataclass(frozen=True, eq=False)
class Grid:
    """Trees laid into rows: what every packing back end but `padded` starts from.

    Attributes:
        ids, depth: int64 [R, L]; padding has id 0 and depth 0.
        tree: int64 [R, L], number of the tree a token belongs to, -1 for padding.
        branch: int64 [R, L], number of the branch within the batch, -1 for prompt tokens and padding.
        start: int64 [trees], flat position of each tree.
    """

    ids: np.ndarray
    depth: np.ndarray
    tree: np.ndarray
    branch: np.ndarray
    start: np.ndarray
    branches: Branches

    def indices(self, trees: Sequence[Tree]) -> dict[str, Any]:
        branches = self.branches
        within = np.concatenate([np.cumsum((0, *tree.lengths[:-1])) for tree in trees])
        base = self.start[branches.tree] + branches.prompt
        return readouts(trees, branches, base + within, base - 1)


def lay_out(trees: Sequence[Tree], rows: Sequence[Sequence[int]], multiple: int = 1) -> Grid:
    """Lay `trees` into `rows` (lists of tree indices); L is the longest row, rounded up to `multiple`."""
    if not trees:
        raise DataError("there are no trees to pack", mend="run a dummy tree and multiply its loss by zero")
    sizes = np.array([tree.tokens for tree in trees], dtype=np.int64)
    longest = max(int(sizes[row].sum()) for row in map(list, rows))
    length = -(-longest // multiple) * multiple
    start = np.zeros(len(trees), dtype=np.int64)
    for number, row in enumerate(rows):
        start[list(row)] = number * length + np.cumsum(sizes[list(row)]) - sizes[list(row)]
    pieces: list[np.ndarray] = []
    counts: list[int] = []
    depths: list[int] = []
    branch: list[int] = []
    number = 0
    for tree in trees:
        pieces += (tree.prompt, *tree.branches)
        counts += (len(tree.prompt), *tree.lengths)
        depths += (0, *(len(tree.prompt),) * len(tree.branches))
        branch += (-1, *range(number, number + len(tree.branches)))
        number += len(tree.branches)
    lengths = np.array(counts, dtype=np.int64)
    place = np.repeat(start, sizes) + ramp(sizes)
    shape = (len(rows), length)
    fills = {"ids": 0, "depth": 0, "tree": -1, "branch": -1}
    grid = {name: np.full(shape[0] * shape[1], fill) for name, fill in fills.items()}
    grid["ids"][place] = np.concatenate(pieces)
    grid["depth"][place] = ramp(lengths) + np.repeat(np.array(depths), lengths)
    grid["tree"][place] = np.repeat(np.arange(len(trees)), sizes)
    grid["branch"][place] = np.repeat(np.array(branch), lengths)
    return Grid(
        **{name: array.reshape(shape) for name, array in grid.items()}, start=start, branches=Branches.of(trees)
    )


def spans_of(trees: Sequence[Tree], start: np.ndarray) -> tuple[Span, ...]:
    """The spans of trees laid into one row."""
    return tuple(Span(int(at), len(tree.prompt), tree.lengths) for tree, at in zip(trees, start, strict=True))
