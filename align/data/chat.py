"""Conversations -> token ids, through a chat template that renders a prompt the same whatever follows it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from align.compat.trl import training_chat_template
from align.core.errors import ModelError
from align.data.encode import Encoder, scored_tokens
from align.data.groups import Message, Segment, TokenCompletion
from align.data.rows import RowError

_PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


class Chat:
    """A tokenizer's chat template, checked once.

    Special tokens are the template's business: nothing is added to what it renders, as at inference, and a BOS that
    the tokenizer would add to plain text does not double the template's own.

    Args:
        template: None or "model" for the tokenizer's own (in TRL's training version where there is one), else the
            text of a template or the path of a file that holds one.
    """

    def __init__(self, encoder: Encoder, template: str | None = None) -> None:
        self.encoder = encoder
        self.template = _find_template(encoder.tokenizer, template)
        self._probe()

    def render(self, messages: Sequence[Message], tools: Any = None, ask: bool = False) -> str:
        """The text of messages; `ask` adds what asks the assistant to speak."""
        try:
            return str(
                self.encoder.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self.template,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=ask,
                )
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RowError("messages", f"the chat template refuses: {str(error).splitlines()[0][:80]}") from error

    def completion(
        self,
        prompt: Sequence[Message],
        prompt_text: str,
        prompt_ids: list[int],
        segments: Sequence[Segment],
        tools: Any = None,
    ) -> TokenCompletion:
        """The turns of an answer; scored are those of scored segments, each up to and with its end token."""
        messages = [*prompt, *(segment.message or {} for segment in segments)]
        text = self.render(messages, tools)
        if not text.startswith(prompt_text):
            raise RowError("messages", "the chat template renders the prompt otherwise when an answer follows")
        turns = self._turns(prompt, prompt_text, segments, tools, text)
        tail = text[len(prompt_text) :]
        if len(segments) == 1:
            ids = self.encoder.continuation(prompt_text, prompt_ids, tail)
            mask = np.ones(len(ids), dtype=bool)
            step = np.zeros(len(ids), dtype=np.int64)
            return self._ended(ids, mask, step)
        ids, spans = self.encoder.ids_and_spans(text)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise RowError("messages", "tokens merge across the end of the prompt")
        ids, spans = ids[len(prompt_ids) :], spans[len(prompt_ids) :]
        mask = np.zeros(len(ids), dtype=bool)
        step = np.zeros(len(ids), dtype=np.int64)
        for segment, (low, high) in zip(segments, turns, strict=True):
            inside = scored_tokens(spans, [(low, high)])
            step[inside] = segment.step
            if segment.scored:
                mask |= self._up_to_end(ids, inside)
        return self._ended(ids, mask, step)

    def _turns(
        self, prompt: Sequence[Message], prompt_text: str, segments: Sequence[Segment], tools: Any, text: str
    ) -> list[tuple[int, int]]:
        """The characters of each turn of the answer; an assistant's turn starts behind what asks for it."""
        if len(segments) == 1:
            return [(len(prompt_text), len(text))]
        ranges, messages, end = [], list(prompt), len(prompt_text)
        for place, segment in enumerate(segments):
            messages.append(segment.message or {})
            asks = place + 1 < len(segments) and segments[place + 1].role == "assistant"
            rendered = self.render(messages, tools, ask=asks)
            if not text.startswith(rendered):
                raise RowError("messages", "the chat template renders a turn otherwise when others follow")
            ranges.append((end, len(rendered)))
            end = len(rendered)
        return ranges

    def _up_to_end(self, ids: list[int], inside: np.ndarray) -> np.ndarray:
        """The tokens of a turn without what the template puts behind its end token (mostly a newline)."""
        places = np.flatnonzero(inside)
        end = self._end_of(ids, places)
        if end is None:
            return inside
        kept = inside.copy()
        kept[end + 1 :] = False
        return kept

    def _end_of(self, ids: list[int], places: np.ndarray) -> int | None:
        """The place of the token that ends a turn: the last one, white space aside, if it is a special token."""
        for place in places[::-1]:
            if ids[place] in self.encoder.special or ids[place] == self.encoder.eos:
                return int(place)
            if self.encoder.decode([ids[place]]).strip():
                return None
        return None

    def _ended(self, ids: list[int], mask: np.ndarray, step: np.ndarray) -> TokenCompletion:
        """Cut behind the last end token; where the template renders none, append EOS."""
        end = self._end_of(ids, np.arange(len(ids)))
        if end is not None:
            ids, mask, step = ids[: end + 1], mask[: end + 1], step[: end + 1]
        else:
            last = step[-1:] if len(step) else np.zeros(1, dtype=np.int64)
            ids = [*ids, self.encoder.need_eos()]
            mask, step = np.append(mask, True), np.append(step, last)
        return TokenCompletion(ids=np.asarray(ids, dtype=np.int64), mask=mask, step=step)

    def _probe(self) -> None:
        """A prompt must be rendered as the beginning of every conversation that goes on from it."""
        try:
            whole = self.render(_PROBE)
            parts = [self.render(_PROBE[:1], ask=True), self.render(_PROBE[:2]), self.render(_PROBE[:3], ask=True)]
        except RowError as error:
            raise ModelError(
                "the chat template cannot render a conversation of two turns", why=error.reason, mend=_MEND
            ) from error
        if not all(whole.startswith(part) for part in parts):
            raise ModelError(
                "the chat template renders earlier turns otherwise when others follow",
                why="a prompt would not be what the model sees at inference",
                mend=_MEND,
            )


_MEND = "set `data.chat_template` to a template that keeps prefixes (text, or the path of a .jinja file)"


class WithChat:
    """An encoder, and a chat template on demand.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: see `Chat`.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.encoder = Encoder(tokenizer)
        self._template = chat_template

    @cached_property
    def chat(self) -> Chat:
        """Made (and checked) at the first conversation: plain text needs no template.

        Raises:
            ModelError: there is no fit template.
        """
        return Chat(self.encoder, self._template)


def _find_template(tokenizer: Any, given: str | None) -> str:
    if given not in (None, "model"):
        text = str(given)
        if "{" in text:
            return text
        path = Path(text).expanduser()
        if path.is_file():
            return path.read_text(encoding="utf-8")
        raise ModelError(f"there is no chat template file `{text}`", mend="give a file, or the text of a template")
    own = getattr(tokenizer, "chat_template", None)
    if not own:
        raise ModelError(
            "the data are conversations, and the tokenizer has no chat template",
            where=str(getattr(tokenizer, "name_or_path", "")),
            mend="set `data.chat_template`, use a tokenizer that has one, or give plain text",
        )
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    return training_chat_template(tokenizer) or str(own)
