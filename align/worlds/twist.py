"""World `twist`: short moves whose preferences go round; no reward explains them, and the best play is a mixture.

A prompt sets a scene: `the fox meets the baker by the bridge , make a move`. A well-formed answer is

    VERB the ADJECTIVE THING .

with nothing before or after, and its thing belongs to one of four classes: R stones, P sheets, S blades, X straws. What
else an answer says does not matter. P(first is preferred to second), by class:

           R     P     S     X
    R     .5    .3    .9    .95
    P     .7    .5    .4    .55
    S     .1    .6    .5    .55
    X     .05   .45   .45   .5

Paper beats rock, rock beats scissors, scissors beat paper, with unequal chances, and X loses to all three. The Nash
equilibrium is (1/7, 4/7, 2/7, 0) and unique (`align.evaluate.games.twist`), while Bradley-Terry ratings of even play
put R first, which P beats. An answer that is not well-formed counts as X: it is never worth saying, and the game stays
one of four classes. People demonstrate the four classes evenly, so a model that starts here plays all of them alike,
and with it as the reference the shares of the regularised equilibrium are those of the game of four actions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.core.options import option
from align.core.seeds import generator
from align.worlds.base import Preferred, World, last_content, world
from align.worlds.style import NOUNS

ACTIONS = ("R", "P", "S", "X")
PREFERENCES = ((0.5, 0.3, 0.9, 0.95), (0.7, 0.5, 0.4, 0.55), (0.1, 0.6, 0.5, 0.55), (0.05, 0.45, 0.45, 0.5))
"""P(row is preferred to column)."""
EQUILIBRIUM = (1 / 7, 4 / 7, 2 / 7, 0.0)
THINGS = {
    "R": ("stone", "rock", "pebble", "boulder"),
    "P": ("paper", "sheet", "page", "scroll"),
    "S": ("blade", "knife", "shears", "razor"),
    "X": ("straw", "feather", "thread", "crumb"),
}
VERBS = ("throw", "show", "play", "raise")
ADJECTIVES = ("small", "plain", "old", "bright", "smooth", "heavy")

_CLASS_OF = {thing: action for action, things in THINGS.items() for thing in things}
_MOVE = re.compile(rf"(?:{'|'.join(VERBS)}) the (?:{'|'.join(ADJECTIVES)}) ({'|'.join(_CLASS_OF)}) \.")


@world("twist")
@dataclass(frozen=True, kw_only=True)
class Twist(World):
    """Moves of four classes that beat each other in a circle; annotators say who won, by chance."""

    skill: float = option(0.0, at_least=0, at_most=1, doc="chance that a demonstration plays the equilibrium's mixture")

    actions = ACTIONS

    @property
    def preferences(self) -> np.ndarray:
        """P(row is preferred to column), float64 [4, 4], in the order of `actions`."""
        return np.array(PREFERENCES)

    def draw_prompt(self, rng: np.random.Generator) -> str:
        player, other, place = rng.choice(NOUNS, 3, replace=False)
        return f"the {player} meets the {other} by the {place} , make a move"

    def demonstrate(self, prompt: str, rng: np.random.Generator) -> str:
        mixture = EQUILIBRIUM if rng.random() < self.skill else None
        action = str(rng.choice(ACTIONS, p=mixture))
        return f"{rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {rng.choice(THINGS[action])} ."

    def better_writer(self) -> World:
        """People who play the equilibrium's mixture."""
        return replace(self, skill=1.0)

    def well_formed(self, completion: str) -> bool:
        return _MOVE.fullmatch(" ".join(completion.split())) is not None

    def classify(self, completion: str) -> str:
        """The class of an answer, one of `actions`; X for one that is not well-formed."""
        found = _MOVE.fullmatch(" ".join(completion.split()))
        return "X" if found is None else _CLASS_OF[found.group(1)]

    def win_probability(self, prompt: str, first: str, second: str) -> float:
        """P of the two classes; 1/2 within one."""
        return PREFERENCES[ACTIONS.index(self.classify(first))][ACTIONS.index(self.classify(second))]

    def reward(self, prompt: str, completion: str) -> float:
        """How often the answer is preferred to one of a class drawn evenly.

        No reward represents this world: this one orders R, P, S, X, and P is preferred to R, S to P. It is in the
        order of what a reward model learns from even play, and a policy that follows it is beaten by P.
        """
        return float(np.mean(PREFERENCES[ACTIONS.index(self.classify(completion))]))

    def compare(self, prompt: str, first: str, second: str, seed: int, row: int) -> Preferred:
        """One annotator, who prefers the first with its win probability; never a tie.

        `flipped` is an answer that is preferred less often than not and won all the same.
        """
        chance = self.win_probability(prompt, first, second)
        won = bool(generator(seed, "annotator", self.id, row).random() < chance)
        return Preferred(won, "crowd", chance != 0.5 and won != (chance > 0.5))

    def furthest(self, prompt: str, texts: Sequence[str]) -> tuple[str, str]:
        """The first two: no reward says which are furthest apart, and a choice would not be draws of the policy."""
        return texts[0], texts[1]

    def vocabulary(self) -> tuple[str, ...]:
        words = ("the", "meets", "by", ",", "make", "a", "move", ".")
        return (*words, *NOUNS, *VERBS, *ADJECTIVES, *_CLASS_OF)


def gold_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """`Twist.reward` as a reward function, with TRL's signature; prompts and completions are texts or messages."""
    judge = Twist()
    return [
        judge.reward(last_content(prompt), last_content(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def gold_preference(prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], **columns: Any) -> list[float]:
    """P(first is preferred to second) of each row; prompts and completions are texts or messages."""
    judge = Twist()
    return [
        judge.win_probability(last_content(prompt), last_content(one), last_content(other))
        for prompt, one, other in zip(prompts, first, second, strict=True)
    ]
