"""A judge's questions answered by a sampler of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import nn

from align.core.errors import AlignError, ConfigError
from align.core.hashing import digest
from align.data.rows import RowError
from align.feedback.base import Failed
from align.feedback.calling import each
from align.feedback.judge import Heard
from align.feedback.judge_file import Asked
from align.reference.weights_hash import module_hash
from align.sampling.base import Sampler, SamplingParams
from align.sampling.prompts import PromptEncoder
from align.scoring.backends import Backend, prepare
from align.scoring.branches import branch_logps
from align.scoring.layout import Tree


@runtime_checkable
class ReadsNext(Protocol):
    """A sampler that tells the log-probs of given tokens as the next one."""

    def next_logps(self, prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> Sequence[Sequence[float]]:
        """[N][L] at temperature 1, normalised over the whole vocabulary."""
        ...


@dataclass(eq=False)
class SamplerJudge:
    """A judge over any sampler.

    Questions are messages where the tokenizer has a chat template, and plain text otherwise. A question that is longer
    than the sampler reads is missing: cut, it would be another question.

    Args:
        weights: names what the sampler samples from. By default the hash of its model as it is when a key is asked for,
            so that a policy that is being trained is another judge after each step.
        chat_template: see `PromptEncoder`.
    """

    sampler: Sampler
    tokenizer: Any
    weights: str = ""
    chat_template: str | None = None
    _encode: PromptEncoder = field(init=False)
    _prepared: tuple[nn.Module, Backend] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._encode = PromptEncoder(self.tokenizer, self.chat_template)
        self._chats = bool(self.chat_template or getattr(self.tokenizer, "chat_template", None))
        if not self.weights and self._model is None:
            raise ConfigError(
                "nothing says what this judge's sampler samples from", mend="give `weights`, a name or a hash"
            )

    @property
    def key(self) -> Mapping[str, Any]:
        template = self.chat_template or str(getattr(self.tokenizer, "chat_template", None))
        weights = self.weights or ("" if self._model is None else module_hash(self._model))
        return {"weights": weights, "template": digest(template)}

    @property
    def _model(self) -> nn.Module | None:
        """The sampler's model, where it is a module in this process."""
        found = getattr(self.sampler, "model", None)
        return found if isinstance(found, nn.Module) else None

    def replies(
        self, asked: Mapping[int, Asked], n: int, params: SamplingParams, heard: Heard, seeds: Mapping[int, int]
    ) -> dict[int, Failed]:
        """See `JudgeModel.replies`."""
        prefixes, failed = self._prefixes(asked, params.max_new_tokens)
        if not prefixes:
            return failed
        size = max(prefixes) + 1
        filler = next(iter(prefixes.values()))
        every = [prefixes.get(place, filler) for place in range(size)]
        own = [replace(params, seed=seeds.get(place, params.seed)) for place in range(size)]

        def sample(places: Sequence[int]) -> list[list[str]]:
            # A draw depends on the number of its prefix: the others keep their numbers, with no reply.
            counts = [0] * size
            for place in places:
                counts[place] = n
            found = self.sampler.sample(every, counts, own)
            return [[rollout.text for rollout in found[place]] for place in places]

        replies = each(sample, list(prefixes), len(prefixes), "the judge's sampler", (AlignError,))
        for place, reply in zip(prefixes, replies, strict=True):
            if isinstance(reply, Failed):
                failed[place] = reply
            else:
                heard(place, reply)
        return failed

    def label_logps(self, asked: Mapping[int, Asked], labels: Sequence[str], heard: Heard) -> dict[int, Failed]:
        """See `JudgeModel.label_logps`.

        Raises:
            ConfigError: a label is not one token of the tokenizer, or the sampler does not tell log-probs.
        """
        tokens = label_tokens(self.tokenizer, labels)
        prefixes, failed = self._prefixes(asked, 1)
        places = list(prefixes)
        model = self._model
        if isinstance(self.sampler, ReadsNext):
            rows = self.sampler.next_logps([prefixes[place] for place in places], tokens)
        elif model is not None:
            with _evaluating(model):
                if self._prepared is None or self._prepared[0] is not model:
                    self._prepared = (model, prepare(model))
                trees = [Tree.of(prefixes[place], [[token] for token in tokens]) for place in places]
                rows = [[float(one[0]) for one in tree] for tree in branch_logps(*self._prepared, trees)]
        else:
            raise ConfigError(
                f"a {type(self.sampler).__name__} does not tell the log-probs of labels",
                mend="use the sampler `hf`, an endpoint, or a judge that is read from its text (read: regex)",
            )
        for place, row in zip(places, rows, strict=True):
            heard(place, [float(value) for value in row])
        return failed

    def _prefixes(self, asked: Mapping[int, Asked], room: int) -> tuple[dict[int, list[int]], dict[int, Failed]]:
        limit = getattr(self.sampler, "positions", None)
        prefixes: dict[int, list[int]] = {}
        failed: dict[int, Failed] = {}
        for place, one in asked.items():
            try:
                ids = self._encode(one.messages if self._chats else one.text)
            except RowError as error:
                failed[place] = Failed(error.reason)
                continue
            if limit is not None and len(ids) + room > limit:
                failed[place] = Failed(f"the question and room for a reply are more than {limit} tokens")
            else:
                prefixes[place] = ids
        return prefixes, failed


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back after: the model may be a policy in training."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def label_tokens(tokenizer: Any, labels: Sequence[str]) -> list[int]:
    """The token of each label.

    Raises:
        ConfigError: a label is more than one token, or two labels begin with the same one: the probability of a first
            piece is not that of the label.
    """
    tokens = []
    for label in labels:
        ids = list(tokenizer(label, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) != 1:
            pieces = [tokenizer.convert_ids_to_tokens(token) for token in ids]
            raise ConfigError(
                f"the label `{label}` is {len(ids)} tokens of this tokenizer",
                why=f"its pieces are {pieces}; their probabilities say nothing of the label",
                mend="use labels that are one token (A and B, say), or a judge with `read: regex`",
            )
        tokens.append(int(ids[0]))
    if len(set(tokens)) < len(tokens):
        raise ConfigError(f"two of the labels {list(labels)} are the same token", mend="use labels that differ")
    return tokens


__all__ = ["ReadsNext", "SamplerJudge", "label_tokens"]
