"""Who samples in an online run: the policy, by the sampler that the arguments name; the reference; their mixture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from align.core.errors import ConfigError
from align.core.progress import Progress, silent
from align.methods.base import Rollouts
from align.sampling.base import Rollout, Sampler, SamplingParams
from align.sampling.hf import HFSampler
from align.trainers.engine import Engine
from align.trainers.online_config import OnlineConfig

logger = logging.getLogger(__name__)


class Samplers:
    """The samplers by origin, ready for a phase of sampling.

    Args:
        by_origin: origin of a draw -> sampler.
        policy: what `sync` is given before a phase whose weights are new.
        limit: mean difference of log-probs above which a parity report warns.
    """

    def __init__(self, by_origin: Mapping[str, Sampler], policy: Any, limit: float) -> None:
        self.by_origin = dict(by_origin)
        self._policy, self._limit = policy, limit
        self._synced: int | None = None

    @contextmanager
    def ready(self, step: int) -> Iterator[Mapping[str, Sampler]]:
        """The samplers, with the weights of optimiser step `step`."""
        sampler = self.by_origin["policy"]
        awake: Callable[[], AbstractContextManager[Any]] = getattr(sampler, "awake", nullcontext)
        with awake():
            if self._synced != step:
                sampler.sync(self._policy)
                self._synced = step
            yield self.by_origin

    def tell_parity(self, said: Mapping[str, float]) -> None:
        """Say, once a launch, how far the sampler's log-probs are from the trainer's."""
        if not said:
            return
        text = "sampler against trainer: mean |difference| of a token's log-prob %.2g, largest %.2g, KL %.2g nats"
        numbers = (said["sampler/difference"], said["sampler/largest_difference"], said["sampler/kl"])
        if said["sampler/difference"] > self._limit:
            logger.warning(text + ": above %g; ratios and rewards of samples are off by that", *numbers, self._limit)
        else:
            logger.info(text, *numbers)


class InContext:
    """A sampler inside a context: the compute dtype of training, an adapter switched off."""

    def __init__(self, sampler: Sampler, *contexts: Callable[[], AbstractContextManager[Any]]) -> None:
        self.sampler, self.contexts = sampler, contexts
        self.capabilities = sampler.capabilities

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: Any,
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`."""
        from contextlib import ExitStack

        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            return self.sampler.sample(prefixes, n, params, progress)

    def sync(self, policy: Any) -> None:
        """See `Sampler.sync`."""
        self.sampler.sync(policy)


def open_samplers(
    args: OnlineConfig,
    asked: Rollouts,
    engine: Engine,
    tokenizer: Any,
    reference: Any,
    model_name: str,
    world: int,
) -> Samplers:
    """The samplers that a method's draws need.

    Raises:
        ConfigError: the weights are cut over ranks, a sampler cannot do what a method wants, or it is not installed.
    """
    if any(hasattr(parameter, "ds_id") for parameter in engine.roles.parameters()) and args.sampler == "hf":
        raise ConfigError(
            "sampling with `hf` from weights that are cut over ranks",
            why="every rank samples with whole weights",
            mend="use ZeRO-2 or plain data parallelism, or the sampler `vllm` or `server`",
        )
    compute = lambda: engine.roles.autocast(engine.device.type)  # noqa: E731
    policy = engine.roles.policy
    found: dict[str, Sampler] = {"policy": _policy_sampler(args, engine, tokenizer, model_name, world)}
    origins = {draw.origin for draw in asked.draws}
    if origins - {"policy"} and (reference is None or reference.model is None):
        raise ConfigError("the method samples from a reference, and the run has none", mend="leave it `frozen`")
    if origins - {"policy"} and args.sampler != "hf":
        logger.info("the reference samples with `hf`; `%s` has the policy's weights alone", args.sampler)
    if "reference" in origins:
        sampler = HFSampler(reference.model, tokenizer, args.sampler_batch)
        found["reference"] = InContext(sampler, compute, reference.context)
    if "mixture" in origins:
        from align.sampling.mixture import MixtureSampler

        mix = next(draw.mix for draw in asked.draws if draw.origin == "mixture")
        other = None if reference.model is policy else reference.model  # None: the policy with its adapter off
        mixed = MixtureSampler(policy, other, tokenizer, mix, args.sampler_batch)
        found["mixture"] = InContext(mixed, compute)
    return Samplers(found, policy, args.parity_limit)


def _policy_sampler(args: OnlineConfig, engine: Engine, tokenizer: Any, model_name: str, world: int) -> Sampler:
    if args.sampler == "hf":
        sampler = HFSampler(engine.roles.policy, tokenizer, args.sampler_batch)
        return InContext(sampler, lambda: engine.roles.autocast(engine.device.type))
    if args.sampler == "server":
        from align.sampling.server import ServerSampler

        return ServerSampler.open(args.sampler_urls or [], tokenizer)
    if world > 1:
        raise ConfigError(
            "sampler `vllm` in a run of several processes",
            why="each would start an engine on the same device",
            mend="use `server`, with `vllm serve` on devices of its own",
        )
    from align.sampling.vllm import VLLMSampler

    return VLLMSampler.open(
        model_name,
        dtype=args.dtype,
        max_model_len=args.max_length,
        gpu_memory_utilization=args.gpu_memory_utilization,
        seed=args.seed,
    )


__all__ = ["InContext", "Samplers", "SamplingParams", "open_samplers"]
