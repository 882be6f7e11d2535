"""`OnlineConfig`: the arguments of a run, and how its rollouts are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from align.core.errors import ConfigError
from align.sampling.base import SamplingParams
from align.trainers.config import AlignConfig, _doc

_CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": ("hf", "vllm", "server"),
    "rollout_keep": ("none", "last", "all"),
}
_POSITIVE = ("rollout_epochs", "rollout_minibatches", "max_new_tokens", "sampler_batch", "eval_prompts")
_OF = {
    "sampler_urls": ("server",),
    "sampler_batch": ("hf",),
    "gpu_memory_utilization": ("vllm",),
    "sampler_sleep": ("vllm",),
}
"""Option -> the samplers that read it."""


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
    sampler: str = _doc("hf", "who samples: hf, vllm (in process) or server (a running `vllm serve`)")
    sampler_urls: list[str] | None = _doc(None, "addresses of running servers")
    sampler_batch: int = _doc(256, "completions that `hf` draws at once")
    sampler_sleep: bool = _doc(True, "vllm frees its memory between two phases of sampling (GPU)")
    gpu_memory_utilization: float = _doc(0.4, "share of the GPU's memory that vllm takes")
    reward_weights: Mapping[str, float] | None = _doc(None, "weight of each reward by name; None: 1 each")
    shaping: list[Mapping[str, Any]] | None = _doc(None, "stages before the method's own: {name: overlong, ...}")
    eval_prompts: int = _doc(256, "held-out prompts that an evaluation samples for, at most")
    parity_limit: float = _doc(0.02, "mean |sampler - trainer| log-prob of a token above which the run says so")

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}", mend="use one of " + ", ".join(choices))
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}", mend="use a whole number >= 1")
        self._refuse_unused()
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
        if self.sampler == "server" and not self.sampler_urls:
            raise ConfigError("sampler `server` without `sampler_urls`", mend="name the addresses of running servers")
        self.sampling()
        if self.temperature == 0:
            raise ConfigError("`temperature` is 0", why="all samples of a prompt would be equal", mend="use 1")
        super().__post_init__()

    def _refuse_unused(self) -> None:
        defaults = {field.name: field.default for field in fields(OnlineConfig)}
        for name, owners in _OF.items():
            if self.sampler not in owners and getattr(self, name) != defaults[name]:
                raise ConfigError(f"`{name}` with sampler `{self.sampler}`", mend=f"use {owners[0]}, or remove it")

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
        """Refuse truncated sampling where the loss compares with the policy that sampled.

        Raises:
            ConfigError: `top_p` or `top_k` cut the distribution, and the method's ratio is of whole ones.
        """
        if ratio and (self.top_p < 1 or self.top_k > 0):
            raise ConfigError(
                f"`top_p` {self.top_p:g}, `top_k` {self.top_k} with method `{method}`",
                why="its loss divides by the probability of a sample, and truncated sampling has another one",
                mend="write top_p 1 and top_k 0",
            )
