"""A model under evaluation: it samples, and it scores tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from align.core.errors import ModelError
from align.core.progress import Progress, silent
from align.data.groups import Message
from align.reference.weights_hash import module_hash
from align.sampling.base import Rollout, SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.loading import Dtype, load
from align.sampling.prompts import PromptEncoder
from align.scoring.adapters import ADAPTER_CONFIG, adapter_config, base_of
from align.scoring.backends import Backend, prepare
from align.scoring.branches import branch_logps
from align.scoring.layout import Tree


@dataclass(eq=False)
class Side:
    """A model with its tokenizer and its scorer.

    Attributes:
        name: as the user named it. weights: a hash of what it computes with. batch_size: completions at once.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    backend: Backend
    weights: str
    batch_size: int = 64

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def positions(self) -> int | None:
        """Most tokens of a prompt with its answer, where the model states it."""
        return HFSampler(self.model, self.tokenizer).positions

    def sample(
        self,
        prompts: Sequence[str | Sequence[Message]],
        tools: Sequence[Any],
        n: int,
        params: SamplingParams,
        progress: Progress = silent,
    ) -> tuple[list[list[int]], list[list[Rollout]]]:
        """(ids of each prompt, `n` completions of each). A chat template's end of turn ends a completion."""
        encode = PromptEncoder(self.tokenizer)
        chats = any(not isinstance(prompt, str) for prompt in prompts)
        ids = [encode(prompt, tool) for prompt, tool in zip(prompts, tools, strict=True)]
        ends = encode.end_of_turn if chats else frozenset()
        sampler = HFSampler(self.model, self.tokenizer, self.batch_size, end_ids=ends)
        return ids, sampler.sample(ids, n, params, progress)

    def logp(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        """Per tree, per branch: float64 [T] log-probabilities of its tokens at temperature 1."""
        return branch_logps(self.model, self.backend, trees)


def load_side(
    name: str,
    dtype: Dtype = "auto",
    device: str | None = None,
    batch_size: int = 64,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> Side:
    """A model from a folder, a hub id, or the folder of an adapter (whose base is loaded beneath it).

    Args:
        dtype: `auto` is float32 on CPU and bfloat16 on a GPU.
        device: by default the GPU where there is one.
        base: the base of an adapter, where it is not where the adapter says.

    Raises:
        ModelError: missing, unsafe or unsuitable; see `align.sampling.loading.load`.
    """
    folder = Path(name).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        below = base_of(adapter_config(folder), folder, base)
        try:
            loaded = load(below, str(folder), dtype, device, trust_remote_code)
        except ModelError as error:
            mend = "if the adapter's base is not where it says, name it with --base MODEL"
            raise ModelError(error.what, where=error.where, why=error.why, mend=mend) from error
    else:
        loaded = load(name, None, dtype, device, trust_remote_code)
    return as_side(name, loaded.model, loaded.tokenizer, batch_size)


def as_side(name: str, model: nn.Module, tokenizer: Any, batch_size: int = 64) -> Side:
    """A model that is loaded already, whole and on one device, as it is now: later training would change it unnoticed.

    Its attention is set for scoring, and it is left in evaluation mode.
    """
    model.eval()
    return Side(name, model, tokenizer, prepare(model), module_hash(model), batch_size)


def starting_model(name: str, base: str | None = None) -> str | None:
    """The base of an adapter folder; None for a whole model, which does not say what it was trained from."""
    folder = Path(name).expanduser()
    return base_of(adapter_config(folder), folder, base) if (folder / ADAPTER_CONFIG).is_file() else None
