"""Log-probabilities of the completions of prompts under a model that is not trained here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from align.scoring.backends import Backend
from align.scoring.batching import plan
from align.scoring.engine import score
from align.scoring.layout import Tree

BUDGET = {"cpu": 4096, "cuda": 16384}
"""Tokens of one scoring pass."""


@torch.inference_mode()
def branch_logps(
    model: nn.Module,
    backend: Backend,
    trees: Sequence[Tree],
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    budget: int | None = None,
) -> list[list[np.ndarray]]:
    """Per tree, per branch: float64 [T] log-probabilities of its tokens at temperature 1.

    Args:
        model: prepared with `backend`.
        context: entered around each pass, for example `model.disable_adapter`.
        budget: tokens of one pass; a larger tree is alone.
    """
    found: list[list[np.ndarray]] = [[] for _ in trees]
    if not trees:
        return found
    budget = budget or BUDGET.get(backend.device.type, BUDGET["cpu"])
    for batch in plan([tree.tokens for tree in trees], budget=budget)[0]:
        with context():
            rows = score(model, backend.pack([trees[i] for i in batch]))["logp"].double().cpu().numpy()
        places = iter(rows)
        for index in batch:
            found[index] = [next(places)[:length].copy() for length in trees[index].lengths]
    return found
