"""What a world gives: prompts, demonstrations, a gold reward, and annotators who compare two completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from align.core.errors import ConfigError
from align.core.hashing import digest
from align.core.options import check_all
from align.core.registry import WORLDS
from align.core.seeds import derive, generator

Split = Literal["train", "held_out"]
W = TypeVar("W", bound="type[World]")

__all__ = ["WORLDS", "Preferred", "World", "as_assistant", "as_user", "last_content", "world"]
_HELD_OUT_SHARE = 10
"""One distinct prompt in so many is held out, whatever the seed."""
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Preferred:
    """What an annotator says of two completions.

    Attributes:
        first: whether the first one won; None for a tie.
        annotator: who said so.
        flipped: whether it is not what the gold reward says.
    """

    first: bool | None
    annotator: str = ""
    flipped: bool = False


def world(id_: str) -> Callable[[W], W]:
    """Register a class of this package under an id."""

    def mark(cls: W) -> W:
        cls.id = id_
        return cls

    return mark


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """A task whose reward is known. All text is of words with one space between; a prompt is one user turn."""

    id: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_all(self, f"world `{self.id}`")

    @abstractmethod
    def draw_prompt(self, rng: np.random.Generator) -> str:
        """A prompt at random."""

    @abstractmethod
    def demonstrate(self, prompt: str, rng: np.random.Generator) -> str:
        """What one of the people who wrote the demonstrations answers: not all of them write well."""

    @abstractmethod
    def reward(self, prompt: str, completion: str) -> float:
        """The gold reward of a completion; at most 1."""

    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """All words of prompts and answers, each once."""

    def better_writer(self) -> World:
        """The same world with demonstrations that are worth imitating; itself where they are already."""
        return self

    def near(self, prompt: str) -> list[str]:
        """Prompts that make as many demands as this one and differ in one of them; none unless a world says so."""
        return []

    @property
    def reward_name(self) -> str:
        """The gold reward as a reward function, in the form that recipes and `align evaluate` take."""
        return f"{type(self).__module__}:gold_reward"

    @property
    def preference_name(self) -> str:
        """P(first is preferred) as a function of lists of prompts, first and second completions, in that form."""
        return f"{type(self).__module__}:gold_preference"

    def win_probability(self, prompt: str, first: str, second: str) -> float:
        """P(first is preferred to second). Here: 1 or 0 as the gold reward says, 1/2 for a tie."""
        order = _order(self.reward(prompt, first), self.reward(prompt, second))
        return 0.5 if order is None else float(order)

    def compare(self, prompt: str, first: str, second: str, seed: int, row: int) -> Preferred:
        """What the annotator of row `row` prefers. Here: what the gold reward says, always."""
        return Preferred(_order(self.reward(prompt, first), self.reward(prompt, second)), "gold")

    def speaks(self) -> World:
        """The world whose starting model this one shares: itself, unless it differs from another in annotators only."""
        return self

    def prompts(self, count: int, split: Split = "train", seed: int = 0) -> list[str]:
        """`count` distinct prompts; those of `held_out` are in no training split, under any seed.

        Raises:
            ConfigError: so many distinct ones are not found.
        """
        found: dict[str, None] = {}
        for prompt in self._drawn(split, seed):
            found[prompt] = None
            if len(found) >= count:
                return list(found)
        raise ConfigError(
            f"world `{self.id}` has fewer than {count} distinct prompts here",
            why=f"{_TRIES} draws in a row gave none that is new, after {len(found)}",
            mend="ask for fewer",
        )

    def _drawn(self, split: Split, seed: int) -> Iterator[str]:
        """New prompts of a split; ends after many draws without one."""
        rng = generator(seed, "prompts", self.id, split)
        seen: set[str] = set()
        misses = 0
        while misses < _TRIES:
            prompt = self.draw_prompt(rng)
            held_out = derive(0, "split", prompt) % _HELD_OUT_SHARE == 0
            if prompt in seen or held_out != (split == "held_out"):
                misses += 1
                continue
            misses = 0
            seen.add(prompt)
            yield prompt

    def demonstrations(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """`count` rows `prompt`, `completion` in TRL's conversational form, each with its own training prompt."""
        prompts = self.prompts(count, "train", seed)
        return [
            {"prompt": as_user(prompt), "completion": as_assistant(self.demonstrate(prompt, rng))}
            for row, prompt in enumerate(prompts)
            for rng in (generator(seed, "demonstration", self.id, row),)
        ]

    def pairs(
        self, prompts: Sequence[str], completions: Sequence[Sequence[str]], seed: int = 0
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Rows `prompt`, `chosen`, `rejected`, `annotator` from two or more completions of each prompt.

        The two completions furthest apart in gold reward are shown to the annotator, the earlier one first; where the
        annotator sees a tie, or all completions are the same text, the prompt gives no row. An empty completion is not
        shown: it is nothing that a model could be trained to say.

        Returns:
            The rows, and counts: `pairs`, `ties`, `flipped`, and `empty` of prompts with fewer than two answers.
        """
        rows: list[dict[str, Any]] = []
        counts = {"pairs": 0, "ties": 0, "flipped": 0, "empty": 0}
        for row, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
            answers = [text for text in texts if text.strip()]
            if len(answers) < 2:
                counts["empty"] += 1
                continue
            first, second = self.furthest(prompt, answers)
            said = self.compare(prompt, first, second, seed, row)
            if said.first is None or first == second:
                counts["ties"] += 1
                continue
            counts["pairs"] += 1
            counts["flipped"] += said.flipped
            chosen, rejected = (first, second) if said.first else (second, first)
            rows.append(
                {
                    "prompt": as_user(prompt),
                    "chosen": as_assistant(chosen),
                    "rejected": as_assistant(rejected),
                    "annotator": said.annotator,
                }
            )
        return rows, counts

    def furthest(self, prompt: str, texts: Sequence[str]) -> tuple[str, str]:
        """The best and the worst of several completions, in the order in which they were given."""
        rewards = [self.reward(prompt, text) for text in texts]
        first, second = sorted((int(np.argmax(rewards)), int(np.argmin(rewards))))
        return texts[first], texts[second]

    def fingerprint(self) -> str:
        """Of the world, its options and everything it can say."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        said = [(row["prompt"], row["completion"]) for row in self.demonstrations(20, seed=12345)]
        return digest([self.id, options, list(self.vocabulary()), said])


def as_user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def as_assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def last_content(turns: Any) -> str:
    """The text of a prompt or completion, plain or as messages: that of the last message."""
    return turns if isinstance(turns, str) else str(turns[-1]["content"])


def _order(first: float, second: float) -> bool | None:
    return None if first == second else first > second
