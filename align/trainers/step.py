"""One optimiser step's forward and backward passes: exact for every micro-batching, packing and number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.compat.accelerate import backward, synchronising
from align.core.errors import TrainingError
from align.data.groups import TokenGroup
from align.methods.base import Terms, terms_of
from align.trainers.engine import Engine, MicroBatch, Share
from align.trainers.metrics import Meter, measure

State = Mapping[str, Tensor]


def random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator and of the device's."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def restore_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


@dataclass(frozen=True, eq=False)
class StepResult:
    """`loss`: mean over ranks gives the global loss. `state`: the method's next state."""

    loss: Tensor
    state: dict[str, Tensor]
    micro_batches: int
    unique_tokens: int


class PackedStep:
    """Runs the micro-batches of a global batch and leaves the exact gradient of the global loss.

    DDP, FSDP and ZeRO average gradients over ranks, so every backward is multiplied by the number of ranks: that is
    the one place where it is undone.
    """

    def __init__(self, engine: Engine, accelerator: Any, meter: Meter) -> None:
        self.engine, self.accelerator, self.meter = engine, accelerator, meter

    def run(self, groups: Sequence[TokenGroup], state: State, seed: int) -> StepResult:
        """Accumulate the gradient of one global batch.

        Raises:
            TrainingError: a loss is not finite; names the rows. Raised on all ranks, before the optimiser can step.
        """
        engine = self.engine
        share = engine.share(groups)
        if engine.method.coupling == "batch":
            loss, outputs = self._coupled(share, state, seed)
        else:
            loss, parts = self._separate(share, state, seed)
            outputs = engine.gather(share, parts) if state else {}
        next_state = dict(state)
        if state:
            with torch.no_grad():
                next_state = engine.method.observe(engine.view(share.groups, outputs, state, seed))
        tokens = sum(micro.packed.unique_tokens for micro in share.micros if not micro.dummy)
        return StepResult(loss, next_state, len(share.micros), tokens)

    def _separate(self, share: Share, state: State, seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        engine, kept = self.engine, []
        total = torch.zeros((), device=engine.device)
        keep = bool(state)
        for number, micro in enumerate(share.micros):
            last = number == len(share.micros) - 1
            with synchronising(self.accelerator, engine.module, last):
                outputs = engine.outputs(micro)
                view = engine.view(micro.groups, outputs, state, seed)
                terms = terms_of(engine.method, view)
                loss = terms.total(share.counts) * (0.0 if micro.dummy else float(engine.world))
                total = total + loss.detach()
                if not micro.dummy:
                    self._record(view, terms)
                if last:
                    loss = self._add_penalty(loss)
                    self._guard(total, share)
                backward(self.accelerator, loss)
            if keep:
                kept.append({name: output.detach() for name, output in outputs.items()})
        return total, kept

    def _coupled(self, share: Share, state: State, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Two passes: outputs without gradient, one coefficient per output, then backward of their inner product."""
        engine = self.engine
        single = len(share.micros) == 1
        with torch.set_grad_enabled(single), synchronising(self.accelerator, engine.module, single):
            drawn = [random_state(engine.device)]
            parts = []
            for micro in share.micros:
                parts.append(engine.outputs(micro))
                drawn.append(random_state(engine.device))
        gathered = engine.gather(share, parts)
        loss, coefficients = self.coefficients(share, gathered, state, seed)
        self._guard(loss, share)
        for number, micro in enumerate(share.micros):
            last = number == len(share.micros) - 1
            with synchronising(self.accelerator, engine.module, last):
                outputs = parts[0]
                if not single:
                    # The coefficients belong to the first pass's outputs, so an adapter's dropout must fall as it did.
                    restore_random_state(drawn[number], engine.device)
                    outputs = engine.outputs(micro, frozen=parts[number])
                inner = self._inner(micro, outputs, coefficients)
                backward(self.accelerator, self._add_penalty(inner) if last else inner)
            if not micro.dummy:
                view = engine.view(micro.groups, outputs, state, seed)
                self.meter.add(measure(engine.method, view))
        return loss, gathered

    def coefficients(
        self, share: Share, gathered: Mapping[str, Tensor], state: State, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The global loss, and d loss / d output for every trained output, [N, T]; the same on every rank."""
        engine = self.engine
        trained = [name for name in gathered if name not in engine.needed.frozen]
        leaves = {name: gathered[name].detach().clone().requires_grad_() for name in trained}
        with torch.enable_grad():
            view = engine.view(share.groups, {**gathered, **leaves}, state, seed)
            terms = terms_of(engine.method, view)
            total = terms.total(share.counts)
            found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        if engine.rank == 0:
            self.meter.add_terms(terms)
        return total.detach(), {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}

    def _inner(self, micro: MicroBatch, outputs: Mapping[str, Tensor], coefficients: Mapping[str, Tensor]) -> Tensor:
        rows = micro.rows.to(self.engine.device)
        scale = 0.0 if micro.dummy else float(self.engine.world)
        parts = [
            (outputs[name] * coefficient[rows, : outputs[name].shape[1]]).sum() * scale
            for name, coefficient in coefficients.items()
        ]
        # Every output takes part, so that DDP and ZeRO find every parameter in every backward.
        parts += [
            outputs[name].sum() * 0.0 for name in outputs if name not in coefficients and outputs[name].requires_grad
        ]
        return torch.stack(parts).sum()

    def _add_penalty(self, loss: Tensor) -> Tensor:
        # Once per global batch and on every rank: the average over ranks leaves it as it is.
        penalty = self.engine.method.penalty(p for p in self.engine.roles.parameters() if p.requires_grad)
        return loss if penalty is None else loss + penalty

    def _record(self, view: Any, terms: Terms) -> None:
        self.meter.add(measure(self.engine.method, view))
        self.meter.add_terms(terms)

    def _guard(self, loss: Tensor, share: Share) -> None:
        """Before the last backward: under DeepSpeed a later check would find the optimiser stepped."""
        bad = (~torch.isfinite(loss.detach())).to(torch.float32).reshape(1)
        if self.engine.world > 1:
            torch.distributed.all_reduce(bad)
        if not bad.item():
            return
        rows = [str(group.row) for micro in share.micros for group in micro.groups]
        shown = ", ".join(rows[:20]) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        raise TrainingError(
            f"the loss is {float(loss.detach())}",
            where=shown,
            why="a non-finite loss would destroy the weights in one step",
            mend="look at these rows; lower the learning rate or beta; the last checkpoint is good",
        )
