"""Who samples in an online run: the policy, by the sampler that the arguments name; the reference; their mixture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from align.core.errors import ConfigError
from align.core.progress import Progress, silent
from align.methods.base import Rollouts
from align.sampling.base import Rollout, Sampler, SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.parity import Greedy, ParityReport, PlainForward, compare_greedy
from align.sampling.spec import SamplerSpec
from align.sampling.weights import full_weights
from align.trainers.engine import Engine
from align.trainers.online_config import OnlineConfig

logger = logging.getLogger(__name__)
PUSHED = ".weights"
"""Folder in a run's, in which weights stand while servers take them."""


def _nothing() -> None:
    """One process waits for nobody."""


class Samplers:
    """The samplers by origin, ready for a phase of sampling.

    Args:
        by_origin: origin of a draw -> sampler.
        policy: what `sync` is given before a phase whose weights are new.
        pushes: whether this process pushes weights; one does, where several share servers.
        barrier: waits for all processes.
    """

    def __init__(
        self, by_origin: Mapping[str, Sampler], policy: Any, pushes: bool = True, barrier: Callable[[], None] = _nothing
    ) -> None:
        self.by_origin = dict(by_origin)
        self._policy, self._pushes, self._barrier = policy, pushes, barrier
        self._synced: int | None = None

    @contextmanager
    def ready(self, step: int) -> Iterator[Mapping[str, Sampler]]:
        """The samplers, with the weights of optimiser step `step`. A collective."""
        sampler: Any = self.by_origin["policy"]
        new = self._synced != step
        if hasattr(sampler, "awake"):
            with sampler.awake(self._policy if new else None):
                self._synced = step
                yield self.by_origin
            return
        if new and self._pushes:
            sampler.sync(self._policy)
        elif new and is_cut(self._policy):
            # Gathering the weights is a collective (ZeRO-3): the rank that pushes would wait for this one, which waits
            # for it at the barrier.
            for _ in full_weights(self._policy):
                pass
        self._barrier()
        self._synced = step
        yield self.by_origin

    def greedy(self, prefixes: Sequence[Sequence[int]], max_new_tokens: int) -> Greedy:
        """Greedy completions of the sampler, each token against the policy's own likeliest by a plain forward."""
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        drawn = [group[0] for group in self.by_origin["policy"].sample(prefixes, 1, params)]
        return compare_greedy(drawn, PlainForward(self._policy).best(prefixes, drawn))

    def close(self) -> None:
        """Engines end, connections are closed."""
        for sampler in self.by_origin.values():
            end: Callable[[], None] | None = getattr(sampler, "close", None)
            if end is not None:
                end()


def is_cut(module: Any) -> bool:
    """Whether weights are cut over ranks (ZeRO-3, FSDP2)."""
    return any(hasattr(one, "ds_id") or hasattr(one, "placements") for one in module.parameters())


def tell(report: ParityReport) -> None:
    """Say, once a launch, how far the sampler's numbers are from the trainer's; loudly where that is a fault."""
    logger.info(
        "sampler against trainer: mean |difference| of a token's log-prob %.2g, largest %.2g, KL %.2g nats%s",
        report.mean,
        report.largest,
        report.kl,
        "" if report.greedy is None else f"; greedy completions: {_told(report.greedy)}",
    )
    if report.loud:
        logger.warning("sampler and trainer disagree: %s", report.loud)


def _told(greedy: Greedy) -> str:
    return f"{greedy.same} of {greedy.sequences} equal, {greedy.ties} part at a tie, {greedy.different} differ"


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
    accelerator: Any,
) -> Samplers:
    """The samplers that a method's draws need.

    Raises:
        ConfigError: the weights are cut over ranks, a sampler cannot do what a method wants, or it is not installed.
    """
    compute = lambda: engine.roles.autocast(engine.device.type)  # noqa: E731
    policy = engine.roles.policy
    world = accelerator.num_processes
    origins = {draw.origin for draw in asked.draws}
    if (is_cut(engine.roles) or args.fsdp) and (args.sampler.kind == "hf" or origins - {"policy"}):
        raise ConfigError(
            "sampling with `hf` from weights that are cut over ranks",
            why="every rank samples with whole weights; and a reference is sampled from with `hf` in any case",
            mend="use ZeRO-2 or plain data parallelism; or, for the policy alone, the sampler `server`",
        )
    found: dict[str, Sampler] = {"policy": _policy_sampler(args, engine, tokenizer, model_name, world)}
    if origins - {"policy"} and (reference is None or reference.model is None):
        raise ConfigError("the method samples from a reference, and the run has none", mend="leave it `frozen`")
    if origins - {"policy"} and args.sampler.kind != "hf":
        logger.info("the reference samples with `hf`; `%s` has the policy's weights alone", args.sampler.kind)
    if "reference" in origins:
        sampler = HFSampler(reference.model, tokenizer, args.sampler.batch_size)
        found["reference"] = InContext(sampler, compute, reference.context)
    if "mixture" in origins:
        from align.sampling.mixture import MixtureSampler

        mix, *others = {draw.mix for draw in asked.draws if draw.origin == "mixture"}
        if others:
            raise ConfigError("a method draws from two mixtures of different weights", mend="draw from one")
        other = None if reference.model is policy else reference.model  # None: the policy with its adapter off
        mixed = MixtureSampler(policy, other, tokenizer, mix, args.sampler.batch_size)
        found["mixture"] = InContext(mixed, compute)
    shared = args.sampler.kind == "server" and world > 1
    return Samplers(
        found, policy, not shared or accelerator.is_main_process, accelerator.wait_for_everyone if shared else _nothing
    )


def _policy_sampler(args: OnlineConfig, engine: Engine, tokenizer: Any, model_name: str, world: int) -> Sampler:
    if args.sampler.kind == "hf":
        sampler = HFSampler(engine.roles.policy, tokenizer, args.sampler.batch_size)
        return InContext(sampler, lambda: engine.roles.autocast(engine.device.type))
    if args.sampler.kind == "server":
        from align.sampling.server import ServerSampler, ServerSettings

        adapter = hasattr(engine.roles.policy, "peft_config") and not is_cut(engine.roles)
        push: Literal["adapter", "folder"] = "adapter" if adapter else "folder"
        folder = Path(args.output_dir) / PUSHED
        spec: SamplerSpec = args.sampler
        settings = ServerSettings(push=push, folder=folder, deadline=spec.deadline, tries=spec.retries + 1)
        return ServerSampler.open(spec.urls, tokenizer, settings, model=spec.served_as, wait=spec.wait)
    if world > 1:
        raise ConfigError(
            "sampler `vllm` in a run of several processes",
            why="each would start an engine on the same device",
            mend="use `server`, with `vllm serve` on devices of its own",
        )
    from align.sampling.vllm import VLLMSampler

    return VLLMSampler.open(
        model_name,
        tokenizer,
        dtype=args.dtype,
        max_model_len=args.max_length,
        gpu_memory_utilization=args.sampler.gpu_memory_utilization,
        enforce_eager=args.sampler.enforce_eager,
        seed=args.seed,
        sleep_level=1,
    )
