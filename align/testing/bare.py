"""The battery's checks on bare views. Each takes (method, seed) and returns what is wrong, or an empty text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from align.methods.base import Method, finish
from align.methods.evaluate import make_bare_view
from align.scoring.views import TOKEN_COLUMNS, Completions, View
from align.testing.reference_step import (
    accumulated_gradient,
    direct_gradient,
    evaluate,
    two_pass_gradient,
)
from align.testing.rows import TRAINED, Row, map_completions, random_rows, tracked

ROWS = 6


def state_of(method: Method, seed: int) -> Mapping[str, Tensor]:
    """A state that two steps on other rows have left."""
    state: Mapping[str, Tensor] = method.initial_state()
    for step in (1, 2):
        view = make_bare_view(method.view, random_rows(method, 4, seed + 1000 * step), state=state)
        state = method.observe(view)
    return state


@contextmanager
def replayed_detach(values: list[Tensor], replay: bool) -> Iterator[None]:
    """Record what `Tensor.detach` returns, or return what was recorded: stopped gradients then stay put under finite
    differences, which see the derivative that the method declares."""
    original = Tensor.detach
    recorded = iter(list(values))

    def detach(self: Tensor) -> Tensor:
        if replay:
            return next(recorded)
        values.append(original(self).clone())
        return values[-1]

    Tensor.detach = detach  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.detach = original  # type: ignore[method-assign]


def finite_differences(method: Method, seed: int) -> str:
    """Autograd equals central differences in every trained number (in float64, relative to 1e-6, and to what the
    rounding of a large loss allows)."""
    rows, leaves = tracked(random_rows(method, 3, seed, longest=3))
    state = state_of(method, seed)
    stops: list[Tensor] = []
    with replayed_detach(stops, replay=False):
        loss = evaluate(method, rows, state).total()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    if all(g is None or not g.any() for g in gradients):
        return "the loss has no gradient at all"
    step = 1e-6
    rounding = 4 * torch.finfo(loss.dtype).eps * abs(float(loss.detach())) / step
    for leaf, gradient in zip(leaves, gradients, strict=True):
        flat = leaf.data.view(-1)
        for i in range(flat.numel()):
            at, sides = flat[i].item(), []
            for value in (at + step, at - step):
                flat[i] = value
                with replayed_detach(stops, replay=True):
                    sides.append(float(evaluate(method, rows, state).total().data))
            flat[i] = at
            numeric = (sides[0] - sides[1]) / (2 * step)
            exact = 0.0 if gradient is None else float(gradient.view(-1)[i])
            if abs(numeric - exact) > 1e-6 * max(1.0, abs(exact)) + rounding:
                return f"autograd gives {exact:.9g}, finite differences {numeric:.9g}"
    return ""


def _value_and_gradient(
    method: Method, rows: Sequence[Row], leaves: Sequence[Tensor], state: Mapping[str, Tensor], **how: Any
) -> list[Tensor]:
    loss = evaluate(method, rows, state, **how).total()
    gradients = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return [loss.detach(), *filled]


def _far(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest number of either where that is above 1."""
    if len(ours) != len(theirs):
        return float("inf")
    a, b = (torch.cat([x.detach().reshape(-1).double() for x in xs]) for xs in (ours, theirs))
    return float((a - b).abs().max() / torch.stack([a.abs().max(), b.abs().max(), torch.tensor(1.0)]).max())


def _differs(ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str, tolerance: float = 1e-12) -> str:
    distance = _far(ours, theirs)
    return "" if distance <= tolerance else f"{what} changes the loss or its gradient by {distance:.3g}"


def order(method: Method, seed: int) -> str:
    """The order of units does not matter."""
    rows, leaves = tracked(random_rows(method, ROWS, seed))
    state = state_of(method, seed)
    shuffled = random.Random(seed).sample(rows, len(rows))
    there, here = (_value_and_gradient(method, some, leaves, state) for some in (shuffled, rows[::-1]))
    first = _value_and_gradient(method, rows, leaves, state)
    return _differs(first, there, "shuffling") or _differs(first, here, "reversing")


def padding(method: Method, seed: int) -> str:
    """More columns of padding change nothing."""
    rows, leaves = tracked(random_rows(method, ROWS, seed))
    state = state_of(method, seed)
    plain, padded = (_value_and_gradient(method, rows, leaves, state, width=width) for width in (0, 19))
    return _differs(plain, padded, "padding")


def masked_positions(method: Method, seed: int) -> str:
    """Numbers at unscored positions are not read."""
    rows = random_rows(method, ROWS, seed)
    state = state_of(method, seed)
    view = make_bare_view(method.view, rows, state=state, width=9)
    plain = finish(method.loss(view), view).total()
    spoiled = _spoiled(view)
    return _differs([plain], [finish(method.loss(spoiled), spoiled).total()], "a number at an unscored position")


def _spoiled(view: View) -> View:
    def spoil(completions: Completions) -> Completions:
        columns = dict(completions.columns)
        for name in set(columns) & set(TOKEN_COLUMNS):
            columns[name] = torch.where(completions.mask, columns[name], -3.7 + 0.1 * len(name))
        anchors = {name: torch.where(completions.mask, x, -2.9) for name, x in completions.anchors.items()}
        return replace(completions, columns=columns, anchors=anchors)

    parts = {field.name: getattr(view, field.name) for field in fields(view)}
    spoiled: dict[str, Any] = {name: spoil(part) for name, part in parts.items() if isinstance(part, Completions)}
    return replace(view, **spoiled)


def splitting(method: Method, seed: int) -> str:
    """Micro-batches and ranks: the gradient from parts of the batch equals the gradient of the whole."""
    rows = random_rows(method, ROWS, seed)
    state = state_of(method, seed)
    parameter = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)

    def forward(some: Sequence[Row]) -> list[Row]:
        return [map_completions(row, lambda one: _scored(one, parameter)) for row in some]

    take = accumulated_gradient if method.coupling == "unit" else two_pass_gradient
    whole = direct_gradient(method, rows, forward, [parameter], state)
    if not whole[0].any():
        return "the loss has no gradient at all"
    for sizes in ((2, 2, 2), (1, 5), (1, 1, 1, 1, 1, 1)):
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        problem = _differs(whole, take(method, parts, forward, [parameter], state), f"splitting into {sizes}")
        if problem:
            return problem
    return ""


def _scored(one: Row, parameter: Tensor) -> Row:
    """A stand-in for a model: every trained number moves with the parameters, each in its own way."""
    moved = {}
    for name in TRAINED:
        if name in one:
            base = torch.as_tensor(one[name], dtype=torch.float64).detach()
            phase = torch.arange(len(base), dtype=torch.float64)
            moved[name] = base * (1 + 0.1 * torch.sin(parameter[0] + base)) + 0.1 * parameter[1] * torch.cos(
                phase * parameter[2]
            )
    moved["logp"] = moved["logp"].clamp(max=-1e-3)
    return {**one, **moved}


def weights(method: Method, seed: int) -> str:
    """Weights multiply values and leave the counts alone; what a unit counts for is decided by the data."""
    rows = random_rows(method, ROWS, seed)

    def weighted(by: float) -> list[Row]:
        flat = [map_completions(row, lambda one: {**one, "weight": 1.0}) for row in rows]
        return [{**row, "weight": by} for row in flat]

    state = state_of(method, seed)
    once, twice = evaluate(method, weighted(1.0), state), evaluate(method, weighted(2.0), state)
    for logp in (-1e-3, -50.0):
        other = evaluate(method, _with(rows, logp, -1.0, 0.1), state).counts
        if not once.counts == twice.counts == other:
            return f"counts depend on weights or on the model: {once.counts}, {twice.counts}, {other}"
    return _differs([once.total() * 2], [twice.total()], "weighting every unit by 2")


def _with(rows: Sequence[Row], logp: float | None, reference: float, kl: float) -> list[Row]:
    """The rows with one log-probability everywhere (None: as they are)."""

    def change(one: Row) -> Row:
        n = len(one["logp"])
        given: dict[str, Any] = {"ref_logp": reference, "old_logp": reference, "sampler_logp": reference}
        given |= {"kl_ref_policy": kl, "kl_policy_ref": kl, "cross_entropy": kl, "logp": logp}
        if logp is None:
            return one
        anchors = {"anchor": {name: [logp] * n for name in one["anchor"]}} if "anchor" in one else {}
        return {**one, **{name: [given[name]] * n for name in given if name in one}, **anchors}

    return [map_completions(row, change) for row in rows]


def _equal_completions(rows: Sequence[Row]) -> list[Row]:
    changed = []
    for row in rows:
        first = row["chosen"] if "chosen" in row else row["completions"][0] if "completions" in row else row
        own = ("mismatched", "samples", "label", "reward", "weight", "role")
        columns = {n: v for n, v in first.items() if n not in own}

        def same(one: Row, columns: Row = columns) -> Row:
            return {**one, **columns}

        changed.append(map_completions(row, same))
    return changed


def extremes(method: Method, seed: int) -> str:
    """Loss and gradient stay finite at log-probabilities 0 and -1e4, equal completions, one token, one unit, bf16."""
    rows = random_rows(method, ROWS, seed)
    cases = {
        "log-probabilities 0": _with(rows, 0.0, 0.0, 0.0),
        "log-probabilities 0, reference -1e4": _with(rows, 0.0, -1e4, 30.0),
        "log-probabilities -1e4": _with(rows, -1e4, -1e4, 0.0),
        "log-probabilities -1e4, reference 0": _with(rows, -1e4, 0.0, 1e4),
        "equal completions": _equal_completions(rows),
        "one token each": random_rows(method, ROWS, seed, longest=1),
        "one unit": random_rows(method, 1, seed),
        "ordinary numbers": rows,
    }
    for label, some in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            made, leaves = tracked(some, dtype)
            terms = evaluate(method, made, dtype=dtype)
            loss = terms.total()
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            where = f"{label}, {str(dtype).removeprefix('torch.')}"
            if not torch.isfinite(loss):
                return f"{where}: the loss is {float(loss.detach())}"
            if any(g is not None and not torch.isfinite(g).all() for g in gradients):
                return f"{where}: the gradient is not finite"
            if any(term.values.dtype == torch.bfloat16 for term in terms.values()):
                return f"{where}: the loss is taken in half precision"
    return ""


def state(method: Method, seed: int) -> str:
    """`observe` keeps the state's names and forms (a memory may grow), finite, in any order; `loss` changes nothing."""
    start = method.initial_state()
    rows = random_rows(method, ROWS, seed)
    views = [make_bare_view(method.view, some, state=start) for some in (rows, rows[::-1])]
    ours, theirs = (method.observe(view) for view in views)
    forms = [{name: (x.ndim, x.shape[1:], x.dtype) for name, x in made.items()} for made in (ours, start)]
    if forms[0] != forms[1]:
        return f"observe returns {sorted(ours)}, the initial state is {sorted(start)}"
    if any(not torch.isfinite(x).all() or x.requires_grad for x in ours.values()):
        return "observe returns a state that is not finite, or carries a gradient"
    before = {name: x.clone() for name, x in start.items()}
    once, again = (finish(method.loss(views[0]), views[0]).total() for _ in range(2))
    if any(not torch.equal(before[name], x) for name, x in start.items()) or not torch.equal(once, again):
        return "loss changes the state, or is another the second time"
    return _differs(list(ours.values()), list(theirs.values()), "reversing") if ours else ""


BARE_CHECKS: dict[str, Callable[[Method, int], str]] = {
    "finite differences": finite_differences,
    "order": order,
    "padding": padding,
    "masked positions": masked_positions,
    "splitting": splitting,
    "weights": weights,
    "extremes": extremes,
    "state": state,
}
