"""What an online run is refused for or told before it samples, and small parts of its looks at itself."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from align.core.errors import ConfigError
from align.data.stream import GroupDataset, Hole
from align.feedback.base import Feedback
from align.methods.base import Draw, Method, Rollouts
from align.shaping import ShapingStage
from align.shaping.rewards import Overlong
from align.trainers.engine import Engine
from align.trainers.online_config import OnlineConfig

logger = logging.getLogger(__name__)
_LOOK = 8
"""Rows looked at for their columns."""
_EVALUATED = ("reward", "kl", "length", "truncated", "missing", "no_spread", "repeated", "distinct", "entropy")
"""What an evaluation measures, beside `reward/NAME`."""


def check_feedback(given: Sequence[Any]) -> None:
    """Refuse what judges nothing, and two of one name."""
    make = "open_feedback(FeedbackSpec(kind='function', name='my_file:my_reward'))"
    for one in given:
        if not hasattr(one, "judge"):
            raise ConfigError(
                f"`feedback` holds a {type(one).__name__}, which has no `judge`",
                mend=f"make a feedback of a reward function: {make}, of align.feedback",
            )
    twice = [name for name, count in Counter(one.name for one in given).items() if count > 1]
    if twice:
        raise ConfigError(f"two feedbacks are named `{twice[0]}`", mend="give each a name of its own")


def check_arguments(args: Any) -> None:
    """Refuse arguments of another kind of run."""
    if not isinstance(args, OnlineConfig):
        raise ConfigError(f"`args` is a {type(args).__name__}", mend="give an `OnlineConfig`")
    if args.reference == "cached":
        raise ConfigError(
            "reference `cached` in a run that samples",
            why="no sample comes twice, so the cache would grow with every step and never be read",
            mend="use reference `frozen`, or `adapter_off` with an adapter",
        )
    check_best(args.best_metric)


def check_shaping(method: str, asked: Rollouts, args: OnlineConfig) -> None:
    """Refuse stages for a method that trains on preferences."""
    if args.shaping and asked.select != "group":
        raise ConfigError(
            f"`shaping` with method `{method}`",
            why="it trains on preferences, and shaping is of rewards",
            mend="leave `shaping` out, or take a method such as grpo",
        )


def check_best(metric: str | None) -> None:
    """Refuse a metric that no evaluation of an online run gives, before hours are spent until the first."""
    name = (metric or "reward").removeprefix("eval_")
    if name not in _EVALUATED and ("/" not in name or name.startswith("rewards/")):
        raise ConfigError(
            f"`best_metric` is `{metric}`, which evaluation of an online run does not give",
            mend="use one of reward, reward/NAME of a feedback, " + ", ".join(_EVALUATED[1:]),
        )


def check_stages(method: Method, stages: Sequence[ShapingStage]) -> None:
    """Refuse a stage that compares with a reference where there is none, before a batch is sampled and judged."""
    charging = [stage.id for stage in stages if stage.needs_reference]
    if charging and "ref_logp" not in method.requires():
        raise ConfigError(
            f"shaping `{charging[0]}` compares with a reference, and method `{method.id}` with these options has none",
            mend="leave it out, or give the method's own KL a weight",
        )


def say_kinds(method: str, asked: Rollouts, feedbacks: Sequence[Feedback]) -> None:
    """What becomes of feedback of the kind that the method does not ask for."""
    other = [f"`{one.name}`" for one in feedbacks if one.gives != asked.feedback]
    if other and len(other) < len(feedbacks):
        logger.warning("%s trains on %ss alone: %s will be asked and logged", method, asked.feedback, ", ".join(other))
    elif other and asked.feedback == "preference":
        logger.info("%s asks for preferences: of two answers that of the larger reward wins; equal ones tie", method)
    elif other:
        logger.info("%s asks for rewards: an answer's is its mean probability of beating the prompt's others", method)


def say_unread(method: str, rows: GroupDataset, stages: Sequence[ShapingStage], max_new_tokens: int) -> None:
    """Say what looks as if it acted, and does not: weights of rows, a price of length that no answer reaches."""
    first = next((one for one in rows.__getitems__(range(min(_LOOK, len(rows)))) if not isinstance(one, Hole)), None)
    if first is not None and first.question is not None and "weight" in first.question.columns:
        logger.warning("%s weighs all prompts alike: the column `weight` reaches reward functions only", method)
    for stage in stages:
        if isinstance(stage, Overlong) and stage.max_length - stage.cache >= max_new_tokens:
            logger.warning(
                "%s: `overlong` costs from token %d on, and an answer has at most %d (`max_new_tokens`): it never acts",
                method,
                stage.max_length - stage.cache + 1,
                max_new_tokens,
            )


@contextmanager
def still(engine: Engine) -> Iterator[None]:
    """Without dropout."""
    training = engine.module.training
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train(training)


def of_the_policy(asked: Rollouts) -> Rollouts:
    """What is drawn to see how the policy does: where it trains on a mixture's answers alone, its own instead."""
    if any(draw.origin == "policy" for draw in asked.draws):
        return asked
    return replace(asked, draws=tuple(Draw("policy", draw.count) for draw in asked.draws))
