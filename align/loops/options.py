"""What a recipe says of its rounds: the section `loop`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from align.core.options import option

Metric = Literal["reward", "win_rate", "accuracy"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The policy of a round against the initial model, on held-out prompts, as `align evaluate` measures it."""

    data: str | None = option(None, doc="held-out rows: prompts, or pairs; null: the held-out prompts of `world`")
    split: str | None = option(None, doc="split of a data set that has several")
    reward: str | None = option(None, doc="reward function `my_file:my_reward`; without one there is no win rate")
    world: str | None = option(None, doc="a world, whose gold reward is the reward")
    n: int = option(1, at_least=1, doc="completions of a prompt by each model")
    max_prompts: int = option(200, at_least=1, doc="distinct prompts, drawn by the seed")
    temperature: float = option(1.0, at_least=0, doc="of both models; KL is exact at 1 alone")
    max_new_tokens: int = option(256, at_least=1, doc="tokens of a completion")
    seed: int = option(0, at_least=0, doc="of prompts and draws")


@dataclass(frozen=True, kw_only=True)
class Accept:
    """When a round's policy is taken; else the next round starts from the best so far."""

    metric: Metric = option("reward", doc="mean reward, win rate against the initial model, or accuracy on pairs")
    min_gain: float = option(0.0, doc="gain over the best so far below which the round is rolled back")
    patience: int | None = option(None, at_least=1, doc="rounds rolled back in a row after which the loop stops")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Rounds of sampling, judging, pairing, training and evaluation. What is null is the preset's."""

    preset: str = option(doc="which loop: `align methods --kind loop` lists them")
    rounds: int | None = option(None, at_least=1, doc="rounds at most; null: the preset's")
    prompts: int | None = option(
        None, at_least=1, doc="prompts of a round; null: all of them, or with `disjoint` an equal share"
    )
    take: Literal["disjoint", "same", "fresh"] | None = option(
        None, doc="prompts of a round: no prompt twice, the same each time, or drawn anew each time; null: the preset's"
    )
    reference: Literal["initial", "previous"] | None = option(
        None, doc="what the loss compares with: the initial model, or the policy that sampled; null: the preset's"
    )
    init: Literal["previous", "initial"] = option("previous", doc="weights that the training of a round starts from")
    earlier: Any = option(
        None,
        doc="shares of the pairs of one, two, ... rounds before that are trained on too, a list; null: the preset's",
    )
    base: str | None = option(
        None, doc="what the initial model was trained from: the reference of implicit rewards; null: the initial model"
    )
    consistency: Literal["avg", "dyn"] | None = option(
        None,
        doc="labels trusted as far as two iterates rank alike: one number a round, or a prompt; null: the preset's",
    )
    extrapolate: float = option(
        0.0,
        at_least=0,
        below=1,
        doc="alpha of accelerated preference optimisation: weights + alpha * (weights - those of the round before)",
    )
    max_kl: float | None = option(None, above=0, doc="KL to the initial model, in nats, at which the loop stops")
    seed: int = option(0, at_least=0, doc="of which prompts, and which pairs of earlier rounds, are taken")
    evaluation: Evaluation | None = field(default=None)
    accept: Accept | None = field(default=None)
