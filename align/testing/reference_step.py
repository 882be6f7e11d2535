"""The gradient of one global batch, plainly: in one piece, and in two passes over parts of it.

`outputs_of(rows)` stands for a forward pass: it returns the rows with their trained columns as tensors that depend on
the parameters. Trainers are compared with `direct_gradient`; `two_pass_gradient` is the rule by which they may take a
batch-coupled method apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from align.methods.base import Method, Terms, finish
from align.methods.evaluate import make_bare_view
from align.testing.rows import Row, outputs_in, tracked

Forward = Callable[[Sequence[Row]], list[Row]]


def evaluate(
    method: Method,
    rows: Sequence[Row],
    state: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    width: int = 0,
) -> Terms:
    """The finished terms of one batch; `state` is the method's initial one by default."""
    state = method.initial_state() if state is None else state
    view = make_bare_view(method.view, rows, requires=method.requires(), state=state, dtype=dtype, width=width)
    return finish(method.loss(view.only(method.reads())), view)


def direct_gradient(
    method: Method,
    rows: Sequence[Row],
    outputs_of: Forward,
    parameters: Sequence[Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """The gradient of the loss of the whole batch in one graph; zeros where a parameter has none."""
    return _gradient(evaluate(method, outputs_of(rows), state).total(), parameters)


def accumulated_gradient(
    method: Method,
    parts: Sequence[Sequence[Row]],
    outputs_of: Forward,
    parameters: Sequence[Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """For `coupling="unit"`: the sum over parts of the gradients of (part's sum / global count)."""
    counts = evaluate(method, [row for part in parts for row in part], state).counts
    gradients = [_gradient(evaluate(method, outputs_of(part), state).total(counts), parameters) for part in parts]
    return [torch.stack(own).sum(0) for own in zip(*gradients, strict=True)]


def two_pass_gradient(
    method: Method,
    parts: Sequence[Sequence[Row]],
    outputs_of: Forward,
    parameters: Sequence[Tensor],
    state: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """For `coupling="batch"`: one coefficient per output from the whole batch, then each part's weighted outputs."""
    with torch.no_grad():
        first = [outputs_of(part) for part in parts]
    rows, leaves = tracked([row for part in first for row in part])
    coefficients = iter(_gradient(evaluate(method, rows, state).total(), leaves))
    gradients = []
    for part in parts:
        outputs = outputs_in(outputs_of(part))
        weighted = [(next(coefficients) * output).sum() for output in outputs]
        gradients.append(_gradient(torch.stack(weighted).sum(), parameters))
    return [torch.stack(own).sum(0) for own in zip(*gradients, strict=True)]


def _gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(inputs), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
