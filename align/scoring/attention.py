"""The `tree` attention function: exact attention over prompt trees without a mask of the whole row.

Per tree it runs one causal attention for the prompt and, per branch, one of the branch's queries over the prompt's
and its own keys. Nothing of size (row x row) is made, and a prompt's keys are computed once for all its branches.
The layout of the row arrives as the keyword `tree_layout`, which transformers hands through to the attention call.
Without it the function is `sdpa`, so `generate` and plain forwards of a prepared model work as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from align.compat.transformers import register_attention, sdpa_attention_forward
from align.core.errors import ModelError
from align.scoring.layout import TreeLayout

TREE = "align_tree"


@dataclass(frozen=True)
class Terms:
    """What a layer adds to plain attention."""

    scale: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree_layout: TreeLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, L, D], key and value [1, H_kv, L, D] -> [1, L, H, D_v]."""
    if tree_layout is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = "a position bias" if kwargs.get("position_bias") is not None else ""
    if kwargs.get("is_causal", True) is False or not getattr(module, "is_causal", True):
        unknown = "attention that is not causal"
    if unknown:
        raise ModelError(f"the tree back end does not know {unknown}", where=type(module).__name__)
    terms = Terms(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    if tree_layout.record is not None:
        tree_layout.record.append(terms.window)
    # One split of the row: its backward is one concatenation, where that of a slice is a row of zeros each.
    sizes = [size for span in tree_layout.spans for size in (span.prompt, *span.branches)]
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    pieces: list[Tensor] = []
    for span in tree_layout.spans:
        own = slice(len(pieces), len(pieces) + 1 + len(span.branches))
        pieces += _tree(queries[own], keys[own], values[own], tree_layout, terms)
    return torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1), None


Pieces = tuple[Tensor, ...]


def _tree(queries: Pieces, keys: Pieces, values: Pieces, layout: TreeLayout, terms: Terms) -> list[Tensor]:
    """Attention of one tree, given as its prompt and its branches: tensors [1, H, n, D_v] in that order."""
    prompt = queries[0].shape[2]
    mask = prompt_mask(layout, prompt, terms.window, queries[0])
    out = [_attend(queries[0], keys[0], values[0], mask, True, terms)]
    prompt_key, prompt_value, seen = keys[0], values[0], prompt
    if terms.window is not None and terms.window <= prompt:
        # A branch's first token sees the last w - 1 prompt tokens, and no later token sees more.
        seen = terms.window - 1
        prompt_key, prompt_value = prompt_key[:, :, prompt - seen :], prompt_value[:, :, prompt - seen :]
    for own_query, own_key, own_value in zip(queries[1:], keys[1:], values[1:], strict=True):
        all_keys, all_values = torch.cat([prompt_key, own_key], dim=2), torch.cat([prompt_value, own_value], dim=2)
        mask = branch_mask(layout, seen, own_query.shape[2], terms.window, own_query)
        out.append(_attend(own_query, all_keys, all_values, mask, False, terms))
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, terms: Terms) -> Tensor:
    """`mask` is additive [queries, keys]; without one, `causal` says whether all keys are seen or only earlier ones."""
    if terms.softcap is not None or terms.sinks is not None:
        return _attend_by_hand(query, key, value, mask, causal, terms)
    shared = query.shape[1] != key.shape[1]
    if shared and query.is_cuda and mask is not None:  # the fused CUDA kernels with a mask do not group heads
        key, value, shared = *_repeat(query, key, value), False
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=terms.dropout,
        is_causal=causal and mask is None and query.shape[2] > 1,
        scale=terms.scale,
        enable_gqa=shared,
    )


def _attend_by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, terms: Terms
) -> Tensor:
    """Attention with a soft cap on the scores or a learned sink per head, as transformers' eager code has them."""
    key, value = _repeat(query, key, value)
    scores = query @ key.transpose(2, 3) * terms.scale
    if terms.softcap is not None:
        scores = torch.tanh(scores / terms.softcap) * terms.softcap
    if mask is None and causal:
        mask = _band(query.shape[2], key.shape[2], 0, None, query)
    if mask is not None:
        scores = scores + mask
    if terms.sinks is not None:
        sink = terms.sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = weights[..., : key.shape[2]]
    if terms.dropout:
        weights = nn.functional.dropout(weights, p=terms.dropout)
    return weights @ value


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)


def prompt_mask(layout: TreeLayout, prompt: int, window: int | None, like: Tensor) -> Tensor | None:
    """Additive [prompt, prompt] mask of a windowed prompt; None where plain causal attention is the same."""
    if window is None or prompt <= window:
        return None
    name = _key("prompt", window, like)
    if name not in layout.masks:
        layout.masks[name] = _band(layout.longest_prompt, layout.longest_prompt, 0, window, like)
    return layout.masks[name][:prompt, :prompt]


def branch_mask(layout: TreeLayout, prompt: int, length: int, window: int | None, like: Tensor) -> Tensor | None:
    """Additive [length, prompt + length] mask: token i of the branch sees the prompt and the branch up to i.

    One mask serves all branches of the batch: aligned at the boundary between prompt and branch, each is a slice.
    """
    if length == 1:
        return None
    boundary = layout.longest_prompt if window is None else min(layout.longest_prompt, window - 1)
    name = _key("branch", window, like)
    if name not in layout.masks:
        longest = layout.longest_branch
        layout.masks[name] = _band(longest, boundary + longest, boundary, window, like)
    return layout.masks[name][:length, boundary - prompt : boundary + length]


def _key(part: str, window: int | None, like: Tensor) -> tuple[object, ...]:
    # A tensor made in inference mode cannot be saved for a backward of the same batch.
    return part, window, like.dtype, like.device, torch.is_inference_mode_enabled()


def _band(queries: int, keys: int, offset: int, window: int | None, like: Tensor) -> Tensor:
    """0 where key j is at most `offset` + i and within the window, the most negative number elsewhere."""
    distance = offset + torch.arange(queries, device=like.device)[:, None] - torch.arange(keys, device=like.device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    mask = torch.zeros(queries, keys, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, torch.finfo(like.dtype).min)


register_attention(TREE, tree_attention)
