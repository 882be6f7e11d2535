"""Sampling with vLLM in this process; the policy's weights are pushed into it from memory."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from align.compat.vllm import Asked, Engine
from align.core.errors import ConfigError, SamplerError
from align.core.progress import Progress, silent
from align.sampling.base import Request, Rollout, SamplingParams
from align.sampling.completions import Decoder, draws, end_ids_of
from align.sampling.weights import adapter_obstacle, full_weights, save_adapter
from align.scoring.loading import load_tokenizer

_log = logging.getLogger(__name__)
SleepLevel = Literal[1, 2]
State = Literal["awake", "asleep", "empty", "closed"]
_CPU_CACHE = 1 << 30
_OURS = frozenset({"model", "logprobs_mode", "skip_tokenizer_init", "generation_config", "tensor_parallel_size"})
"""Arguments of the engine that no `extra` may change: results would mean something else."""


class VLLMSampler:
    """Draws completions with vLLM.

    Each completion is a request with a seed of its own, a function of (seed, number of the prefix, number of the
    completion). The batch it is computed in changes a draw by rounding alone; with float32 on a CPU the same call gave
    the same ids in every test, on a GPU a rounding that falls the other way can change a token and all that follow.
    Draws differ from those of `HFSampler` at the same seed. Log-probs are those of the distribution that was drawn
    from, after temperature, top_k and top_p; at temperature 0 the model's own.

    Use `open`. `state` says what the engine can do: `awake`; `asleep` (weights kept); `empty` (no weights, or half of
    a failed push: `sync` comes first); `closed`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        end_ids: frozenset[int],
        max_lora_rank: int | None = None,
        sleep_level: SleepLevel | None = None,
    ) -> None:
        self.tokenizer, self.end_ids = tokenizer, end_ids
        self.max_lora_rank, self.sleep_level = max_lora_rank, sleep_level
        self.state: State = "awake"
        self.version = 0
        """Number of pushes so far."""
        self.capabilities = frozenset({"seeds"} | ({"adapter_push"} if max_lora_rank else set()))
        self._engine = engine
        self._adapter: Any = None
        self._folder: Path | None = None
        self._said: set[str] = set()

    @classmethod
    def open(
        cls,
        model: str | Path,
        tokenizer: Any = None,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = False,
        seed: int = 0,
        max_lora_rank: int | None = None,
        sleep_level: SleepLevel | None = None,
        end_ids: Collection[int] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> VLLMSampler:
        """Start an engine in this process. The random state of the process stays as it was.

        Args:
            model: folder or hub id.
            tokenizer: by default the model's own.
            dtype: of the engine; `auto` is the one that the model is stored in. Take the trainer's compute dtype.
            max_model_len: most tokens of a prefix and its completion; None: what the model allows.
            gpu_memory_utilization: share of the device's memory, the engine's weights included. On a CPU the cache
                gets 1 GiB instead (`extra={"kv_cache_memory_bytes": ...}` changes it).
            enforce_eager: no compilation: a fast start and slower steps.
            max_lora_rank: take adapters of up to this rank by themselves; None: whole weights are pushed.
            sleep_level: what `pause` does: 1 keeps the weights in CPU memory, 2 throws them away until the next
                `sync`; None: nothing.
            end_ids: end tokens besides those of the tokenizer and the model.
            extra: further arguments of `vllm.LLM`.

        Raises:
            MissingExtra: vLLM is not installed. SamplerError: it does not start.
            ConfigError: an argument in `extra` that cannot be changed.
        """
        given = dict(extra or {})
        taken = sorted(_OURS & set(given))
        if taken:
            raise ConfigError(
                f"`{taken[0]}` cannot be set in `extra`",
                mend="for several GPUs a model, serve it: the sampler `server`",
            )
        name = str(Path(model).expanduser()) if isinstance(model, Path) or str(model).startswith("~") else str(model)
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(name)
        arguments = {
            "model": name,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            "seed": seed,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # a model's own penalties and cuts are left out, as `HFSampler` does
            "disable_log_stats": True,
            **_for_device(given, sleep_level),
            **({"enable_lora": True, "max_lora_rank": _lora_size(max_lora_rank)} if max_lora_rank else {}),
            **given,
        }
        ends = end_ids_of(name, tokenizer) | frozenset(end_ids)
        return cls(Engine(arguments), tokenizer, ends, max_lora_rank, sleep_level)

    @property
    def positions(self) -> int:
        """Most tokens of a prefix and its completion."""
        return self._engine.positions

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`. An engine that sleeps with its weights is woken.

        Raises:
            ConfigError: an empty or too long prefix, or an id outside the vocabulary.
            SamplerError: the engine has no weights, is closed, or fails.
            ModelError: the model gives numbers that are not finite.
        """
        self.resume()
        request = Request.of(prefixes, n, params, vocabulary=self._engine.vocabulary, positions=self.positions)
        asked = list(draws(request))
        out: list[list[Rollout]] = [[] for _ in prefixes]
        if not asked:
            return out
        wanted = [
            Asked(
                one.prefix,
                one.params.max_new_tokens,
                one.params.temperature,
                one.params.top_p,
                one.params.top_k,
                one.seed,
            )
            for one in asked
        ]
        drawn = self._engine.generate(wanted, self.end_ids, self._adapter, progress)
        decoder = Decoder(self.tokenizer, prefixes, self.end_ids)
        rows = [(one.place[0], ids, logp) for one, (ids, logp) in zip(asked, drawn, strict=True)]
        for (number, _, _), rollout in zip(rows, decoder.rollouts(rows), strict=True):
            out[number].append(rollout)
        return out

    def sync(self, policy: nn.Module) -> None:
        """Sample from these weights from now on: a copy of what they are now.

        The adapter alone is pushed where the sampler was opened for it and the policy allows it, else the whole, the
        adapter added in float32. Under ZeRO-3 every rank has to call it, or iterate over `weights.full_weights`.

        Raises:
            SamplerError: the weights do not fit; the engine cannot be used until a push succeeds.
            ModelError: weights that cannot be pushed (see `full_weights`).
        """
        self._refuse_closed()
        alone = self._goes_alone(policy)
        slept, was_empty = self.state in ("asleep", "empty") and self._can_sleep, self.state == "empty"
        self.state = "empty"
        if slept:
            self._engine.wake("weights")  # the cache stays away until the weights are there: less memory at once
        if alone:
            if was_empty:
                with policy.disable_adapter():  # type: ignore[operator]
                    self._engine.reload(full_weights(policy))
            self._push_adapter(policy)
        else:
            self._engine.reload(full_weights(policy))
            self._drop_adapter()
        if slept:
            self._engine.wake("kv_cache")
        self.version += 1
        self.state = "awake"

    def pause(self) -> None:
        """Give the engine's memory to others, until `sync` or `resume`. On a CPU nothing happens, and is said."""
        self._refuse_closed()
        if self.sleep_level is None or self.state != "awake":
            return
        if not self._can_sleep:
            self._say("vLLM cannot sleep on a CPU: its memory stays taken between phases")
            return
        self._engine.sleep(self.sleep_level)
        self.state = "asleep" if self.sleep_level == 1 else "empty"
        if self.sleep_level == 2:
            self._adapter = None

    def resume(self) -> None:
        """Wake an engine that has its weights.

        Raises:
            SamplerError: it has none: `sync` brings them.
        """
        self._refuse_closed()
        if self.state == "empty":
            raise SamplerError(
                "vLLM has no weights to sample from",
                why="they were thrown away by `pause`, or a push failed",
                mend="call `sync(policy)` first",
            )
        if self.state == "asleep":
            self._engine.wake()
            self.state = "awake"

    @contextmanager
    def awake(self, policy: nn.Module | None = None) -> Iterator[VLLMSampler]:
        """The engine awake inside the block, with `policy`'s weights where one is given, and paused after it."""
        if policy is None:
            self.resume()
        else:
            self.sync(policy)
        try:
            yield self
        finally:
            self.pause()

    def close(self) -> None:
        """End the engine and free its memory; a second call does nothing."""
        if self.state == "closed":
            return
        self.state, self._adapter = "closed", None
        self._engine.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _can_sleep(self) -> bool:
        return not self._engine.on_cpu

    def _goes_alone(self, policy: nn.Module) -> bool:
        if not self.max_lora_rank:
            return False
        obstacle = adapter_obstacle(policy, self.max_lora_rank)
        if obstacle:
            self._say(f"the whole policy is pushed into vLLM, not an adapter alone: {obstacle}")
        return not obstacle

    def _push_adapter(self, policy: nn.Module) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="align-adapters-"))
        folder = save_adapter(policy, self._folder / str(self.version + 1))
        old, self._adapter = self._adapter, self._engine.add_adapter(folder, self.version + 1)
        if old is not None:
            self._engine.remove_adapter(old)
        shutil.rmtree(folder)

    def _drop_adapter(self) -> None:
        self._adapter = None  # a push of whole weights has emptied the engine's store of adapters

    def _refuse_closed(self) -> None:
        if self.state == "closed":
            raise SamplerError("the sampler is closed", mend="open another")

    def _say(self, text: str) -> None:
        """Once."""
        if text not in self._said:
            self._said.add(text)
            _log.warning(text)


def _for_device(given: Mapping[str, Any], sleep_level: SleepLevel | None) -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {"enable_sleep_mode": sleep_level is not None}
    if "kv_cache_memory_bytes" not in given:
        _log.info("vLLM on a CPU: its cache gets %d MiB", _CPU_CACHE >> 20)
    return {"kv_cache_memory_bytes": _CPU_CACHE}


def _lora_size(rank: int) -> int:
    """The smallest size of the engine's that holds the rank (vLLM takes these alone)."""
    sizes = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    for size in sizes:
        if rank <= size:
            return size
    raise ConfigError(f"`max_lora_rank` is {rank}", mend=f"vLLM takes ranks up to {sizes[-1]}")
