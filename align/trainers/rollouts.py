"""Judged rollouts -> what a step trains on: the selection and the shaping that a method declares, and its parts.

All here is a pure function of the rollouts gathered over ranks, so that every rank makes the same of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.core.seeds import generator
from align.data.groups import Preference, RowId, TokenCompletion, TokenGroup
from align.data.rollouts import Answer, RolloutGroup
from align.methods.base import Rollouts
from align.shaping import Batch

ADVANTAGE, OLD, REF, SAMPLER = "advantage", "old_logp", "ref_logp", "sampler_logp"
_CARRIED = (ADVANTAGE, OLD, REF, SAMPLER)


@dataclass(frozen=True, eq=False)
class Selected:
    """What of the rollouts may be trained on, and why the rest is left out: reason -> prompts."""

    groups: list[TokenGroup]
    left_out: Mapping[str, int]


def select(
    asked: Rollouts, groups: Sequence[RolloutGroup], seed: int, weights: Mapping[str, float] | None = None
) -> Selected:
    """Token groups of the method's view.

    Feedback of the other kind is turned into what is asked for: rewards into preferences by which is larger (equal
    ones: 0.5), preferences into rewards as the mean probability of beating the prompt's other answers.

    Args:
        weights: of the rewards by name.
    """
    found: list[TokenGroup] = []
    left: Counter[str] = Counter()
    for group in groups:
        made = _SELECT[asked.select](asked, group, seed, weights)
        if isinstance(made, str):
            left[made] += 1
        else:
            found.append(made)
    return Selected(found, dict(left))


def win_matrix(group: RolloutGroup, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """P(i beats j), float64 [K, K]: the preferences given, else which reward is larger; NaN where nobody said."""
    if group.wins is not None:
        return group.wins
    rewards = group.rewards(weights)
    gap = rewards[:, None] - rewards[None, :]
    return np.where(np.isnan(gap), np.nan, 0.5 + 0.5 * np.sign(gap))


def reward_of(group: RolloutGroup, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """float64 [K]: the weighted rewards, else the mean probability of beating the other answers; NaN where missing.

    A reward without a weight, such as a held-out judge's, does not stand in the way of the wins.
    """
    weighed = any(weights is None or weights.get(name) for one in group.answers for name in one.rewards)
    if group.wins is None or weighed:
        return group.rewards(weights)
    others = group.wins.copy()
    np.fill_diagonal(others, np.nan)
    known = ~np.isnan(others)
    sums = np.where(known, others, 0.0).sum(1)
    return np.where(known.any(1), sums / np.maximum(known.sum(1), 1), np.nan)


def _group(asked: Rollouts, group: RolloutGroup, seed: int, weights: Mapping[str, float] | None) -> TokenGroup | str:
    rewards = reward_of(group, weights)
    if np.isnan(rewards).all():
        return "no feedback"
    completions = [_completion(answer, float(reward)) for answer, reward in zip(group.answers, rewards, strict=True)]
    return _token_group(group, completions)


def _pair(asked: Rollouts, group: RolloutGroup, seed: int, weights: Mapping[str, float] | None) -> TokenGroup | str:
    first, second = group.answers[:2]
    if asked.feedback == "preference":
        rewards, p = group.rewards(weights), float(win_matrix(group, weights)[0, 1])
    else:
        rewards = reward_of(group, weights)
        p = _likelier(rewards)
    if np.isnan(p):
        return "no feedback"
    if np.array_equal(first.ids, second.ids):
        return "two equal answers"
    if asked.label == "sampled":
        wins = bool(generator(seed, "label", group.row.source, group.row.row).random() < p)
    elif p == 0.5 and asked.label == "hard" and asked.feedback == "preference":
        return "a tie"
    else:
        wins = p >= 0.5
    gap = float(rewards[0] - rewards[1]) if not np.isnan(rewards[:2]).any() else None
    preference = Preference(
        0 if wins else 1,
        1 if wins else 0,
        probability=max(p, 1 - p) if asked.label == "prob" else 1.0,
        margin=None if gap is None else gap if wins else -gap,
        tie=p == 0.5,
    )
    completions = [_completion(one, float(r)) for one, r in zip((first, second), rewards[:2], strict=True)]
    return _token_group(group, completions, (preference,))


def _likelier(rewards: np.ndarray) -> float:
    gap = rewards[0] - rewards[1]
    return float("nan") if np.isnan(gap) else float(0.5 + 0.5 * np.sign(gap))


def _first(asked: Rollouts, group: RolloutGroup, seed: int, weights: Mapping[str, float] | None) -> TokenGroup | str:
    p = float(win_matrix(group, weights)[0, 1])
    if np.isnan(p):
        return "no feedback"
    if asked.label == "sampled":
        p = float(generator(seed, "label", group.row.source, group.row.row).random() < p)
    return _token_group(group, [_completion(group.answers[0], p)])


_SELECT: Mapping[str, Any] = {"group": _group, "pair": _pair, "first": _first}


def _completion(answer: Answer, reward: float) -> TokenCompletion:
    length = len(answer)
    columns = {ADVANTAGE: np.zeros(length)}
    if answer.logp is not None:
        columns[SAMPLER] = np.asarray(answer.logp, dtype=np.float64)
    return TokenCompletion(
        ids=np.asarray(answer.ids, dtype=np.int64),
        mask=np.ones(length, dtype=bool),
        step=np.zeros(length, dtype=np.int64),
        finished=answer.finished,
        reward=None if np.isnan(reward) else reward,
        role=answer.origin,
        columns=columns,
    )


def token_group(group: RolloutGroup) -> TokenGroup:
    """All answers of a group, for scoring them alone."""
    return _token_group(group, [_completion(one, np.nan) for one in group.answers])


def _token_group(
    group: RolloutGroup, completions: Sequence[TokenCompletion], preferences: tuple[Preference, ...] = ()
) -> TokenGroup:
    return TokenGroup(group.row, np.asarray(group.prompt_ids, np.int64), tuple(completions), preferences)


# -- shaping ----------------------------------------------------------------------------------------------------------


def with_columns(groups: Sequence[TokenGroup], columns: Mapping[str, np.ndarray]) -> list[TokenGroup]:
    """The groups with token columns out of tables [N, T], rows in the order of the completions."""
    found, place = [], 0
    for group in groups:
        completions = []
        for one in group.completions:
            own = {name: np.asarray(table[place, : len(one)], np.float64) for name, table in columns.items()}
            completions.append(replace(one, columns={**one.columns, **own}))
            place += 1
        found.append(replace(group, completions=tuple(completions)))
    return found


def batch_of(groups: Sequence[TokenGroup], state: Mapping[str, np.ndarray]) -> Batch:
    """The numbers that shaping reads."""
    completions = [one for group in groups for one in group.completions]
    width = max(map(len, completions), default=0)
    mask = np.zeros((len(completions), width), dtype=bool)
    ratio = np.zeros(mask.shape)
    reference = bool(completions) and all(REF in one.columns and OLD in one.columns for one in completions)
    for number, one in enumerate(completions):
        mask[number, : len(one)] = one.mask
        if reference:
            ratio[number, : len(one)] = np.where(one.mask, one.columns[OLD] - one.columns[REF], 0.0)
    return Batch(
        group=np.repeat(np.arange(len(groups)), [len(group.completions) for group in groups]),
        reward=np.array([np.nan if one.reward is None else one.reward for one in completions]),
        length=mask.sum(1),
        finished=np.array([one.finished for one in completions], dtype=bool),
        mask=mask,
        advantage=np.zeros(mask.shape),
        train=np.ones(len(completions), dtype=bool),
        log_ratio=ratio if reference else None,
        state=dict(state),
    )


def shaped(groups: Sequence[TokenGroup], batch: Batch) -> list[TokenGroup]:
    """The completions that are trained on, with their advantages; a group that has none of them is left out."""
    found = []
    place = 0
    for group in with_columns(groups, {ADVANTAGE: batch.advantage}):
        keep = batch.train[place : place + len(group.completions)]
        place += len(group.completions)
        if keep.all():
            found.append(group)
        elif keep.any():
            kept = tuple(one for one, wanted in zip(group.completions, keep, strict=True) if wanted)
            found.append(replace(group, completions=kept))
    return found


# -- parts of a batch of rollouts ----------------------------------------------------------------------------------


def part_of(groups: Sequence[TokenGroup], part: int, minibatches: int, seed: int) -> list[TokenGroup]:
    """The groups of optimiser step `part` of a batch of rollouts: each pass over it mixes anew and cuts it evenly."""
    if minibatches == 1:
        return list(groups)
    epoch, place = divmod(part, minibatches)
    order = generator(seed, "minibatches", epoch).permutation(len(groups))
    return [groups[i] for i in sorted(order[place::minibatches])]


def to_tensors(groups: Sequence[TokenGroup]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch of rollouts for a checkpoint: what is JSON, and tensors (all completions end to end)."""
    completions = [one for group in groups for one in group.completions]
    names = [name for name in _CARRIED if completions and all(name in one.columns for one in completions)]
    described = {
        "columns": names,
        "groups": [
            {
                "row": [group.row.source, group.row.row, group.row.line, group.row.file],
                "prompt": len(group.prompt),
                "completions": [[len(one), one.finished, one.reward, one.role] for one in group.completions],
                "preferences": [
                    [p.winner, p.loser, p.probability, p.margin, p.weight, p.tie] for p in group.preferences
                ],
            }
            for group in groups
        ],
    }
    tensors = {
        "prompts": _joined([group.prompt for group in groups], np.int64),
        "ids": _joined([one.ids for one in completions], np.int64),
        "mask": _joined([one.mask for one in completions], np.bool_),
    }
    tensors |= {name: _joined([one.columns[name] for one in completions], np.float64) for name in names}
    return described, tensors


def from_tensors(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[TokenGroup]:
    """The inverse of `to_tensors`."""
    prompts, rest = tensors["prompts"].numpy(), {name: t.numpy() for name, t in tensors.items() if name != "prompts"}
    found, at, place = [], 0, 0
    for one in described["groups"]:
        completions = []
        for length, finished, reward, role in one["completions"]:
            own = {name: table[place : place + length] for name, table in rest.items()}
            place += length
            completions.append(
                TokenCompletion(
                    own["ids"],
                    own["mask"],
                    np.zeros(length, np.int64),
                    finished=finished,
                    reward=reward,
                    role=role,
                    columns={name: own[name] for name in described["columns"]},
                )
            )
        source, row, line, file = one["row"]
        preferences = tuple(Preference(*values) for values in one["preferences"])
        prompt = prompts[at : at + one["prompt"]]
        at += one["prompt"]
        found.append(TokenGroup(RowId(source, row, line, file), prompt, tuple(completions), preferences))
    return found


def _joined(parts: Sequence[np.ndarray], kind: Any) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, kind), *(np.asarray(part, kind) for part in parts)]))
