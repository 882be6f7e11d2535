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
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from align.core import seeds
from align.core.errors import ConfigError, ModelError
from align.core.progress import Progress, silent
from align.sampling.base import Rollout, SamplingParams
from align.sampling.draw import Drawing
from align.scoring.backends import plain_attention
from align.scoring.facts import language_model

_log = logging.getLogger(__name__)
_CONTEXT = 8
"""Tokens before a completion with which it is decoded, so that a leading space is not lost."""
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
        return self._extra_ends | _ids(self.tokenizer.eos_token_id) | _ids(getattr(config, "eos_token_id", None))

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
        params: SamplingParams,
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`. `progress` counts completions.

        Raises:
            ConfigError: an empty or too long prefix, or an id outside the vocabulary.
            ModelError: the model gives numbers that are not finite.
        """
        counts = [n] * len(prefixes) if isinstance(n, int) else list(n)
        self._check(prefixes, counts, params)
        rows = [
            _Row(prefix, (number, sample), _uniforms(params, number, sample))
            for number, (prefix, count) in enumerate(zip(prefixes, counts, strict=True))
            for sample in range(count)
        ]
        out: list[list[Rollout | None]] = [[None] * count for count in counts]
        contexts = {number: _context(self.tokenizer, prefix) for number, prefix in enumerate(prefixes)}
        ends = self.end_ids
        with _for_sampling(self.model):
            for done in self._finished(rows, params, ends):
                for row, rollout in zip(done, self._rollouts(done, contexts, ends), strict=True):
                    number, sample = row.place
                    out[number][sample] = rollout
                progress(len(done))
        return out  # type: ignore[return-value]

    def _check(self, prefixes: Sequence[Sequence[int]], counts: Sequence[int], params: SamplingParams) -> None:
        if len(counts) != len(prefixes):
            raise ConfigError(f"{len(counts)} counts for {len(prefixes)} prefixes", mend="give one number, or one each")
        if any(count < 0 for count in counts):
            raise ConfigError(f"{min(counts)} completions of a prefix", mend="ask for 0 or more")
        vocabulary = int(language_model(self.model).get_input_embeddings().num_embeddings)
        for number, prefix in enumerate(prefixes):
            if not len(prefix):
                raise ConfigError(f"prefix {number} is empty", mend="begin it with the BOS token")
            if not 0 <= min(prefix) <= max(prefix) < vocabulary:
                raise ConfigError(
                    f"prefix {number} holds an id outside the vocabulary of {vocabulary}",
                    mend="encode it with the model's own tokenizer",
                )
        longest = max((len(prefix) for prefix in prefixes), default=0) + params.max_new_tokens
        if self.positions is not None and longest > self.positions:
            raise ConfigError(
                f"a prefix and `max_new_tokens` make {longest} tokens, and the model has {self.positions} positions",
                mend="lower `max_new_tokens`, or leave long prefixes out",
            )

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
            logits_processor=LogitsProcessorList([drawing]),
            stopping_criteria=StoppingCriteriaList([_Thinned(batch, ends, ids.shape[1], device)]),
        )
        drawn = sequences[:, ids.shape[1] :].cpu().numpy()
        logp = torch.stack(drawing.logp, dim=1).cpu().numpy()
        _append(batch, drawn, logp, ends)

    def _pad(self, ends: frozenset[int]) -> int:
        """Any id will do: padding is masked, and what follows an end token is cut off."""
        own = self.tokenizer.pad_token_id
        return int(own) if own is not None else min(ends, default=0)

    def _rollouts(
        self, rows: list[_Row], contexts: Mapping[int, tuple[list[int], str]], ends: frozenset[int]
    ) -> list[Rollout]:
        finished = [row.ids[-1] in ends for row in rows]
        before = [contexts[row.place[0]] for row in rows]
        bodies = [row.ids[:-1] if ended else row.ids for row, ended in zip(rows, finished, strict=True)]
        joined = _decode(self.tokenizer, [[*ids, *body] for (ids, _), body in zip(before, bodies, strict=True)])
        rollouts = []
        for row, ended, (_, start), text, body in zip(rows, finished, before, joined, bodies, strict=True):
            own = text[len(start) :] if text.startswith(start) else _decode(self.tokenizer, [body])[0]
            rollouts.append(
                Rollout(np.asarray(row.ids, dtype=np.int64), np.asarray(row.logp, dtype=np.float32), own, ended)
            )
        return rollouts


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
        if not np.isfinite(numbers).all():
            raise ModelError(
                "the model gives numbers that are not finite",
                where=f"prefix {row.place[0]}, token {len(row.ids) + int((~np.isfinite(numbers)).argmax())}",
                mend="check the weights; float16 overflows where bfloat16 does not",
            )
        row.ids.extend(drawn[number, :count].tolist())
        row.logp.extend(numbers.tolist())


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
def _for_sampling(model: nn.Module) -> Iterator[None]:
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


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(one) for one in (value if isinstance(value, (list, tuple)) else [value]))


def _context(tokenizer: Any, prefix: Sequence[int]) -> tuple[list[int], str]:
    ids = [int(token) for token in prefix[-_CONTEXT:]]
    return ids, _decode(tokenizer, [ids])[0]


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    return list(tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False))
