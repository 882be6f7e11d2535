"""What we use of TRL (1.16): public names of its chat template collection."""

from __future__ import annotations

from typing import Any


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
