"""Sampling with Hugging Face `generate`: the default, with no further dependency."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from align.core import seeds
from align.core.errors import ConfigError, ModelError
from align.core.progress import Progress, silent
from align.sampling.base import Request, Rollout, SamplingParams
from align.sampling.completions import Decoder, as_ids, refuse_not_finite
from align.sampling.draw import Drawing
from align.scoring.backends import plain_attention
from align.scoring.facts import language_model

_log = logging.getLogger(__name__)
_SMALL = 8
"""Rows of a batch that is not worth making smaller."""
_STEP_COST = 4
"""How many tokens of a prefix cost as much as one token of a step."""


@dataclass(eq=False)
class _Row:
    """One completion under way: its prefix, the numbers that draw it, and what was drawn so far."""

    prefix: Sequence[int]
    place: tuple[int, int]
    uniforms: np.ndarray
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prefix) + len(self.ids)

    @property
    def left(self) -> int:
        return len(self.uniforms) - len(self.ids)


class HFSampler:
    """Draws completions with `generate`.

    A draw is a function of (seed, number of the prefix, number of the completion) and of the model's numbers; those
    depend on the batch by rounding alone, so the same call gives the same rollouts. The global random state is neither
    read nor changed. What a model's own `generation_config` would add (penalties, top_k, suppressed tokens) is left
    out; its end tokens count.

    Args:
        model: a causal LM or a `PeftModel` of one, prepared for scoring or not. It is used in place: weights trained
            after are those sampled from.
        tokenizer: decodes, and names the end token.
        batch_size: most completions at once.
        tokens_per_batch: most tokens (prefixes and `max_new_tokens`) held at once, for the memory of the cache.
        end_ids: end tokens besides those of the tokenizer and the model (a chat template's end of turn).
    """

    capabilities: frozenset[str] = frozenset({"seeds"})

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        batch_size: int = 64,
        tokens_per_batch: int | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"`batch_size` is {batch_size}", mend="use 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self._extra_ends = frozenset(end_ids)
        language_model(model)  # refuses what cannot be sampled from

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        config = getattr(language_model(self.model), "generation_config", None)
        return self._extra_ends | as_ids(self.tokenizer.eos_token_id) | as_ids(getattr(config, "eos_token_id", None))

    @property
    def positions(self) -> int | None:
        """Most tokens of a prefix and its completion, where the model states it."""
        config = language_model(self.model).config
        found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(found) if found else None

    def sync(self, policy: nn.Module | Mapping[str, Tensor]) -> None:
        """Sample from this model (in place, not a copy), or from these weights copied into the present model."""
        if isinstance(policy, Mapping):
            self.model.load_state_dict(policy)
            return
        language_model(policy)
        self.model = policy

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`. Prefixes of one temperature, top_k and top_p share batches.

        Raises:
            ConfigError: an empty or too long prefix, or an id outside the vocabulary.
            ModelError: the model gives numbers that are not finite.
        """
        vocabulary = int(language_model(self.model).get_input_embeddings().num_embeddings)
        request = Request.of(prefixes, n, params, vocabulary=vocabulary, positions=self.positions)
        out: list[list[Rollout | None]] = [[None] * count for count in request.counts]
        ends = self.end_ids
        decoder = Decoder(self.tokenizer, prefixes, ends)
        with for_sampling(self.model):
            for rows, shared in _alike(request):
                for done in self._finished(rows, shared, ends):
                    drawn = decoder.rollouts([(row.place[0], row.ids, row.logp) for row in done])
                    for row, rollout in zip(done, drawn, strict=True):
                        number, sample = row.place
                        out[number][sample] = rollout
                    progress(len(done))
        return out  # type: ignore[return-value]

    def _finished(self, rows: list[_Row], params: SamplingParams, ends: frozenset[int]) -> Iterator[list[_Row]]:
        """Run batches; yield rows as they end. What a batch leaves unfinished goes on in a batch of its like."""
        fresh = sorted(rows, key=lambda row: (-row.length, row.place))
        waiting: list[_Row] = []
        while fresh or waiting:
            queue = waiting if len(waiting) >= self.batch_size or not fresh else fresh
            batch = self._take(queue)
            self._run(batch, params, ends)
            done = [row for row in batch if not row.left or row.ids[-1] in ends]
            if len(done) < len(batch):
                finished = set(map(id, done))
                waiting.extend(row for row in batch if id(row) not in finished)
                waiting.sort(key=lambda row: (-row.length, row.place))
            if done:
                yield done

    def _take(self, queue: list[_Row]) -> list[_Row]:
        """The next batch, longest rows first, out of the queue."""
        size = min(self.batch_size, len(queue))
        if self.tokens_per_batch is not None:
            room = queue[0].length + max(row.left for row in queue[:size])
            size = max(1, min(size, self.tokens_per_batch // room))
        batch = queue[:size]
        del queue[:size]
        return batch

    def _run(self, batch: list[_Row], params: SamplingParams, ends: frozenset[int]) -> None:
        """Draw on for every row; halve the batch where memory runs out."""
        try:
            self._generate(batch, params, ends)
            return
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise ModelError(
                    "one completion does not fit in memory",
                    why=str(error).split("\n", 1)[0],
                    mend="lower `max_new_tokens`, or use a smaller model or dtype",
                ) from error
        torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        self.batch_size = min(self.batch_size, half)
        _log.warning("out of memory: sampling with batches of %d", self.batch_size)
        self._run(batch[:half], params, ends)
        self._run(batch[half:], params, ends)

    def _generate(self, batch: list[_Row], params: SamplingParams, ends: frozenset[int]) -> None:
        inner = language_model(self.model)
        device = inner.get_input_embeddings().weight.device
        pad = self._pad(ends)
        ids, mask = _padded([[*row.prefix, *row.ids] for row in batch], pad)
        steps = max(row.left for row in batch)
        uniforms = np.zeros((len(batch), steps))
        for number, row in enumerate(batch):
            uniforms[number, : row.left] = row.uniforms[len(row.ids) :]
        wide = torch.float32 if device.type == "mps" else torch.float64
        drawing = Drawing(torch.as_tensor(uniforms, dtype=wide, device=device), params)
        config = GenerationConfig(
            max_new_tokens=steps, do_sample=False, use_cache=True, eos_token_id=sorted(ends) or None, pad_token_id=pad
        )
        sequences = inner.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([*self._before_drawing(mask.to(device)), drawing]),
            stopping_criteria=StoppingCriteriaList([_Thinned(batch, ends, ids.shape[1], device)]),
        )
        drawn = sequences[:, ids.shape[1] :].cpu().numpy()
        logp = torch.stack(drawing.logp, dim=1).cpu().numpy()
        _append(batch, drawn, logp, ends)

    def _before_drawing(self, mask: Tensor) -> list[LogitsProcessor]:
        """What changes the logits [B, V] of a batch before they are drawn from; `mask` [B, L] of its prefixes."""
        return []

    def _pad(self, ends: frozenset[int]) -> int:
        """Any id will do: padding is masked, and what follows an end token is cut off."""
        own = self.tokenizer.pad_token_id
        return int(own) if own is not None else min(ends, default=0)


class _Thinned(StoppingCriteria):
    """Stops a batch most of whose rows have ended, where to begin anew without them is cheaper than to go on."""

    def __init__(self, batch: Sequence[_Row], ends: frozenset[int], start: int, device: torch.device) -> None:
        self.ends = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
        self.start = start
        self.steps = max(row.left for row in batch)
        self.left = torch.tensor([row.left for row in batch], device=device)
        self.ended = torch.zeros(len(batch), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = input_ids.shape[1] - self.start
        self.ended |= torch.isin(input_ids[:, -1], self.ends) | (self.left <= done)
        rows = len(self.ended)
        alive = rows - int(self.ended.sum())
        # A row that has gone on for so long goes on for as long again, more or less.
        ahead = min(done, self.steps - done)
        stop = rows > _SMALL and 2 * alive <= rows and (rows - alive) * ahead * _STEP_COST > alive * input_ids.shape[1]
        return torch.full_like(self.ended, True) if stop else self.ended


def _append(batch: Sequence[_Row], drawn: np.ndarray, logp: np.ndarray, ends: frozenset[int]) -> None:
    """Add what was drawn to the rows, each up to and with its end token."""
    over = np.isin(drawn, sorted(ends))
    steps = drawn.shape[1]
    for number, row in enumerate(batch):
        first = int(over[number].argmax()) + 1 if over[number].any() else steps
        count = min(first, row.left)
        numbers = logp[number, :count]
        refuse_not_finite(numbers, row.place[0], len(row.ids))
        row.ids.extend(drawn[number, :count].tolist())
        row.logp.extend(numbers.tolist())


def _alike(request: Request) -> Iterator[tuple[list[_Row], SamplingParams]]:
    """Rows that are cut alike, so that one call draws for all of them, with their parameters."""
    groups: dict[tuple[float, int, float], list[_Row]] = {}
    shared: dict[tuple[float, int, float], SamplingParams] = {}
    for number, (prefix, count, own) in enumerate(zip(request.prefixes, request.counts, request.params, strict=True)):
        key = (own.temperature, own.top_k, own.top_p)
        shared.setdefault(key, own)
        groups.setdefault(key, []).extend(
            _Row(prefix, (number, sample), _uniforms(own, number, sample)) for sample in range(count)
        )
    for key, rows in groups.items():
        yield rows, shared[key]


def _uniforms(params: SamplingParams, number: int, sample: int) -> np.ndarray:
    if params.temperature == 0:
        return np.zeros(params.max_new_tokens)
    return seeds.generator(params.seed, "rollout", number, sample).random(params.max_new_tokens)


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [B, L], padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.as_tensor(row, dtype=torch.int64)
        mask[number, width - len(row) :] = 1
    return ids, mask


@contextmanager
def for_sampling(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, plain attention, no defaults of the model's own; all put back."""
    inner = language_model(model)
    flags = [(module, module.training) for module in model.modules()]
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        model.eval()
        with plain_attention(model), torch.inference_mode():
            yield
    finally:
        inner.generation_config = own
        for module, training in flags:
            module.training = training
