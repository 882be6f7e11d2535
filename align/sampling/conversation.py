"""Talking to one model: its history, its template, its answers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from align.core.errors import DataError, ModelError
from align.core.seeds import derive
from align.data.groups import Message
from align.data.rows import RowError
from align.sampling.base import SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.loading import Loaded
from align.sampling.prompts import PromptEncoder


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        finished: false where `max_new_tokens` cut it.
        forgotten: turns at the beginning of the history that no longer fitted the model's positions.
    """

    text: str
    finished: bool
    tokens: int
    forgotten: int = 0


class Conversation:
    """One model's side of a chat. Without a chat template each text is continued by itself, and there is no history.

    Args:
        adapter: false talks to the model beneath the adapter of `loaded`.

    Raises:
        ModelError: the chat template does not keep prefixes. DataError: it takes no system message.
    """

    def __init__(self, loaded: Loaded, system: str | None = None, adapter: bool = True) -> None:
        self.name = loaded.name
        self._model: Any = loaded.model
        self._adapter = adapter
        self._encode = PromptEncoder(loaded.tokenizer)
        self.templated = bool(getattr(loaded.tokenizer, "chat_template", None))
        ends = self._encode.end_of_turn if self.templated else frozenset()
        self._sampler = HFSampler(loaded.model, loaded.tokenizer, 1, end_ids=ends)
        self._system = system
        self._turns = 0
        self.history: list[Message] = []
        """The turns so far; replaced by every turn, never changed in place."""
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with another system message where one is given (an empty one is none).

        Raises:
            DataError: the template takes no system message; nothing is changed.
        """
        system = self._system if system is None else system
        history: list[Message] = [{"role": "system", "content": system}] if system else []
        if self.templated:
            self._ids([*history, {"role": "user", "content": "a"}])
        self._system, self.history = system, history

    def ask(self, text: str, params: SamplingParams) -> Answer:
        """The answer to a text. The draw depends on the seed and the number of the turn; a failed turn leaves no trace.

        Raises:
            DataError: the template refuses the messages, or the text alone is too long.
            ModelError: the chat template does not keep prefixes.
        """
        history = [*self.history, {"role": "user", "content": text}]
        ids, kept = self._fitted(history, text, params.max_new_tokens)
        drawn = replace(params, seed=derive(params.seed, "turn", self._turns))
        with self._weights():
            rollout = self._sampler.sample([ids], 1, drawn)[0][0]
        self._turns += 1
        forgotten = len(history) - len(kept)
        if self.templated:
            self.history = [*kept, {"role": "assistant", "content": rollout.text}]
        return Answer(rollout.text, rollout.finished, len(rollout), forgotten)

    def check(self, params: SamplingParams) -> None:
        """Refuse before the first turn what no turn could do.

        Raises:
            ModelError: no room for an answer.
        """
        positions = self._sampler.positions
        if positions is not None and params.max_new_tokens >= positions:
            raise ModelError(
                f"`max_new_tokens` is {params.max_new_tokens}, and the model has {positions} positions",
                where=self.name,
                mend="lower --max-new-tokens",
            )

    def _weights(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._adapter else self._model.disable_adapter()

    def _fitted(self, history: list[Message], text: str, room: int) -> tuple[list[int], list[Message]]:
        """Ids of the history without its oldest turns, as far as the model's positions demand."""
        limit = None if self._sampler.positions is None else self._sampler.positions - room
        kept = history
        while True:
            ids = self._ids(kept if self.templated else text)
            if limit is None or len(ids) <= limit:
                return ids, kept
            opening = [message for message in kept if message["role"] == "system"]
            turns = kept[len(opening) :]
            if len(turns) < 3 or not self.templated:
                raise DataError(
                    f"the text is {len(ids)} tokens, and the model has {limit} for it beside its answer's {room}",
                    mend="say less, or lower the answer's tokens: --max-new-tokens",
                )
            kept = [*opening, *turns[2:]]

    def _ids(self, prompt: str | list[Message]) -> list[int]:
        try:
            return self._encode(prompt)
        except RowError as error:
            raise DataError(error.reason, mend="change the system message or the text") from error
