"""A value model: the trunk of a causal LM with a scalar head, V(s_t) per state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.core.errors import CheckpointError
from align.scoring.engine import hidden_states, scatter
from align.scoring.facts import language_model, refuse_unsuitable, trunk_of
from align.scoring.layout import PackedBatch

HEAD_FILE, KIND_FILE = "value_head.safetensors", "value_model.json"


class ValueModel(nn.Module):
    """`trunk` and a linear head to one number, zero at the start, in float32 whatever the trunk's dtype.

    Args:
        trunk: the base model of a causal LM (`model.base_model`), or the causal LM itself, whose head is left out.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        refuse_unsuitable(trunk)
        inner = language_model(trunk)
        self.trunk: PreTrainedModel = trunk_of(trunk) if inner.get_output_embeddings() is not None else inner
        self.config: Any = self.trunk.config
        self.head = nn.Linear(_hidden_size(self.config), 1, dtype=torch.float32)
        self.head.to(next(self.trunk.parameters()).device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def base_model(self) -> nn.Module:
        return self.trunk

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] hidden states to [...] values in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)  # type: ignore[no-any-return]

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.trunk.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.trunk.gradient_checkpointing_disable()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Write the trunk as a transformers folder (safetensors), and the head beside it.

        `state_dict`: this module's gathered weights, where they are sharded.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        part = {name.removeprefix("trunk."): value for name, value in state.items() if name.startswith("trunk.")}
        self.trunk.save_pretrained(folder, state_dict=part, **kwargs)
        head = {name: state[f"head.{name}"].detach().cpu().contiguous() for name in ("weight", "bias")}
        save_file(head, str(folder / HEAD_FILE))
        (folder / KIND_FILE).write_text(json.dumps({"kind": "value", "head": HEAD_FILE}) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> ValueModel:
        """Load what `save_pretrained` wrote. Raises `CheckpointError` where the head is missing."""
        head = Path(folder) / HEAD_FILE
        if not head.is_file():
            raise CheckpointError(
                f"no {HEAD_FILE}", where=str(folder), mend="start a value model with ValueModel(causal_lm)"
            )
        from transformers import AutoModel

        model = cls(AutoModel.from_pretrained(folder, **kwargs))
        model.head.load_state_dict(load_file(str(head)))
        return model

    @classmethod
    def from_policy(cls, name: str | Path, **kwargs: Any) -> ValueModel:
        """A fresh value model on the trunk of a saved causal LM."""
        return cls(AutoModelForCausalLM.from_pretrained(name, **kwargs))


def score_values(model: nn.Module, packed: PackedBatch) -> dict[str, Tensor]:
    """V(s_t) of every state of every branch.

    Returns:
        `value`: [N, T + 1]; entry t < T_n is the state before token t (entry 0 stands at the last prompt token),
        entry T_n the end; zero beyond.
    """
    inner = language_model(model)
    hidden = hidden_states(model, packed)
    states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, packed.state_position)
    values = inner(states)
    return {"value": scatter(values, packed.state_cell, (packed.n_branches, packed.width + 1))}


def _hidden_size(config: Any) -> int:
    return int(getattr(config, "hidden_size", None) or config.n_embd)
