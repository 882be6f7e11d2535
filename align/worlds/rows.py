"""Data sets of a world out of completions that a model wrote: one builder a kind of feedback.

Every builder takes the world, prompts, the model's completions of each prompt (four or so, by one policy, independent)
and a seed, and gives rows in the forms that `align.data` reads. The same prompts and completions under the same seed
give the same pairs in every kind, so methods that read different feedback are compared on the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from align.core.seeds import generator
from align.worlds.base import World, as_assistant, as_user, last_content

Rows = list[dict[str, Any]]
Texts = Sequence[Sequence[str]]
PANEL = 9
"""Annotators who vote on a pair of `voted`."""
RARE = 4
"""Of `labelled`, one desirable answer in so many is kept: labels are unbalanced, and few are good."""


def pairs(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """`prompt`, `chosen`, `rejected`, `annotator`: the furthest two answers, as one annotator sees them."""
    return world.pairs(prompts, texts, seed)[0]


def voted(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """Pairs with `probability`, the share of a panel of annotators that prefers the chosen answer: more than half."""
    rows = []
    for row, (prompt, answers) in enumerate(_answered(prompts, texts)):
        first, second = world.furthest(prompt, answers)
        seats = (world.compare(prompt, first, second, seed, PANEL * row + seat).first for seat in range(PANEL))
        votes = [vote for vote in seats if vote is not None]
        share = sum(votes) / len(votes) if votes else 0.5
        if share == 0.5 or first == second:
            continue
        chosen, rejected = (first, second) if share > 0.5 else (second, first)
        rows.append({**_pair(prompt, chosen, rejected), "probability": max(share, 1 - share)})
    return rows


def lists(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """`prompt`, `completions`, `scores`: all answers to a prompt with their gold rewards."""
    return [
        {
            "prompt": as_user(prompt),
            "completions": [as_assistant(answer) for answer in answers],
            "scores": [world.reward(prompt, answer) for answer in answers],
        }
        for prompt, answers in _answered(prompts, texts)
    ]


def shares(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """`lists` whose `scores` are win shares, in 0 to 1: how many of the other answers an answer beats, ties half."""
    rows = lists(world, prompts, texts, seed)
    for row in rows:
        gold = np.array(row["scores"])
        beaten = (gold[:, None] > gold).sum(1) + 0.5 * ((gold[:, None] == gold).sum(1) - 1)
        row["scores"] = (beaten / (len(gold) - 1)).tolist()
    return rows


def rewarded(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """`prompt`, `completion`, `reward`: one answer a prompt with its gold reward."""
    return [
        {
            "prompt": as_user(prompt),
            "completion": as_assistant(answers[0]),
            "reward": world.reward(prompt, answers[0]),
        }
        for prompt, answers in _answered(prompts, texts)
    ]


def labelled(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """`prompt`, `completion`, `label`, unpaired and unbalanced: answers above the median gold reward are desirable, one
    in `RARE` of them is kept, and all others are; an answer stands by itself, whatever became of its prompt's others.
    """
    single = [(prompt, answer) for prompt, answers in _answered(prompts, texts) for answer in answers[:2]]
    rewards = [world.reward(prompt, answer) for prompt, answer in single]
    middle = float(np.median(rewards))
    rng = generator(seed, "labelled", world.id)
    rows = []
    for (prompt, answer), reward in zip(single, rewards, strict=True):
        if reward <= middle or rng.random() * RARE < 1:
            rows.append({"prompt": as_user(prompt), "completion": as_assistant(answer), "label": bool(reward > middle)})
    return rows


def sampled(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """Pairs with `samples`, the model's answers that are in no pair, and `baseline`, a demonstration."""
    rows = []
    for prompt, answers, row in _paired(world, prompts, texts, seed):
        left = [as_assistant(answer) for answer in answers if answer not in _answers_of(row)]
        if left:
            rng = generator(seed, "baseline", world.id, prompt)
            rows.append({**row, "samples": left, "baseline": as_assistant(world.demonstrate(prompt, rng))})
    return rows


def played(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """Pairs of self-play: `chosen` is a demonstration, `rejected` the model's own answer. Nobody compared them.

    The demonstrations are those of a better writer than the starting model learnt from, which they could not teach
    otherwise: it stands where their own distribution is.
    """
    rows = []
    writer = world.better_writer()
    for prompt, answers in _answered(prompts, texts):
        shown = writer.demonstrate(prompt, generator(seed, "played", world.id, prompt))
        if shown != answers[0]:
            rows.append(_pair(prompt, shown, answers[0]))
    return rows


def contrasted(world: World, prompts: Sequence[str], texts: Texts, seed: int) -> Rows:
    """Pairs with `contrasts`: the chosen answer fits its own prompt better than another of the same number of demands,
    and is preferred more after its own prompt than after one that the rejected answer fits as well or better.
    """
    rows = []
    for prompt, _, row in _paired(world, prompts, texts, seed):
        chosen, rejected = _answers_of(row)
        contrasts: list[dict[str, Any]] = []
        for other in world.near(prompt):
            fits = world.reward(prompt, chosen) - world.reward(other, chosen)
            gap = fits - world.reward(prompt, rejected) + world.reward(other, rejected)
            asked = {"better": as_user(prompt), "worse": as_user(other)}
            if round(fits, 9) > 0 and not any(one["kind"] == "intra" for one in contrasts):
                contrasts.append({"kind": "intra", **asked, "completion": as_assistant(chosen)})
            if round(gap, 9) > 0 and not any(one["kind"] == "inter" for one in contrasts):
                contrasts.append({"kind": "inter", **asked})
        rows.append({**row, "contrasts": contrasts})
    return rows


KINDS: dict[str, Callable[[World, Sequence[str], Texts, int], Rows]] = {
    "pairs": pairs,
    "voted": voted,
    "lists": lists,
    "shares": shares,
    "rewarded": rewarded,
    "labelled": labelled,
    "sampled": sampled,
    "played": played,
    "contrasted": contrasted,
}
"""Kind of feedback -> builder."""


def _answered(prompts: Sequence[str], texts: Texts) -> Iterator[tuple[str, list[str]]]:
    """Prompts with two answers or more that say something; an empty one is nothing to be trained to say."""
    for prompt, own in zip(prompts, texts, strict=True):
        answers = [text for text in own if text.strip()]
        if len(answers) >= 2:
            yield prompt, answers


def _paired(
    world: World, prompts: Sequence[str], texts: Texts, seed: int
) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(prompt, its answers, its pair) of prompts that give one."""
    made = {last_content(row["prompt"]): row for row in pairs(world, prompts, texts, seed)}
    for prompt, answers in _answered(prompts, texts):
        if prompt in made:
            yield prompt, answers, made[prompt]


def _pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": as_user(prompt), "chosen": as_assistant(chosen), "rejected": as_assistant(rejected)}


def _answers_of(row: dict[str, Any]) -> tuple[str, str]:
    return last_content(row["chosen"]), last_content(row["rejected"])
