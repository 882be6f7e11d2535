"""Sampling from a per-token geometric mixture of the policy and a reference, as Nash-MD does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from align.core.errors import ConfigError, ModelError
from align.core.progress import Progress, silent
from align.sampling.base import Rollout, SamplingParams
from align.sampling.hf import HFSampler, for_sampling
from align.scoring.facts import accepts, language_model


class MixtureSampler(HFSampler):
    """Draws from pi_mix(y_t | x, y_<t) proportional to pi(y_t | ...)^(1 - mix) * ref(y_t | ...)^mix.

    Nash-MD (2312.00886), section 7: the mixture is taken token by token, each renormalised, not over whole sequences.
    `Rollout.logp` is that of the mixture. Temperature, top_k and top_p act on the mixture. Draws use the numbers that
    `HFSampler` would use: `mix` 0 gives its draws of the policy, `mix` 1 its draws of the reference.

    Args:
        policy: as in `HFSampler`.
        reference: a model of the same vocabulary; None: the policy with its adapter off.
        mix: share of the reference in the exponent, between 0 and 1. It may be changed between calls.

    Raises:
        ConfigError: `mix` outside its range, or no reference and no adapter.
        ModelError: another vocabulary.
    """

    capabilities: frozenset[str] = frozenset({"seeds", "mixture"})

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        tokenizer: Any,
        mix: float,
        batch_size: int = 64,
        tokens_per_batch: int | None = None,
        end_ids: Collection[int] = (),
    ) -> None:
        super().__init__(policy, tokenizer, batch_size, tokens_per_batch, end_ids)
        if not 0 <= mix <= 1:
            raise ConfigError(f"`mix` is {mix}", mend="use a number from 0 (the policy) to 1 (the reference)")
        if reference is None and not hasattr(policy, "disable_adapter"):
            raise ConfigError(
                "there is no reference to mix with", why="the policy has no adapter", mend="give a reference model"
            )
        own, other = (
            int(language_model(model).get_input_embeddings().num_embeddings)
            for model in (policy, policy if reference is None else reference)
        )
        if own != other:
            raise ModelError(
                f"the policy's vocabulary is {own}, the reference's {other}", mend="mix models of one tokenizer"
            )
        self.reference, self.mix = reference, mix

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """See `HFSampler.sample`."""
        with nullcontext() if self.reference is None else for_sampling(self.reference):
            return super().sample(prefixes, n, params, progress)

    def _before_drawing(self, mask: Tensor) -> list[LogitsProcessor]:
        if self.mix == 0:
            return []
        return [_Mixing(self._reference_model(), self._alone, self.mix, mask)]

    def _reference_model(self) -> Any:
        return language_model(self.model if self.reference is None else self.reference)

    def _alone(self) -> AbstractContextManager[Any]:
        """Inside, the reference's forward is the reference's."""
        if self.reference is not None:
            return nullcontext()
        policy: Any = self.model
        return policy.disable_adapter()  # type: ignore[no-any-return]


class _Mixing(LogitsProcessor):
    """Runs the reference beside `generate`, with a cache of its own, and mixes its logits in.

    Args:
        alone: a context for the reference's forward.
        mask: int64 [B, L] of the left-padded prefixes.
    """

    def __init__(self, model: Any, alone: Any, mix: float, mask: Tensor) -> None:
        self._model, self._alone, self._mix = model, alone, mix
        self._mask = mask
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids if self._cache is None else input_ids[:, -1:]
        grown = input_ids.shape[1] - self._mask.shape[1]
        if grown:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(input_ids), grown)], dim=1)
        reference = self._logits(new)
        if self._mix == 1:
            return reference
        mixed = (1 - self._mix) * scores.log_softmax(-1) + self._mix * reference.log_softmax(-1)
        return mixed.log_softmax(-1)

    def _logits(self, new: Tensor) -> Tensor:
        """float32 [B, V] of the token after the last."""
        given: dict[str, Any] = {"input_ids": new, "attention_mask": self._mask, "use_cache": True}
        if accepts(self._model, "position_ids"):
            positions = self._mask.cumsum(-1) - 1
            given["position_ids"] = positions.masked_fill(self._mask == 0, 0)[:, -new.shape[1] :]
        if accepts(self._model, "logits_to_keep"):
            given["logits_to_keep"] = 1
        with self._alone():
            out = self._model(**given, past_key_values=self._cache)
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            raise ModelError(
                f"{type(self._model).__name__} gives no cache of keys and values", mend="mix with another reference"
            )
        return out.logits[:, -1].float()  # type: ignore[no-any-return]
