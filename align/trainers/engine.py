"""Micro-batches of a global batch, and the numbers a method reads about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.data.groups import TokenGroup
from align.data.partners import add_mismatched
from align.methods.base import Method, terms_of
from align.reference.columns import Column
from align.scoring.assemble import (
    ANCHOR,
    ColumnsNeeded,
    columns_needed,
    make_view,
    padded_column,
    placeholder_outputs,
    trees_of,
)
from align.scoring.backends import Backend
from align.scoring.batching import plan
from align.scoring.layout import PackedBatch, Tree
from align.scoring.views import Completions, Pairs, View
from align.trainers.roles import RoleModule

VALUE = "value"


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Groups that run through the model together, and where their completions stand in the global batch."""

    groups: tuple[TokenGroup, ...]
    rows: Tensor
    trees: list[Tree]
    packed: PackedBatch
    dummy: bool = False


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's micro-batches of one global batch, and the batch's exact counts."""

    micros: list[MicroBatch]
    groups: tuple[TokenGroup, ...]
    counts: Mapping[str, float]
    completions: int
    width: int


@dataclass
class Engine:
    """Plans, packs and scores. One per trainer; training and evaluation use the same.

    Attributes:
        module: what is called, the wrapped `RoleModule`. `roles` is the unwrapped one.
        backend: packs trees for this model.
        column: where `ref_logp` comes from, or None.
        live: a frozen model for `kl_*`, or None.
        live_samples: adds samples of the present policy to a batch, or None.
        guides: other frozen policies, by the names of their `anchor.` columns.
        budget: tokens per micro-batch.
        temperature: log-probs of all policies are those at this temperature, at which rollouts were sampled.
    """

    module: Any
    roles: RoleModule
    method: Method
    backend: Backend
    device: torch.device
    budget: int
    rank: int = 0
    world: int = 1
    column: Column | None = None
    live: Any = None
    live_samples: Callable[[Sequence[TokenGroup], int], list[TokenGroup]] | None = None
    guides: Mapping[str, Column] = field(default_factory=dict)
    temperature: float = 1.0
    needed: ColumnsNeeded = field(init=False)

    def __post_init__(self) -> None:
        self.needed = columns_needed(self.method)
        self.requests = {"policy": self.needed.engine}
        if self.needed.value:
            self.requests[VALUE] = self.needed.value

    def ready(self, groups: Sequence[TokenGroup], seed: int) -> list[TokenGroup]:
        """The batch with what is not in its rows: mismatched partners, samples drawn now. A collective with these."""
        if self.live_samples is not None and groups:
            groups = self.live_samples(groups, seed)
        if "mismatched" in self.needed.data and groups:
            return add_mismatched(list(groups), seed)
        return list(groups)

    @staticmethod
    def completions_of(view: Any) -> list[Completions]:
        """The view's completions, whatever its kind."""
        return [view.chosen, view.rejected] if isinstance(view, Pairs) else [view.completions]

    def share(self, groups: Sequence[TokenGroup], counted: bool = True) -> Share:
        """Cut a global batch into micro-batches; every rank computes the same plan and keeps its part.

        `counted`: whether units are counted, which asks the method; what is scored alone need not be trainable.
        """
        groups = tuple(groups)
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group.completions) + len(group.mismatched))
        cut = plan([group.tokens for group in groups], self.world, self.budget)
        micros = [self._micro([groups[i] for i in part], [starts[i] for i in part]) for part in cut[self.rank] if part]
        missing = len(cut[self.rank]) - len(micros)
        if missing:
            dummy = self._micro([min(groups, key=lambda group: group.tokens)], [0], dummy=True)
            micros = [dummy] * missing + micros
        width = max(len(c) for group in groups for c in (*group.completions, *group.mismatched))
        return Share(micros, groups, self._counts(groups) if counted else {}, starts[-1], width)

    def _counts(self, groups: Sequence[TokenGroup]) -> dict[str, float]:
        # Units depend on the data alone, so a loss of zeros counts them exactly, before any forward and on every rank.
        with torch.no_grad():
            view = self.view(groups, placeholder_outputs(groups, self.needed.outputs), self.method.initial_state(), 0)
            return dict(terms_of(self.method, view).counts)

    def _micro(self, groups: list[TokenGroup], starts: list[int], dummy: bool = False) -> MicroBatch:
        trees = trees_of(groups)
        rows = torch.cat(
            [torch.arange(start, start + len(tree.branches)) for start, tree in zip(starts, trees, strict=True)]
        )
        return MicroBatch(tuple(groups), rows, trees, self._packed(trees), dummy)

    def _packed(self, trees: list[Tree]) -> PackedBatch:
        packed = self.backend.pack(trees, self.device)
        return packed if self.temperature == 1.0 else replace(packed, temperature=self.temperature)

    def outputs(self, micro: MicroBatch, frozen: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Policy, value and reference numbers of a micro-batch, [n, T]; gradients flow where autograd is on.

        `frozen`: outputs of an earlier pass over the same micro-batch, whose frozen columns are taken over.
        """
        if frozen is not None:
            frozen = {name: frozen[name] for name in self.needed.frozen}
        else:
            with torch.no_grad(), self.roles.autocast(self.device.type):
                frozen = self._frozen(micro)
        scored = self.module(packed=micro.packed, requests=self.requests, other=self.live)
        if self.needed.previous and "old_logp" not in frozen:
            # The policy that the update started from: this very one, where a batch of rollouts feeds one step.
            old = self._carried(micro, "old_logp")
            frozen = {**frozen, "old_logp": scored["logp"].detach() if old is None else old}
        return {**scored, **frozen}

    def _carried(self, micro: MicroBatch, name: str) -> Tensor | None:
        """A column that came with every completion of a micro-batch, [n, T]; None where it did not."""
        branches = [branch for group in micro.groups for branch in (*group.completions, *group.mismatched)]
        if not all(name in branch.columns for branch in branches):
            return None
        return torch.from_numpy(padded_column(branches, name, micro.packed.width)).to(self.device, torch.float32)

    def _frozen(self, micro: MicroBatch) -> dict[str, Tensor]:
        """The reference's columns, and the anchors: other policies, or the reference after other prompts."""
        found: dict[str, Tensor] = {}
        carried = self._carried(micro, "ref_logp") if self.needed.reference else None
        if carried is not None:
            found["ref_logp"] = carried
        elif self.column is not None:
            found |= self.column.column(micro.packed, micro.trees, self.needed.reference)
        for full in sorted(self.needed.anchors):
            name = full.removeprefix(ANCHOR)
            if name in self.guides:
                found[full] = self.guides[name].column(micro.packed, micro.trees, {f"{name}_logp"})[f"{name}_logp"]
            elif self.column is not None and name in self.method.contexts():
                trees = trees_of(micro.groups, name)
                packed = self._packed(trees)
                found[full] = self.column.column(packed, trees, {"ref_logp"})["ref_logp"]
            else:
                raise ConfigError(
                    f"method `{self.method.id}` needs log-probs of a frozen policy named `{name}`",
                    mend="set `guide_model` or `previous_model` (`reference.guide`, `reference.previous` in a recipe)",
                )
        return found

    def view(
        self, groups: Sequence[TokenGroup], outputs: Mapping[str, Tensor], state: Mapping[str, Tensor], seed: int
    ) -> View:
        return make_view(self.method.view, groups, outputs, state=state, seed=seed)

    def gather(self, share: Share, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Detached outputs of all ranks in the order of the global batch: name -> [N, T] on every rank."""
        gathered: dict[str, Tensor] = {}
        for name in sorted(self.needed.outputs):
            extra = 1 if name == VALUE else 0
            table = torch.zeros(share.completions, share.width + extra, device=self.device)
            for micro, part in zip(share.micros, parts, strict=True):
                if not micro.dummy:
                    values = part[name].detach()
                    table[micro.rows.to(self.device), : values.shape[1]] = values.to(table.dtype)
            if self.world > 1:
                # Every cell is non-zero on one rank at most, so the sum is a gather, and exact.
                torch.distributed.all_reduce(table)
            gathered[name] = table
        return gathered
