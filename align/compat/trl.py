"""What we use of TRL (1.16): its chat template collection and its log-probability kernel."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading data needs no torch, and a test holds it to that
    from torch import Tensor

_VOCABULARY_CHUNK = 32768
"""TRL's own width of a logits tile."""


@cache
def has_logp_kernel() -> bool:
    """Whether Triton is there; without it `chunked_logp` folds its tiles in torch, which is slow."""
    from transformers.utils import is_triton_available

    return bool(is_triton_available())


def chunked_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cap: float | None,
    scale: float,
    temperature: float = 1.0,
) -> Tensor:
    """log p(target) of z / temperature, z = cap * tanh(scale * z / cap), float32 [M], without logits in memory.

    `trl.kernels.chunked_logprob.ChunkedLogProbFunction` (1.16) takes positional arguments and returns five columns.

    Args:
        hidden: [M, H]. weight: [V, H]. targets: long [M]. Computed in autocast's dtype, where it is on.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, _VOCABULARY_CHUNK, cap, scale, ()
    )
    logp: Tensor = outputs[0]
    return logp


def training_chat_template(tokenizer: Any) -> str | None:
    """A template that renders earlier turns the same whatever follows, or None where TRL has none for this tokenizer.

    `trl.chat_template_utils.get_training_chat_template` (1.16) knows its templates by their exact text: it returns
    None for one that needs no change and raises ValueError for one it does not know.
    """
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TypeError):
        return None
