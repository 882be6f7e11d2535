"""What an evaluation found, and how it is made of rows that were measured prompt by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from align.evaluate.intervals import Estimate, mean_interval, paired_difference
from align.evaluate.kl import KL, kl_of_sums
from align.evaluate.wins import length_controlled_win_rate, win_rate_of

EXAMPLES = 12
"""Prompts whose answers are shown."""
SIDES = ("policy", "baseline")


@dataclass(frozen=True)
class SideResult:
    """Measures of one model's completions.

    Attributes:
        reward: mean; None without a reward. missing: completions whose reward the function did not give.
        tokens: mean length, the end token included. unfinished: share that `max_new_tokens` cut.
        distinct_1, distinct_2: distinct tokens and pairs of neighbouring tokens over all of them, in all completions
            together (arXiv 1510.03055); falls with the number of completions, so compare equal numbers only.
    """

    model: str
    completions: int
    reward: Estimate | None
    missing: int
    tokens: Estimate
    unfinished: Estimate
    distinct_1: float
    distinct_2: float


@dataclass(frozen=True)
class WinResult:
    """Each of a prompt's completions of the policy against each of the baseline, by reward.

    Attributes:
        wins, losses, ties: comparisons. missing: comparisons where either reward is missing.
    """

    rate: Estimate
    length_controlled: Estimate
    wins: int
    losses: int
    ties: int
    missing: int


@dataclass(frozen=True)
class PairResult:
    """Held-out preference pairs, scored by both models. An exact tie counts half.

    Attributes:
        pairs: number of them.
        accuracy, baseline_accuracy: share whose chosen answer has the higher log-probability.
        accuracy_per_token, baseline_accuracy_per_token: the same of log-probability per token.
        implicit_accuracy: share whose chosen answer has the higher log-ratio, policy to baseline (the implicit reward
            of DPO).
        margin: mean difference of that log-ratio, chosen minus rejected, in nats.

    All that needs the baseline is None where it has another tokenizer.
    """

    pairs: int
    accuracy: Estimate
    baseline_accuracy: Estimate | None
    accuracy_per_token: Estimate
    baseline_accuracy_per_token: Estimate | None
    implicit_accuracy: Estimate | None
    margin: Estimate | None


@dataclass(frozen=True)
class Evaluation:
    """A policy against the model that it started from.

    Attributes:
        reward: name of the reward function, or nothing.
        prompts: distinct ones. n: completions of each by each model.
        reward_difference: policy minus baseline, mean over prompts of the difference of their means.
        kl: of the policy from the baseline; None where tokenizers differ, or at temperature 0.
        pairs: None where the data hold no pairs.
        data: what was read and left out. settings: everything that determines the result.
        notes: what a reader should know. examples: a dozen prompts with answers and rewards.
        tokens: a few held-out pairs token by token, as `align.scoring.token_view.told` gives them: the log-ratio of
            policy to baseline, in nats.
    """

    policy: SideResult
    baseline: SideResult
    reward: str
    prompts: int
    n: int
    wins: WinResult | None
    reward_difference: Estimate | None
    kl: KL | None
    pairs: PairResult | None
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    examples: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    tokens: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """Nested dictionaries and lists of plain values; numbers that are not finite are NaN."""
        return asdict(self)


def summarise(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    reward: str,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Evaluation:
    """All measures from the rows that `evaluate_policy` keeps, one per prompt."""
    sides = {side: _side(rows, side, names[side], bool(reward)) for side in SIDES}
    wins, difference = (_wins(rows), _difference(rows)) if reward else (None, None)
    return Evaluation(
        policy=sides["policy"],
        baseline=sides["baseline"],
        reward=reward,
        prompts=len(rows),
        n=len(rows[0]["policy"]) if rows else 0,
        wins=wins,
        reward_difference=difference,
        kl=_kl(rows),
        pairs=_pairs(rows),
        data=dict(data),
        settings=dict(settings),
        notes=tuple(notes),
        examples=tuple(_example(row) for row in rows[:EXAMPLES]),
        tokens=tuple(pair["tokens"] for row in rows for pair in row["pairs"] if "tokens" in pair),
    )


def _side(rows: Sequence[Mapping[str, Any]], side: str, name: str, rewarded: bool) -> SideResult:
    completions = [one for row in rows for one in row[side]]
    clusters = [number for number, row in enumerate(rows) for _ in row[side]]
    return SideResult(
        model=name,
        completions=len(completions),
        reward=mean_interval([_number(one["reward"]) for one in completions], clusters) if rewarded else None,
        missing=sum(one["reward"] is None for one in completions) if rewarded else 0,
        tokens=mean_interval([len(one["ids"]) for one in completions], clusters),
        unfinished=win_rate_of([float(not one["finished"]) for one in completions], clusters),
        distinct_1=distinct([one["ids"] for one in completions], 1),
        distinct_2=distinct([one["ids"] for one in completions], 2),
    )


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over n-grams, in all completions together; NaN where there are none."""
    seen: Counter[tuple[int, ...]] = Counter()
    for ids in completions:
        seen.update(tuple(ids[start : start + n]) for start in range(len(ids) - n + 1))
    return len(seen) / seen.total() if seen else float("nan")


def _wins(rows: Sequence[Mapping[str, Any]]) -> WinResult:
    scores, lengths, baseline_lengths, clusters = [], [], [], []
    for number, row in enumerate(rows):
        for ours in row["policy"]:
            for theirs in row["baseline"]:
                scores.append(_score(_number(ours["reward"]), _number(theirs["reward"])))
                lengths.append(len(ours["ids"]))
                baseline_lengths.append(len(theirs["ids"]))
                clusters.append(number)
    values = np.array(scores)
    return WinResult(
        rate=win_rate_of(values, clusters),
        length_controlled=length_controlled_win_rate(values, lengths, baseline_lengths, clusters),
        wins=int((values == 1).sum()),
        losses=int((values == 0).sum()),
        ties=int((values == 0.5).sum()),
        missing=int(np.isnan(values).sum()),
    )


def _score(ours: float, theirs: float) -> float:
    if np.isnan(ours) or np.isnan(theirs):
        return float("nan")
    return 0.5 if ours == theirs else float(ours > theirs)


def _difference(rows: Sequence[Mapping[str, Any]]) -> Estimate:
    return paired_difference(*([_mean_reward(row[side]) for row in rows] for side in ("baseline", "policy")))


def _mean_reward(completions: Sequence[Mapping[str, Any]]) -> float:
    rewards = [one["reward"] for one in completions if one["reward"] is not None]
    return float(np.mean(rewards)) if rewards else float("nan")


def _kl(rows: Sequence[Mapping[str, Any]]) -> KL | None:
    numbers = [
        (one["k1"], one["k3"], len(one["ids"]), number)
        for number, row in enumerate(rows)
        for one in row["policy"]
        if one.get("k1") is not None
    ]
    if not numbers:
        return None
    k1, k3, tokens, clusters = zip(*numbers, strict=True)
    return kl_of_sums(np.array(k1), np.array(k3), np.array(tokens), clusters)


def _pairs(rows: Sequence[Mapping[str, Any]]) -> PairResult | None:
    found = [(pair, number) for number, row in enumerate(rows) for pair in row["pairs"]]
    if not found:
        return None
    clusters = [number for _, number in found]

    def accuracy(read: Callable[[Mapping[str, Any]], float]) -> Estimate:
        return win_rate_of([_score(read(pair), 0.0) for pair, _ in found], clusters)

    def gap(side: str) -> Callable[[Mapping[str, Any]], float]:
        return lambda pair: pair[side]["chosen"] - pair[side]["rejected"]

    def gap_per_token(side: str) -> Callable[[Mapping[str, Any]], float]:
        return lambda pair: (
            pair[side]["chosen"] / pair[side]["chosen_tokens"] - pair[side]["rejected"] / pair[side]["rejected_tokens"]
        )

    shared = all(pair["baseline"] is not None for pair, _ in found)
    margins = [gap("policy")(pair) - gap("baseline")(pair) for pair, _ in found] if shared else []
    return PairResult(
        pairs=len(found),
        accuracy=accuracy(gap("policy")),
        baseline_accuracy=accuracy(gap("baseline")) if shared else None,
        accuracy_per_token=accuracy(gap_per_token("policy")),
        baseline_accuracy_per_token=accuracy(gap_per_token("baseline")) if shared else None,
        implicit_accuracy=win_rate_of([_score(margin, 0.0) for margin in margins], clusters) if shared else None,
        margin=mean_interval(margins, clusters) if shared else None,
    )


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    first = {side: row[side][0] for side in SIDES}
    return {
        "row": row["row"],
        "prompt": row["prompt"],
        "answers": {side: one["text"] for side, one in first.items()},
        "rewards": {side: one["reward"] for side, one in first.items()},
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
