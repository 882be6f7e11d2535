"""A start-up check of a loaded model: packed trees against single sequences through the model's own forward.

A list of families cannot tell whether a model respects the layout: some accept every argument and ignore it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.scoring.engine import hidden_states, score
from align.scoring.facts import language_model, trunk_of, windows_of
from align.scoring.layout import PackedBatch, Tree, TreeLayout
from align.scoring.value import ValueModel

PROBE_SHAPE = ((7, (5, 9, 3)), (4, (6, 8)))


@dataclass(frozen=True)
class Reference:
    """Numbers of the single sequences, in the order of the trees' branches.

    Attributes:
        values: float [N, T]. contrast: how far they move in a model that ignores the layout.
        scale: root mean square of the logits (at least 1). dtype: what the numbers are rounded to.
    """

    values: Tensor
    contrast: float
    scale: float
    dtype: torch.dtype


def probe_trees(model: nn.Module) -> list[Tree]:
    """Two small random trees, the same for every call."""
    vocabulary = int(trunk_of(model).get_input_embeddings().num_embeddings)
    rng = np.random.default_rng(7)

    def draw(length: int) -> list[int]:
        return rng.integers(0, vocabulary, length).tolist()

    return [Tree.of(draw(prompt), [draw(length) for length in branches]) for prompt, branches in PROBE_SHAPE]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; training flags and random states are put back."""
    flags = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in flags:
                module.training = training


def reference(model: nn.Module, trees: Sequence[Tree]) -> Reference:
    """Score each `prompt + completion` alone, through the model's plain forward under its plain attention."""
    outputs, rows, contrast, squares = _plain(model), [], 0.0, []
    width = max(max(tree.lengths) for tree in trees)
    dtype = torch.float32
    for tree in trees:
        prompt = list(tree.prompt)
        for branch in tree.branches:
            values, square, dtype = outputs(prompt, [], list(branch))
            rows.append(torch.nn.functional.pad(values, (0, width - len(branch))))
            squares.append(square)
        flat, _, _ = outputs(prompt, list(tree.branches[0]), list(tree.branches[1]))
        alone = rows[len(rows) - len(tree.branches) + 1][: len(flat)]
        contrast = max(contrast, float((flat - alone).abs().max()))
    kind = rows[0].device.type
    if torch.is_autocast_enabled(kind):  # the residual stream of float32 weights is float32 there, and not exact
        dtype = torch.get_autocast_dtype(kind)
    return Reference(torch.stack(rows), contrast, max(1.0, float(np.mean(squares)) ** 0.5), dtype)


def difference(model: nn.Module, packed: PackedBatch, expected: Reference) -> str:
    """Why the packed scores are not the reference; empty where they agree."""
    record: list[int | None] = []
    if isinstance(packed.attention, TreeLayout):
        packed = replace(packed, attention=TreeLayout(packed.attention.spans, record=record))
    packed = packed.to(next(model.parameters()).device)
    if isinstance(language_model(model), ValueModel):
        values = _projected(hidden_states(model, packed)).reshape(-1)
        flat = values.new_zeros(packed.n_branches * (packed.width + 1))
        flat[packed.state_cell] = values[packed.state_position]
        found = flat.view(packed.n_branches, -1)[:, :-1]
        found = found * packed.mask
    else:
        found = score(model, packed)["logp"]
    reason = _windows_ignored(model, record) if isinstance(packed.attention, TreeLayout) else ""
    return reason or _disagreement(found.to(expected.values.device), expected)


def _disagreement(found: Tensor, expected: Reference) -> str:
    error = (found - expected.values).abs()
    if not bool(torch.isfinite(found).all()):
        return "it gives numbers that are not finite"
    if expected.dtype in (torch.float32, torch.float64):
        worst = float(error.max())
        exact = expected.values.device.type == "cpu" or not torch.backends.cuda.matmul.allow_tf32
        tolerance = (1e-4 if exact else 1e-2) * expected.scale
        if expected.contrast > 1e-5:  # a model that ignores the layout moves by `contrast`
            tolerance = min(tolerance, 0.1 * expected.contrast + 1e-6)
    else:  # rounding may flip an expert's choice for single tokens, so the mean is compared
        worst = float(error.mean())
        tolerance = 8 * torch.finfo(expected.dtype).eps * expected.scale
    if worst <= tolerance:
        return ""
    return f"its scores differ from single sequences by {worst:.1e} (allowed {tolerance:.1e})"


def _windows_ignored(model: nn.Module, record: list[int | None]) -> str:
    """The attention calls must carry the configured window; a short probe would not show that they do not."""
    windows = windows_of(model)
    if not record:
        return "its attention does not go through the attention interface"
    if windows.window is None:
        return ""
    told = sum(window == windows.window for window in record)
    wanted = len(record) if windows.layers is None else windows.layers
    if told == wanted:
        return ""
    return f"{told} of {wanted} sliding-window layers tell the attention function their window"


def _plain(model: nn.Module) -> Callable[[list[int], list[int], list[int]], tuple[Tensor, float, torch.dtype]]:
    """(prompt, tokens between, completion) -> values of the completion's tokens, mean square, dtype."""
    device = next(model.parameters()).device
    is_value = isinstance(language_model(model), ValueModel)

    def run(prompt: list[int], between: list[int], completion: list[int]) -> tuple[Tensor, float, torch.dtype]:
        ids = torch.tensor([prompt + between + completion], device=device)
        first = len(prompt) + len(between) - 1
        if is_value:
            states = trunk_of(model)(input_ids=ids, use_cache=False)[0]
            values = _projected(states)[0]
            return values[first : first + len(completion)], 1.0, states.dtype
        caller: Any = model
        logits = caller(input_ids=ids, use_cache=False).logits
        wide = logits[0, first : first + len(completion)].to(torch.promote_types(logits.dtype, torch.float32))
        targets = torch.tensor(completion, device=device)[:, None]
        return wide.log_softmax(-1).gather(1, targets)[:, 0], float(wide.square().mean()), logits.dtype

    return run


def _projected(states: Tensor) -> Tensor:
    """A fixed projection of hidden states [..., H] to one number each; a fresh value head would give zeros."""
    size = states.shape[-1]
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide @ (torch.arange(size, device=states.device, dtype=wide.dtype).sin() / size**0.5)
