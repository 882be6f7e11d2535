"""Numbers about a batch of rollouts, for the log and for those who watch over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from align.data.groups import TokenCompletion, TokenGroup
from align.data.rollouts import RolloutGroup
from align.trainers.rollouts import SAMPLER, reward_of
from align.trainers.variety import distinct_share, no_spread_share, repeated_share


def mismatch(groups: Sequence[TokenGroup], logp: np.ndarray) -> dict[str, float]:
    """The sampler's log-probs against the trainer's of the same tokens, at the same temperature, of what the policy
    wrote: those of a reference or a mixture are by another policy.

    Args:
        logp: float64 [N, T], the trainer's, rows in the order of the completions.

    Returns:
        `sampler/difference` and `sampler/largest_difference` of a token in nats; `sampler/kl`, the mean over tokens of
        e^d - d - 1 with d = trainer - sampler, an estimate of KL(sampler || trainer); `sampler/ess`, the effective
        sample size of the completions' ratios as a share of their number. Nothing where log-probs did not come along.
    """
    pairs = by_the_policy(groups, logp)
    if not pairs:
        return {}
    gaps = [(row - one.columns[SAMPLER])[one.mask] for row, one in pairs]
    tokens = np.concatenate(gaps)
    sums = np.array([gap.sum() for gap in gaps])
    weights = np.exp(sums - sums.max())
    return {
        "sampler/difference": float(np.abs(tokens).mean()),
        "sampler/largest_difference": float(np.abs(tokens).max()),
        "sampler/kl": float((np.expm1(tokens) - tokens).mean()),
        "sampler/ess": float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
    }


def by_the_policy(groups: Sequence[TokenGroup], logp: np.ndarray) -> list[tuple[np.ndarray, TokenCompletion]]:
    """(the trainer's log-probs [T], completion) of the policy's own; nothing where one has no log-probs of a sampler.

    Args:
        logp: as for `mismatch`.
    """
    completions = [one for group in groups for one in group.completions]
    own = [(row[: len(one)], one) for row, one in zip(logp, completions, strict=True) if one.role == "policy"]
    return own if all(SAMPLER in one.columns for _, one in own) else []


def measured(
    groups: Sequence[RolloutGroup], left_out: Mapping[str, int], weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Means over the policy's answers of a batch, name -> number; where it wrote none itself, over all.

    `rollout/reward` is the sum that is trained on, `rollout/reward/NAME` each by itself; `length` counts tokens;
    `truncated`, `missing` (without feedback) are shares of answers, `left_out` and `no_spread` (rewards of all answers
    are equal) of prompts; `repeated` is the mean share of an answer's 4-grams that it said before, `distinct` that of
    different 2-grams among the answers to a prompt; `entropy` the mean of -log-prob of a sampled token, an estimate of
    the sampler's entropy in nats.
    """
    own = [_own(group) for group in groups]
    mine = [
        replace(group, answers=tuple(group.answers[place] for place in places), wins=None)
        for group, places in zip(groups, own, strict=True)
    ]
    answers = [one for group in mine for one in group.answers]
    if not answers:
        return {}
    rewards = np.concatenate([reward_of(group, weights)[places] for group, places in zip(groups, own, strict=True)])
    found = {
        "rollout/length": float(np.mean([len(one) for one in answers])),
        "rollout/truncated": float(np.mean([not one.finished for one in answers])),
        "rollout/missing": float(np.isnan(rewards).mean()),
        "rollout/left_out": sum(left_out.values()) / len(groups),
    }
    if not np.isnan(rewards).all():
        found["rollout/reward"] = float(np.nanmean(rewards))
    for name in sorted({name for one in answers for name in one.rewards}):
        values = np.array([one.rewards.get(name, np.nan) for one in answers])
        if not np.isnan(values).all():
            found[f"rollout/reward/{name}"] = float(np.nanmean(values))
    variety = {
        "rollout/repeated": repeated_share(mine),
        "rollout/distinct": distinct_share(mine),
        "rollout/no_spread": no_spread_share(groups, weights),
    }
    found |= {name: value for name, value in variety.items() if not np.isnan(value)}
    sampled = [one.logp for one in answers if one.logp is not None]
    if sampled:
        found["rollout/entropy"] = float(-np.concatenate(sampled).mean())
    return found


def _own(group: RolloutGroup) -> list[int]:
    """Places of the policy's answers, of all where there are none."""
    return [place for place, one in enumerate(group.answers) if one.origin == "policy"] or list(range(len(group)))
