"""A batch of prompts -> judged rollouts: every rank samples and has judged its part of the prompts, and all get all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from align.core.errors import AlignError, ConfigError, TrainingError
from align.core.seeds import derive
from align.data.groups import TokenGroup
from align.data.rollouts import Answer, RolloutGroup
from align.feedback.accounts import Account, apply
from align.feedback.base import Feedback
from align.methods.base import Draw, Rollouts
from align.sampling.base import Rollout, Sampler, SamplingParams
from align.trainers.rollouts import reward_of

_SEEDS = 1 << 53


@dataclass(eq=False)
class Collector:
    """Samples and judges.

    A draw is a function of (seed, place of the prompt in the batch, number of the draw and of the sample) and of the
    weights, so neither ranks nor micro-batches change it.

    Attributes:
        asked: what the method wants.
        samplers: origin of a draw -> its sampler.
        feedbacks: all are asked about every answer.
        params: of every draw; the seed is set here.
        models: origin -> the name that its answers carry.
        held_out: asked too, each by itself; what they say stands among an answer's rewards under their names, for
            measuring. A preference model's is the mean probability of beating the prompt's other answers.
    """

    asked: Rollouts
    samplers: Mapping[str, Sampler]
    feedbacks: Sequence[Feedback]
    params: SamplingParams
    rank: int = 0
    world: int = 1
    models: Mapping[str, str] = field(default_factory=dict)
    held_out: Sequence[Feedback] = ()

    def __post_init__(self) -> None:
        missing = [draw.origin for draw in self.asked.draws if draw.origin not in self.samplers]
        if missing:
            raise ConfigError(f"nothing samples from `{missing[0]}`", mend="use the sampler `hf`, which can")
        if not self.feedbacks:
            raise ConfigError("there is no feedback", mend="name a reward function, a reward model or a judge")

    def __call__(self, prompts: Sequence[TokenGroup], seed: int, iteration: int) -> tuple[list[RolloutGroup], Account]:
        """The prompts with all their answers, judged, in their order; and an account of the judging. A collective.

        Raises:
            AlignError: on every rank where sampling or judging fails on one, so that none waits for it.
        """
        try:
            mine: Any = self._judged(self.draw(prompts, seed, iteration), seed)
        except Exception as error:  # whatever it is, the other ranks must hear of it before it is raised here
            if self.world == 1:
                raise
            mine = error
        return self._of_all(mine, len(prompts))

    def _judged(self, groups: list[RolloutGroup], seed: int) -> tuple[list[RolloutGroup], Account]:
        own = derive(seed, "feedback") % _SEEDS
        judged, account = apply(self.feedbacks, groups, own)
        for one in self.held_out:
            apart, more = apply([one], groups, own)
            judged = [_beside(group, other, one.name) for group, other in zip(judged, apart, strict=True)]
            account = account + more
        return judged, account

    def draw(self, prompts: Sequence[TokenGroup], seed: int, iteration: int) -> list[RolloutGroup]:
        """The answers to this rank's part of the prompts, which nobody has judged."""
        mine = [place for place in range(len(prompts)) if place % self.world == self.rank]
        answers: list[list[Answer]] = [[] for _ in prompts]
        for number, draw in enumerate(self.asked.draws):
            for place, own in self._drawn(prompts, mine, draw, number, seed):
                answers[place] += own
        return [_rollout_group(prompts[place], answers[place], iteration) for place in mine]

    def _drawn(
        self, prompts: Sequence[TokenGroup], mine: Sequence[int], draw: Draw, number: int, seed: int
    ) -> list[tuple[int, list[Answer]]]:
        prefixes = [group.prompt.tolist() for group in prompts]
        own = set(mine)
        counts = [draw.count if place in own else 0 for place in range(len(prompts))]
        params = replace(self.params, seed=derive(seed, "draw", number) % _SEEDS)
        drawn = self.samplers[draw.origin].sample(prefixes, counts, params)
        model = self.models.get(draw.origin, "")
        return [(place, [_answer(one, draw, params, model) for one in drawn[place]]) for place in mine]

    def _of_all(self, mine: Any, count: int) -> tuple[list[RolloutGroup], Account]:
        """Every rank's judged groups in the order of the prompts, and the sum of the accounts."""
        if self.world == 1:
            return mine  # type: ignore[no-any-return]
        told = mine if not isinstance(mine, Exception) else _sendable(mine)
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, told)
        if isinstance(mine, Exception):
            raise mine
        for rank, part in enumerate(parts):
            if isinstance(part, AlignError):
                raise TrainingError(f"rank {rank} failed: {part.what}", where=part.where, why=part.why, mend=part.mend)
        groups = [parts[place % self.world][0][place // self.world] for place in range(count)]
        return groups, sum((account for _, account in parts), Account())


def _sendable(error: Exception) -> AlignError:
    """What other ranks are told of a failure; an exception of a library need not survive the way."""
    return error if isinstance(error, AlignError) else AlignError(f"{type(error).__name__}: {error}")


def _beside(group: RolloutGroup, judged: RolloutGroup, name: str) -> RolloutGroup:
    """The group with a held-out judge's numbers beside its rewards."""
    values = reward_of(judged)
    answers = (
        replace(one, rewards={**one.rewards, name: float(value)})
        for one, value in zip(group.answers, values, strict=True)
    )
    return replace(group, answers=tuple(answers))


def _answer(drawn: Rollout, draw: Draw, params: SamplingParams, model: str) -> Answer:
    return Answer(
        ids=drawn.ids,
        text=drawn.text,
        finished=drawn.finished,
        logp=drawn.logp,
        origin=draw.origin,
        model=model,
        temperature=params.temperature,
    )


def _rollout_group(prompt: TokenGroup, answers: Sequence[Answer], iteration: int) -> RolloutGroup:
    question = prompt.question
    if question is None:
        raise ConfigError("a prompt without its text", where=str(prompt.row), mend="prepare the data as `prompts`")
    return RolloutGroup(
        row=prompt.row,
        prompt=question.prompt,
        prompt_ids=np.asarray(prompt.prompt, dtype=np.int64),
        answers=tuple(answers),
        columns=question.columns,
        tools=question.tools,
        iteration=iteration,
    )
