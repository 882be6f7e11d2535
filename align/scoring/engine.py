"""One scoring pass: a packed batch through the model to per-token numbers on the [N, T] grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from align.compat.transformers import attention_of
from align.core.errors import ConfigError, ModelError, suggestion
from align.scoring.attention import TREE
from align.scoring.facts import accepts, head_of, logit_transform, trunk_of
from align.scoring.head import Limits, Other, evaluate
from align.scoring.layout import PackedBatch, TreeLayout
from align.scoring.vocab import FUNCTIONALS, NEEDS_OTHER


def score(
    model: nn.Module,
    packed: PackedBatch,
    needs: Iterable[str] = frozenset({"logp"}),
    *,
    other: nn.Module | None = None,
    other_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    limits: Limits | None = None,
) -> dict[str, Tensor]:
    """Log-probabilities and other functionals of every scored token.

    Args:
        model: a causal LM, or a `PeftModel` of one; prepared with the back end that packed the batch.
        packed: on the model's device.
        needs: names in `vocab.FUNCTIONALS`.
        other: the frozen model of `kl_*`, scored on the same batch without gradient.
        other_context: entered around `other`, for example `model.disable_adapter` with `other=model`.
        limits: bytes and tokens of the head; the default depends on the device.
    Returns:
        name -> [N, T], float32 (float64 for a float64 model), zero where nothing is scored.
    """
    wanted = tuple(sorted(set(needs)))
    _check(wanted, other)
    selected, live = _select(hidden_states(model, packed), packed.read_position)
    transform = replace(logit_transform(model), temperature=packed.temperature)
    second = None
    if other is not None and NEEDS_OTHER & set(wanted):
        with torch.no_grad(), other_context():
            states, _ = _select(hidden_states(other, packed), packed.read_position)
        theirs = replace(logit_transform(other), temperature=packed.temperature)
        second = Other(head_of(other), states, theirs, other_context)
    targets, cells = packed.read_target, packed.read_cell
    if not live:
        targets = cells = packed.read_position.new_zeros(1)
    columns = evaluate(head_of(model), selected, targets, wanted, transform, second, limits)
    shape = (packed.n_branches, packed.width)
    return {name: scatter(values if live else values * 0, cells, shape) for name, values in columns.items()}


def hidden_states(model: nn.Module, packed: PackedBatch) -> Tensor:
    """The trunk's last hidden states, [R, L, H]."""
    trunk = trunk_of(model)
    arguments: dict[str, Any] = {"input_ids": packed.input_ids, "use_cache": False}
    if packed.position_ids is not None:
        arguments["position_ids"] = packed.position_ids
    attention = packed.attention
    _check_attention(attention, trunk)
    if isinstance(attention, TreeLayout):
        # A mask of four dimensions is taken as it is: this one keeps the model from making a row x row mask.
        arguments["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.input_ids.device)
        arguments["tree_layout"] = attention
    elif attention is not None:
        arguments["attention_mask"] = attention
    if not accepts(trunk, "attention_mask") and not accepts(trunk, "kwargs"):
        arguments.pop("attention_mask", None)
    return trunk(**arguments)[0]  # type: ignore[no-any-return]


def scatter(values: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """[M] values into their cells of a zero grid."""
    flat = torch.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    return flat.index_copy(0, cells, values).view(shape)


def _select(hidden: Tensor, positions: Tensor) -> tuple[Tensor, bool]:
    """The states at `positions`, [M, H]. Without positions: the first state and false, so that every parameter still
    takes part in the backward, as sharded and distributed models need."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    live = positions.shape[0] > 0
    return (flat.index_select(0, positions) if live else flat[:1]), live


def _check(wanted: tuple[str, ...], other: nn.Module | None) -> None:
    for name in wanted:
        if name not in FUNCTIONALS:
            raise ConfigError(f"the engine cannot compute `{name}`", mend=suggestion(name, FUNCTIONALS))
        if name in NEEDS_OTHER and other is None:
            raise ConfigError(
                f"`{name}` needs a second model in the same pass",
                why="it is a sum over the whole vocabulary, which a cached reference does not hold",
                mend="use a live reference (frozen, adapter_off or ema)",
            )


def _check_attention(attention: Any, trunk: Any) -> None:
    """Refuse a model whose attention would ignore the layout, which gives wrong numbers without an error."""
    masks = attention.values() if isinstance(attention, dict) else (attention,)
    blocks = any(isinstance(mask, BlockMask) for mask in masks)
    if not blocks and not isinstance(attention, TreeLayout):
        return
    needed, found = "flex_attention" if blocks else TREE, attention_of(trunk)
    if found != needed:
        raise ModelError(
            f"the model's attention is `{found}`, the batch was packed for `{needed}`",
            why="it was changed after the model was prepared, or two models share one configuration object",
            mend="prepare every model that scores a batch with the back end that packed it",
        )
    if not blocks or not torch.is_grad_enabled() or next(trunk.parameters()).device.type != "cpu":
        return
    if any(parameter.requires_grad for parameter in trunk.parameters()):
        raise ModelError(
            "the `flex` back end has no gradients on CPU",
            why="PyTorch implements flex attention's backward on GPUs only",
            mend="use `tree` (the default on CPU), `sdpa` or `padded`",
        )
