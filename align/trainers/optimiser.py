"""Parameter groups by role, and clipping by role."""

from __future__ import annotations

from typing import Any

import torch

from align.trainers.config import AlignConfig
from align.trainers.roles import RoleModule


def groups(roles: RoleModule, args: AlignConfig, decayed: set[str]) -> list[dict[str, Any]]:
    """One group per role and decay; a role without a learning rate of its own takes the policy's."""
    made = []
    for role, _ in roles.named_roles():
        rate = args.value_learning_rate if role == "value" else None
        for decay in (True, False):
            parameters = [
                parameter
                for name, parameter in roles.named_parameters()
                if name.startswith(f"roles.{role}.") and parameter.requires_grad and (name in decayed) == decay
            ]
            if parameters:
                group: dict[str, Any] = {"params": parameters, "weight_decay": args.weight_decay if decay else 0.0}
                made.append(group if rate is None else {**group, "lr": rate})
    return made


def clip(accelerator: Any, roles: RoleModule, args: AlignConfig) -> Any:
    """Clip all roles together, or each by its own norm; returns the norm before clipping."""
    if args.value_max_grad_norm is None or "value" not in roles.roles:
        return accelerator.clip_grad_norm_(roles.parameters(), args.max_grad_norm)
    norms = []
    for role, model in roles.named_roles():
        limit = args.value_max_grad_norm if role == "value" else args.max_grad_norm
        norms.append(torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), limit)))
    return torch.stack(norms).norm()
