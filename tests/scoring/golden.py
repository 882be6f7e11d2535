"""The golden twin of the engine: one sequence at a time through the model's own forward, and what is compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from align.scoring.layout import Tree

LOGP_BAR = 1e-5
GRADIENT_BAR = 1e-5
# A key's bias shifts all scores of a row alike, so its gradient is zero but for rounding, and "relative to its own
# norm" would compare noise with noise. Parameters below this share of the whole gradient are measured against it.
NORM_FLOOR = 1e-3


def random_trees(
    seed: int, count: int = 2, branches: tuple[int, int] = (1, 6), longest: int = 40, vocab: int = 320
) -> list[Tree]:
    """Trees with random lengths (1..longest) and some unscored tokens."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(count):
        prompt = rng.integers(0, vocab, rng.integers(1, longest + 1))
        lengths = rng.integers(1, longest + 1, rng.integers(branches[0], branches[1] + 1))
        bodies = tuple(rng.integers(0, vocab, length) for length in lengths)
        trees.append(Tree(prompt, bodies, tuple(rng.random(len(body)) < 0.9 for body in bodies)))
    return trees


def golden_logp(model: nn.Module, trees: Sequence[Tree]) -> Tensor:
    """[N, T] log-probabilities, each branch alone after its prompt through `model(input_ids)`."""
    width = max(max(tree.lengths) for tree in trees)
    rows = []
    for tree in trees:
        for branch, scored in zip(tree.branches, tree.scored, strict=True):
            ids = torch.from_numpy(np.concatenate([tree.prompt, branch]))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(tree.prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.from_numpy(branch)[:, None])[:, 0]
            rows.append(nn.functional.pad(logp * torch.from_numpy(scored), (0, width - len(branch))))
    return torch.stack(rows)


def routing_gap(model: nn.Module, trees: Sequence[Tree]) -> float:
    """Smallest distance, in probability, between the last expert chosen and the first left out."""
    chosen = model.config.num_experts_per_tok
    gaps = []
    for tree in trees:
        for branch in tree.branches:
            ids = torch.from_numpy(np.concatenate([tree.prompt, branch]))[None]
            with torch.no_grad():
                routed = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            for layer in routed:
                ordered = layer.softmax(-1).sort(-1, descending=True).values
                gaps.append(float((ordered[:, chosen - 1] - ordered[:, chosen]).min()))
    return min(gaps)


def curved_loss(logp: Tensor) -> Tensor:
    """A loss in which every cell has its own curved weight and branches interact: a mix-up cannot cancel."""
    weights = torch.linspace(0.5, 1.5, logp.numel(), dtype=logp.dtype).view_as(logp)
    sums = (logp * weights).sum(-1)
    pairs = nn.functional.softplus(0.1 * (sums[:, None] - sums[None, :])).sum()
    return (torch.tanh(logp / 5) * weights.flip(0)).sum() + pairs


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(
    found: dict[str, Tensor], expected: dict[str, Tensor], floor: float = NORM_FLOOR
) -> tuple[float, str]:
    """Largest ||g - g'|| / max(||g'||, floor * ||all g'||) over parameters, and whose it is."""
    assert found.keys() == expected.keys()
    whole = float(torch.stack([g.norm() for g in expected.values()]).norm())
    errors = {
        name: float((found[name] - g).norm()) / max(float(g.norm()), floor * whole) for name, g in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
