"""The reward that a policy implies: beta times its log-ratio to a reference, from token log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import nn

from align.core.errors import ConfigError
from align.core.hashing import digest
from align.core.progress import Progress, silent
from align.feedback.base import Failed, Item, Judged
from align.reference.weights_hash import module_hash
from align.scoring.backends import Backend, prepare
from align.scoring.branches import branch_logps
from align.scoring.layout import Tree

Rule = Literal["log_ratio", "mean_logp"]


@dataclass(frozen=True, eq=False)
class FrozenPolicy:
    """A policy whose answers' tokens are scored, and which is not trained while it is used here.

    Args:
        context: entered around its passes; `model.disable_adapter` for the base below an adapter.
        weights: hash of what it computes with.
    """

    model: nn.Module
    backend: Backend
    weights: str
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def of(cls, model: nn.Module, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> FrozenPolicy:
        """A model that is loaded; it is set to evaluation, and its attention to scoring."""
        model.eval()
        # The hash of a model under its adapter does not say whether the adapter was on.
        weights = module_hash(model) + ("" if context is nullcontext else ":in context")
        return cls(model, prepare(model), weights, context)

    def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        """Per tree, per branch: float64 [T] at temperature 1."""
        return branch_logps(self.model, self.backend, trees, self.context)


@dataclass(frozen=True, eq=False)
class ImplicitReward:
    """r(y) of each answer under the policy.

        log_ratio:  beta * sum_t [log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)]    (DPO, arXiv 2305.18290, eq. 5)
        mean_logp:  mean_t log pi(y_t | x, y_<t)    CREAM's first comparison model (arXiv 2410.12735): no reference

    The end token is one of y's where it was sampled. A scorer: its name is given by `Scored`.
    """

    policy: FrozenPolicy
    reference: FrozenPolicy | None = None
    beta: float = 0.1
    rule: Rule = "log_ratio"
    draws: bool = field(default=False, init=False)
    log: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.rule not in ("log_ratio", "mean_logp"):
            raise ConfigError(f"there is no rule `{self.rule}`", mend="use log_ratio or mean_logp")
        if self.rule == "log_ratio" and self.reference is None:
            raise ConfigError("the implicit reward is a log-ratio and needs a reference", mend="give `reference`")
        if self.rule == "mean_logp" and self.reference is not None:
            raise ConfigError("`mean_logp` uses no reference", mend="leave `reference` out")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"`beta` is {self.beta}", mend="use a finite number above 0")

    @property
    def key(self) -> Mapping[str, Any]:
        reference = self.reference.weights if self.reference is not None else None
        beta = self.beta if self.rule == "log_ratio" else None
        own = {"rule": self.rule, "beta": beta, "backend": self.policy.backend.name}
        return {"kind": "implicit", "policy": self.policy.weights, "reference": reference, **own}

    def content(self, item: Item) -> Any:
        return [digest(item.group.prompt_ids), digest(item.answer.ids)]

    def score(self, items: Sequence[Item], seed: int, progress: Progress = silent) -> list[Judged]:
        """See `Scorer.score`. The answers of a group share its prompt's tokens in the passes."""
        out: list[Judged] = [Failed("an empty answer")] * len(items)
        groups: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            if len(item.answer) and len(item.group.prompt_ids):
                groups.setdefault(id(item.group), []).append(place)
        trees = [
            Tree.of(items[places[0]].group.prompt_ids.tolist(), [items[place].answer.ids.tolist() for place in places])
            for places in groups.values()
        ]
        own = self.policy.logps(trees)
        other = self.reference.logps(trees) if self.reference is not None else None
        for number, places in enumerate(groups.values()):
            for branch, place in enumerate(places):
                logp = own[number][branch]
                if other is None:
                    value = float(logp.mean())
                else:
                    value = self.beta * float((logp - other[number][branch]).sum())
                out[place] = value if math.isfinite(value) else Failed("log-probs that are not finite")
        progress(len(items))
        return out
