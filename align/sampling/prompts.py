"""Prompts -> the token ids a model is asked with: the same as those that training scores completions after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.core.errors import DataError, ModelError
from align.data.chat import WithChat
from align.data.groups import Message
from align.data.rows import RowError

Prompt = str | Sequence[Message]


class PromptEncoder(WithChat):
    """Turns prompts into ids, as `data.Tokeniser` does.

    Plain text gets the tokenizer's BOS once. Messages are rendered by the chat template with what asks the assistant to
    speak; special tokens are the template's business.

    Args:
        chat_template: None or "model" for the tokenizer's own, else the text of a template or the path of a file.
    """

    def __call__(self, prompt: Prompt, tools: Any = None) -> list[int]:
        """The ids of a prompt.

        Raises:
            RowError: the template refuses the messages; or an empty text, and no BOS to start from.
            ModelError: messages, and no chat template that keeps prefixes.
        """
        if isinstance(prompt, str):
            ids = self.encoder.with_start(self.encoder.ids(prompt))
        else:
            ids = self.encoder.ids(self.chat.render(prompt, tools, ask=True))
        if not ids:
            raise RowError("prompt", "empty, and the tokenizer has no BOS to start from")
        return ids

    @property
    def end_of_turn(self) -> frozenset[int]:
        """The token that ends an assistant's turn in the chat template, where it is a special one (`<|im_end|>`)."""
        user = ({"role": "user", "content": "a"},)
        try:
            asked = self.chat.render(user, ask=True)
            whole = self.chat.render((*user, {"role": "assistant", "content": "a"}))
        except RowError:
            return frozenset()
        for token in reversed(self.encoder.ids(whole.removeprefix(asked))):
            if token in self.encoder.special or token == self.encoder.eos:
                return frozenset({token})
            if self.encoder.decode([token]).strip():
                break
        return frozenset()


def stop_at_end_of_turn(model: Any, tokenizer: Any, chat_template: str | None = None) -> str:
    """Make the end of an assistant's turn end `generate` too, where the model's configuration does not know it.

    A ChatML template ends turns by `<|im_end|>`, which need not be the tokenizer's EOS; a model saved without it goes
    on for ever outside this package.

    Returns:
        The token that was added, or nothing.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not (chat_template or getattr(tokenizer, "chat_template", None)):
        return ""
    try:
        ends = PromptEncoder(tokenizer, chat_template).end_of_turn
    except ModelError:  # no template that training could use; plain text may still be trained on
        return ""
    known = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    there = [] if known is None else [known] if isinstance(known, int) else list(known)
    missing = sorted(ends - set(there))
    if not missing:
        return ""
    config.eos_token_id = [*there, *missing]
    return str(tokenizer.convert_ids_to_tokens(missing[0]))


def prompt_ids(tokenizer: Any, prompt: Prompt, chat_template: str | None = None) -> list[int]:
    """The ids of one prompt; make a `PromptEncoder` for many.

    Raises:
        DataError: the prompt cannot be encoded. ModelError: messages, and no fit chat template.
    """
    try:
        return PromptEncoder(tokenizer, chat_template)(prompt)
    except RowError as error:
        raise DataError(str(error), where="the prompt") from error
