"""`OnlineConfig`: the arguments of a run, and how its rollouts are made."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from align.core.errors import ConfigError
from align.sampling.base import SamplingParams
from align.sampling.parity import refuse_or_say
from align.sampling.spec import Kind, SamplerSpec, unused
from align.trainers.config import AlignConfig, _doc

logger = logging.getLogger(__name__)
KEEP = ("none", "last", "all")
THE_TRAINERS = {
    "dtype": "a run samples in its own `dtype`",
    "device": "a run samples where it trains",
    "max_model_len": "`max_length` says it",
}
"""Options of a sampler that a run has itself -> why."""
_POSITIVE = ("rollout_epochs", "rollout_minibatches", "max_new_tokens", "eval_prompts")


@dataclass
class OnlineConfig(AlignConfig):
    """Arguments of an online run. `global_batch_size` counts prompts: an optimiser step trains on that many of the
    `rollout_prompts` of a batch of rollouts, which `rollout_epochs` times cut in `rollout_minibatches` feed."""

    rollout_prompts: int | None = _doc(None, "prompts of a batch of rollouts; None: one step's, times minibatches")
    rollout_epochs: int = _doc(1, "passes over a batch of rollouts")
    rollout_minibatches: int = _doc(1, "optimiser steps of one pass")
    rollout_keep: Literal["none", "last", "all"] = _doc("none", "rollouts kept in output_dir/rollouts")
    max_redraws: int = _doc(0, "times that prompts are drawn again in place of groups that are filtered out")
    max_new_tokens: int = _doc(256, "tokens of a completion, its end token included")
    temperature: float = _doc(1.0, "of sampling; log-probs are taken at it too")
    top_p: float = _doc(1.0, "smallest set of tokens with this much probability; 1: all")
    top_k: int = _doc(0, "so many likeliest tokens; 0: all")
    sampler: Any = _doc("hf", "who samples: hf, vllm, server, or a `SamplerSpec` with its options")
    reward_weights: Mapping[str, float] | None = _doc(None, "weight of each reward by name; None: 1 each")
    shaping: list[Mapping[str, Any]] | None = _doc(None, "stages before the method's own: {name: overlong, ...}")
    eval_prompts: int = _doc(256, "held-out prompts that an evaluation samples for, at most")

    def __post_init__(self) -> None:
        if self.rollout_keep not in KEEP:
            raise ConfigError(f"`rollout_keep` is {self.rollout_keep!r}", mend="use one of " + ", ".join(KEEP))
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}", mend="use a whole number >= 1")
        self.sampler = self._sampler()
        if (
            self.rollout_prompts is not None
            and self.rollout_prompts != self.global_batch_size * self.rollout_minibatches
        ):
            raise ConfigError(
                f"`rollout_prompts` is {self.rollout_prompts}, `global_batch_size` {self.global_batch_size} and "
                f"`rollout_minibatches` {self.rollout_minibatches}",
                why="a step trains on `global_batch_size` prompts, so the three are one number too many",
                mend=f"write rollout_prompts {self.global_batch_size * self.rollout_minibatches}, or leave it out",
            )
        if self.max_new_tokens >= self.max_length:
            raise ConfigError(
                f"`max_new_tokens` is {self.max_new_tokens}, `max_length` {self.max_length}",
                why="a prompt and its completion share `max_length`",
                mend="raise `max_length`, or lower `max_new_tokens`",
            )
        self.sampling()
        if self.temperature == 0:
            raise ConfigError("`temperature` is 0", why="all samples of a prompt would be equal", mend="use 1")
        super().__post_init__()

    def _sampler(self) -> SamplerSpec:
        kinds = get_args(Kind)
        if isinstance(self.sampler, str) and self.sampler not in kinds:
            raise ConfigError(f"`sampler` is {self.sampler!r}", mend="use one of " + ", ".join(kinds))
        made = SamplerSpec(kind=self.sampler) if isinstance(self.sampler, str) else self.sampler  # type: ignore[arg-type]
        default = {field.name: field.default for field in fields(SamplerSpec)}
        for name, why in {**unused(made), **THE_TRAINERS}.items():
            if getattr(made, name) != default[name]:
                raise ConfigError(f"`sampler.{name}` is unused", why=why, mend="remove it")
        if made.kind == "server" and not made.urls:
            raise ConfigError("sampler `server` without `urls`", mend="name the addresses of running servers")
        return made

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, which trackers are given."""
        weights = None if self.reward_weights is None else dict(self.reward_weights)
        stages = None if self.shaping is None else [dict(stage) for stage in self.shaping]
        return {**super().to_dict(), "sampler": asdict(self.sampler), "reward_weights": weights, "shaping": stages}

    @property
    def prompts(self) -> int:
        """Prompts of one batch of rollouts."""
        return self.global_batch_size * self.rollout_minibatches

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k
        )

    def shaping_stages(self) -> list[tuple[str, dict[str, Any]]]:
        """(id, options) of the stages before the method's own.

        Raises:
            ConfigError: a stage without a name.
        """
        found = []
        for number, stage in enumerate(self.shaping or ()):
            if "name" not in stage:
                raise ConfigError(f"`shaping[{number}]` has no `name`", mend="write {name: overlong, ...}")
            found.append((str(stage["name"]), {key: value for key, value in stage.items() if key != "name"}))
        return found

    def check_sampling(self, method: str, ratio: bool) -> None:
        """Refuse truncated sampling where the loss compares with the policy that sampled, say what it means elsewhere.

        Raises:
            ConfigError: `top_p` or `top_k` cut the distribution, and the method's ratio is of whole ones.
        """
        said = refuse_or_say(self.sampling(), ratio)
        if said:
            logger.info("%s: %s", method, said)
