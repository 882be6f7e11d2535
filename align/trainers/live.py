"""Samples of the policy as it is now, drawn before a step for the prompts of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from align.core.errors import ConfigError
from align.data.groups import ROLES, TokenCompletion, TokenGroup
from align.methods.base import Live
from align.sampling.base import Rollout, SamplingParams
from align.sampling.hf import HFSampler
from align.trainers.roles import RoleModule

BATCH = 256
"""Completions drawn at once."""


@dataclass(eq=False)
class LiveSamples:
    """Draws a method's `live` samples. At temperature 1 from the whole vocabulary, in the compute dtype of training.

    A draw is a function of (seed, place of the prompt in the global batch, number of the sample) and the weights, so
    neither ranks nor micro-batches change it. Each rank draws for a part of the prompts, and all get all.

    Attributes:
        roles: the policy among them is sampled from in place.
        asked: how many, and how long.
    """

    roles: RoleModule
    tokenizer: Any
    device: torch.device
    asked: Live
    rank: int = 0
    world: int = 1

    def __call__(self, groups: Sequence[TokenGroup], seed: int) -> list[TokenGroup]:
        """The groups, each with `asked.count` completions more, of the role `sample`. A collective."""
        prompts = [group.prompt.tolist() for group in groups]
        counts = [self.asked.count * (place % self.world == self.rank) for place in range(len(prompts))]
        params = SamplingParams(max_new_tokens=self.asked.max_new_tokens, seed=seed % (1 << 53))
        sampler = HFSampler(self.roles.policy, self.tokenizer, BATCH)
        with self.roles.autocast(self.device.type):
            drawn = self._of_all(sampler.sample(prompts, counts, params))
        return [
            replace(group, completions=(*group.completions, *map(_completion, own)))
            for group, own in zip(groups, drawn, strict=True)
        ]

    def _of_all(self, drawn: list[list[Rollout]]) -> list[list[Rollout]]:
        if self.world == 1:
            return drawn
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, drawn)
        return [parts[place % self.world][place] for place in range(len(drawn))]


def live_samples(
    asked: Live | None, roles: RoleModule, tokenizer: Any, args: Any, rank: int, world: int
) -> LiveSamples | None:
    """What draws a method's samples, or None where it asks for none.

    Raises:
        ConfigError: the weights are cut over ranks, and no rank can sample alone; or a reference that is cached.
    """
    if asked is None:
        return None
    sharded = any(hasattr(parameter, "ds_id") for parameter in roles.parameters())
    if sharded or getattr(args, "fsdp", None):
        raise ConfigError(
            "live samples from weights that are cut over ranks",
            why="every rank samples with whole weights",
            mend="use ZeRO-2 or plain data parallelism, or samples in the data (`live: 0`)",
        )
    if args.reference == "cached":
        raise ConfigError(
            "live samples with a cached reference",
            why="no sample comes twice, so the cache would grow with every step and never be read",
            mend="write `reference.kind: frozen`",
        )
    return LiveSamples(roles, tokenizer, args.device, asked, rank, world)


def _completion(drawn: Rollout) -> TokenCompletion:
    scored = np.ones(len(drawn), dtype=bool)
    return TokenCompletion(
        drawn.ids, scored, np.zeros(len(drawn), dtype=np.int64), finished=drawn.finished, role=ROLES["samples"]
    )
