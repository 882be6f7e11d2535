"""All that a run trains, as one module with named roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align.core.errors import ConfigError
from align.scoring.engine import score
from align.scoring.layout import PackedBatch
from align.scoring.value import score_values

Requests = Mapping[str, frozenset[str]]


class RoleModule(nn.Module):
    """Named models behind one `forward`, so that DDP, ZeRO and FSDP see every parameter through the module they wrap.

    All roles of a micro-batch run in one call: DDP cannot follow two forwards before one backward.

    Args:
        roles: `policy` (a causal LM, or a PEFT model of one) and, where declared, `value` (a `ValueModel`).
        dtype: compute dtype; weights stay as they are.
    """

    def __init__(self, roles: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if "policy" not in roles:
            raise ConfigError("a run needs a `policy` role", why="roles given: " + ", ".join(roles))
        self.roles = nn.ModuleDict(dict(roles))
        self.dtype = dtype

    @property
    def policy(self) -> Any:
        return self.roles["policy"]

    @property
    def config(self) -> Any:
        return self.policy.config

    def autocast(self, device_type: str) -> torch.autocast:
        """The context of compute; references run in the same one, else step zero is off by rounding."""
        return torch.autocast(device_type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def forward(self, packed: PackedBatch, requests: Requests, other: Any = None) -> dict[str, Tensor]:
        """Score a packed batch.

        Args:
            requests: role -> outputs wanted of it.
            other: a frozen causal LM for `kl_*` outputs.

        Returns:
            name -> [N, T] float32 (`value`: [N, T + 1]), zero outside scored tokens.
        """
        outputs: dict[str, Tensor] = {}
        with self.autocast(packed.input_ids.device.type):
            for role, needs in requests.items():
                if role == "policy":
                    outputs |= score(self.policy, packed, needs, other=other)
                else:
                    outputs |= score_values(self.roles[role], packed)
        return outputs

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Called by `transformers.Trainer`; reentrant checkpointing loses keyword arguments, so it is never used."""
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for model in self.roles.values():
            trunk: Any = getattr(model, "trunk", model)
            trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            if hasattr(trunk, "enable_input_require_grads"):
                trunk.enable_input_require_grads()

    def named_roles(self) -> Iterator[tuple[str, nn.Module]]:
        yield from self.roles.items()
