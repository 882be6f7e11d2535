"""The LM head: hidden states of the scored positions to functionals of their next-token distributions.

The logits of all positions never stand in memory at once beyond a stated limit: positions go through the head in
chunks. While the chunks' logits fit `Limits.keep_bytes` they are kept for the backward pass (as fast as a plain
`linear` and `cross_entropy`, at a third of its memory); above it they are computed again (about 1.4 times the
time, measured on CPU). Sums over the vocabulary are float32 even under bfloat16 autocast.

The head is *called* as a module, with its forward swapped for that call, so that hooks which gather a sharded weight
run, before the forward and before the backward.

On a GPU the plain log-probability is TRL's Triton kernel; the chunks here serve CPUs and every other functional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from align.compat.trl import chunked_logp, has_logp_kernel
from align.scoring.facts import LogitTransform
from align.scoring.vocab import FUNCTIONALS, NEEDS_OTHER, Tile

T = TypeVar("T")
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """`keep_bytes`: logits kept for the backward. `chunk_bytes`, `chunk_tokens`: one chunk's logits, in float32."""

    keep_bytes: int = 256 * MIB
    chunk_bytes: int = 64 * MIB
    chunk_tokens: int = 256

    def chunk(self, vocabulary: int) -> int:
        return max(16, min(self.chunk_tokens, self.chunk_bytes // (4 * vocabulary)))


CPU_LIMITS = Limits()
GPU_LIMITS = Limits(keep_bytes=1024 * MIB, chunk_bytes=512 * MIB, chunk_tokens=2048)


@dataclass(frozen=True, eq=False)
class Other:
    """A second, frozen model in the same chunks: its head, its hidden states [M, H'] and what it does to logits.

    `gathered`: its head is the policy's own, so the weight is there, and the module is not called inside its own call.
    `context` is entered around calls of a head that is not a plain linear layer (adapters switched off).
    """

    head: nn.Module
    hidden: Tensor
    transform: LogitTransform
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    gathered: bool = False
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked before any swap: the two heads may be one module (an adapter switched off).
        object.__setattr__(self, "plain", is_plain_linear(self.head))

    def run(self, body: Callable[[Callable[[slice], Tensor]], T]) -> T:
        """`body(logits_of)` with the head's weight gathered; `logits_of(part)` are raw logits without gradient."""
        head: Any = self.head
        results: list[T] = []

        def with_weight(hidden: Tensor) -> Tensor:
            weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
            results.append(body(lambda part: _logits(hidden[part], weight, bias)))
            return hidden

        if self.plain:
            if self.gathered:
                with_weight(self.hidden.detach())
            else:
                call_swapped(head, with_weight, self.hidden.detach())
            return results[0]

        def as_it_is(part: slice) -> Tensor:
            with torch.no_grad(), self.context():
                return head(self.hidden[part])

        return body(as_it_is)


@dataclass(eq=False)
class Call:
    """One evaluation: what is wanted, and what the chunks share.

    Attributes:
        needs: names in `vocab.FUNCTIONALS`. targets: long [M]. chunk: tokens at a time. keep: logits are kept.
        autocast: the compute dtype of the surrounding autocast, or None.
    """

    needs: tuple[str, ...]
    targets: Tensor
    transform: LogitTransform
    chunk: int
    keep: bool
    other: Other | None = None
    autocast: torch.dtype | None = None
    kept: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def parts(self) -> Iterator[slice]:
        for start in range(0, self.targets.shape[0], self.chunk):
            yield slice(start, start + self.chunk)

    def tile(self, logits: Tensor, other: Tensor | None, part: slice) -> Tile:
        second = None
        if other is not None and self.other is not None:
            second = transformed(widened(other), self.other.transform)
        return Tile(transformed(widened(logits), self.transform), self.targets[part], second)

    def values(self, tile: Tile) -> list[Tensor]:
        if self.needs == ("logp",):  # one fused pass instead of a log-softmax and a gather
            return [-cross_entropy(tile.logits, tile.targets, reduction="none")]
        return [FUNCTIONALS[name](tile) for name in self.needs]

    def with_other(self, body: Callable[[Callable[[slice], Tensor | None]], T]) -> T:
        if self.other is None:
            return body(lambda part: None)
        return self.other.run(body)


def evaluate(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    needs: Sequence[str],
    transform: LogitTransform | None = None,
    other: Other | None = None,
    limits: Limits | None = None,
) -> dict[str, Tensor]:
    """Functionals at M positions.

    Args:
        hidden: [M, H], the states that predict `targets` (long [M]).
        needs: names in `vocab.FUNCTIONALS`; those in `vocab.NEEDS_OTHER` need `other`.
    Returns:
        name -> [M], float32 (float64 for a float64 model), with gradient where grad is on.
    """
    limits = limits or (GPU_LIMITS if hidden.is_cuda else CPU_LIMITS)
    vocabulary = _vocabulary(head)
    wanted = tuple(needs)
    paired = bool(NEEDS_OTHER & set(wanted))
    if other is not None and other.head is head:
        other = replace(other, gathered=True)
    kind = hidden.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    size = (autocast or hidden.dtype).itemsize * (2 if paired else 1)
    keep = torch.is_grad_enabled() and targets.shape[0] * vocabulary * size <= limits.keep_bytes
    if paired and other is not None and is_sharded(other.head):
        keep = False  # ranks differ in positions, and all must gather the second head equally often in the backward
    call = Call(
        wanted,
        targets,
        transform or LogitTransform(),
        limits.chunk(vocabulary),
        keep,
        other if paired else None,
        autocast,
    )
    if not is_plain_linear(head):
        return dict(zip(wanted, _evaluate_as_it_is(head, hidden, call), strict=True))

    fused = _takes_kernel(head, hidden, wanted)

    def forward(states: Tensor) -> tuple[Tensor, ...]:
        if fused:
            plain: Any = head
            rule = call.transform
            weights = (plain.weight, plain.bias)
            return (chunked_logp(states, *weights, targets, rule.cap, rule.scale, rule.temperature),)
        return _Chunks.apply(states, head.weight, head.bias, call)  # type: ignore[no-any-return]

    return dict(zip(wanted, call_swapped(head, forward, hidden), strict=True))


def is_plain_linear(head: nn.Module) -> bool:
    """Whether the head does nothing but `linear`, so that its forward may be swapped. An adapter on it does more."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)


def _takes_kernel(head: nn.Module, hidden: Tensor, wanted: tuple[str, ...]) -> bool:
    """Whether TRL's Triton kernel does all that is wanted. It sums in float32; sharded weights need the hooks."""
    exact = hidden.dtype == torch.float64
    return wanted == ("logp",) and not exact and _on_gpu(hidden) and not is_sharded(head) and has_logp_kernel()


def _on_gpu(hidden: Tensor) -> bool:
    return hidden.is_cuda


def is_sharded(head: nn.Module) -> bool:
    """Whether a weight of the head is spread over ranks (DeepSpeed ZeRO-3, FSDP2)."""
    return any(hasattr(weight, "ds_id") or hasattr(weight, "placements") for weight in head.parameters())


def call_swapped(module: nn.Module, forward: Callable[[Tensor], Any], *args: Tensor) -> Any:
    """Call `module` so that its hooks run around `forward` instead of its own forward."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        return module(*args)
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def widened(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def transformed(logits: Tensor, transform: LogitTransform) -> Tensor:
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.cap is not None:
        logits = torch.tanh(logits / transform.cap) * transform.cap
    return logits if transform.temperature == 1.0 else logits / transform.temperature


def _vocabulary(head: nn.Module) -> int:
    size: Any = getattr(head, "out_features", None)
    if size is None:
        weight: Any = getattr(head, "weight", None)
        size = weight.shape[0] if weight is not None else 2**17
    return int(size)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.no_grad():
        return linear(hidden, weight, bias)


def _evaluate_as_it_is(head: nn.Module, hidden: Tensor, call: Call) -> list[Tensor]:
    """A head with an adapter, or quantised: called as it is for every chunk, checkpointed where logits are not kept.

    A rank with more positions calls it more often, so such a head must not be sharded.
    """
    recompute = torch.is_grad_enabled() and not call.keep

    def values(states: Tensor, other: Tensor | None, part: slice) -> tuple[Tensor, ...]:
        return tuple(call.values(call.tile(head(states), other, part)))

    def body(other_of: Callable[[slice], Tensor | None]) -> list[tuple[Tensor, ...]]:
        columns = []
        for part in call.parts():
            other = other_of(part)
            if recompute:
                columns.append(checkpoint(values, hidden[part], other, part, use_reentrant=False))
            else:
                columns.append(values(hidden[part], other, part))
        return columns

    return [torch.cat(column) for column in zip(*call.with_other(body), strict=True)]


class _Chunks(torch.autograd.Function):
    """(hidden [M, H], weight [V, H], bias [V] or None) -> one [M] per functional, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias)
        keep = call.keep and any(ctx.needs_input_grad[:3])
        states, matrix, offset = _cast(call, hidden, weight, bias)

        def body(other_of: Callable[[slice], Tensor | None]) -> list[list[Tensor]]:
            columns = []
            for part in call.parts():
                logits, other = linear(states[part], matrix, offset), other_of(part)
                if keep:
                    call.kept.append((logits, other))
                columns.append(call.values(call.tile(logits, other, part)))
            return columns

        with torch.autocast(hidden.device.type, enabled=False):
            columns = call.with_other(body)
        return tuple(torch.cat(column) for column in zip(*columns, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        hidden, weight, bias = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        states, matrix, offset = _cast(call, hidden, weight, bias)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=weight.device) if need_bias else None

        # Kept logits serve one backward; a second one, after `retain_graph`, computes them again.
        kept, call.kept = call.kept, []

        def body(other_of: Callable[[slice], Tensor | None]) -> None:
            for number, part in enumerate(call.parts()):
                if kept:
                    logits, other = kept[number]
                else:
                    logits, other = linear(states[part], matrix, offset), other_of(part)
                wide_grad = _logit_gradient(call, logits, other, part, [grad[part] for grad in grads])
                grad = wide_grad.to(logits.dtype)
                if d_hidden is not None:
                    d_hidden[part] = grad @ matrix
                if d_weight is not None:
                    _add_product(d_weight, grad, states[part])
                if d_bias is not None:
                    d_bias.add_(wide_grad.sum(0))

        with torch.autocast(hidden.device.type, enabled=False):
            if kept:
                body(lambda part: None)
            else:
                call.with_other(body)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
        )


def _cast(call: Call, *tensors: Tensor | None) -> list[Any]:
    """Inputs in autocast's dtype, once per evaluation: inside a custom function autocast would cast per chunk."""
    return [t if t is None or call.autocast is None else t.to(call.autocast) for t in tensors]


def _add_product(total: Tensor, grad: Tensor, states: Tensor) -> None:
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, states)
    else:
        total.add_(grad.T @ states)


def _logit_gradient(call: Call, logits: Tensor, other: Tensor | None, part: slice, grads: list[Tensor]) -> Tensor:
    """Gradient of sum_k <grads_k, values_k> with respect to the raw logits, at least float32, [n, V]."""
    if call.needs != ("logp",):
        with torch.enable_grad():
            leaf = widened(logits.detach()).requires_grad_()
            tile = call.tile(leaf, other, part)
            (grad,) = torch.autograd.grad(call.values(tile), leaf, grads)
        return grad
    used = transformed(widened(logits), call.transform)
    upstream = grads[0].to(used.dtype)[:, None]
    grad = torch.softmax(used, dim=-1).mul_(-upstream)
    grad.scatter_add_(1, call.targets[part][:, None], upstream)
    rule = call.transform
    if rule.cap is not None:
        grad.mul_(1 - (used * (rule.temperature / rule.cap)).square())
    slope = rule.scale / rule.temperature
    return grad if slope == 1.0 else grad.mul_(slope)
