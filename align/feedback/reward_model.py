"""A reward model: a number for a prompt with its answer, from a model trained on whole conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from align.core.errors import ConfigError, DataError
from align.core.progress import Progress, silent
from align.data.chat import WithChat
from align.data.groups import Message
from align.data.rows import RowError
from align.feedback.base import Failed, Item, Judged
from align.feedback.sequences import Classifier, Valued, column_of, load_sequencer


class Rendering(WithChat):
    """Prompt and answer as a reward model reads them.

    Messages go through its own chat template, whole, as TRL's RewardTrainer and the cards of public reward models do;
    texts are joined and ended by EOS. A model of the BERT kind (its tokenizer has a CLS token) gets prompt and answer
    as a pair of texts. Nothing is ever cut.
    """

    def __call__(self, prompt: str | Sequence[Message], answer: str) -> list[int]:
        """The ids.

        Raises:
            RowError: the template refuses the messages.
        """
        tokenizer = self.encoder.tokenizer
        if not isinstance(prompt, str):
            return self.encoder.ids(self.chat.render([*prompt, {"role": "assistant", "content": answer}]))
        if tokenizer.cls_token is not None:
            return [int(token) for token in tokenizer(prompt, answer, verbose=False)["input_ids"]]
        before = self.encoder.ids(prompt)
        ids = self.encoder.with_start([*before, *self.encoder.continuation(prompt, before, answer)])
        end = self.encoder.eos
        return ids if end is None or ids[-1] == end else [*ids, end]


@dataclass(frozen=True, eq=False)
class RewardModel:
    """Rewards by a sequence classification model, or by a value model trained here.

    Args:
        read: the model. label: see `sequences.column_of`.
        max_length: most tokens; the model's positions by default. An answer cut to fit would be another answer.
        too_long: what longer ones are: `missing`, or an error (`refuse`).
    """

    read: Classifier | Valued
    tokenizer: Any
    label: str | int | None = None
    max_length: int | None = None
    too_long: Literal["missing", "refuse"] = "missing"
    chat_template: str | None = None
    draws: bool = field(default=False, init=False)
    log: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        column_of(self.read, self.label)
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"`max_length` is {self.max_length}", mend="use 1 or more tokens")

    @classmethod
    def open(
        cls,
        name: str,
        dtype: str = "auto",
        device: str | None = None,
        budget: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> RewardModel:
        """From a folder or hub id, with its own tokenizer. Raises as `load_sequencer`."""
        read, tokenizer = load_sequencer(name, dtype, device, budget, trust_remote_code)
        return cls(read, tokenizer, **options)

    @property
    def key(self) -> Mapping[str, Any]:
        template = self.chat_template or str(getattr(self.tokenizer, "chat_template", None))
        own = {"label": self.label, "max_length": self.max_length, "template": template}
        return {"kind": "reward_model", **self.read.key, **own}

    def content(self, item: Item) -> Any:
        return item.content()

    def score(self, items: Sequence[Item], seed: int, progress: Progress = silent) -> list[Judged]:
        """See `Scorer.score`.

        Raises:
            DataError: an answer is too long and `too_long` is `refuse`.
            ModelError: messages, and no fit chat template.
        """
        rendering = Rendering(self.tokenizer, self.chat_template)

        def rendered(item: Item) -> list[int]:
            return rendering(item.group.prompt, item.answer.text)

        limit = self.max_length or self.read.positions
        return read_rows(self.read, items, rendered, column_of(self.read, self.label), limit, self.too_long, progress)


def read_rows(
    read: Classifier | Valued,
    items: Sequence[Any],
    rendered: Callable[[Any], list[int]],
    column: Callable[[np.ndarray], np.ndarray],
    limit: int | None,
    too_long: Literal["missing", "refuse"],
    progress: Progress,
) -> list[Judged]:
    """The model's number of each item, or why there is none."""
    out: list[Judged] = [Failed("no number given")] * len(items)
    rows: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        try:
            ids = rendered(item)
        except RowError as error:
            out[place] = Failed(error.reason)
            continue
        if limit is not None and len(ids) > limit:
            if too_long == "refuse":
                raise DataError(
                    f"prompt and answer make {len(ids)} tokens, and the model reads {limit}",
                    where=str(item.group.row),
                    mend="sample shorter answers, or let those be missing: too_long: missing",
                )
            out[place] = Failed(f"more than {limit} tokens")
        elif len(ids) < 2:
            out[place] = Failed("nothing to read")
        else:
            rows[place] = ids
    progress(len(items) - len(rows))
    numbers = column(read(list(rows.values()), progress)) if rows else np.zeros(0)
    for place, value in zip(rows, numbers, strict=True):
        out[place] = float(value) if np.isfinite(value) else Failed("the model gives a number that is not finite")
    return out
