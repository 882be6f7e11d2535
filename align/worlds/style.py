"""World `style`: short notes about named things, in an asked tone; reward for tone, against length and broken grammar.

A prompt asks for a note: `write a warm note about the fox , the lamp and the river`. A well-formed sentence is

    [opener] the NOUN VERB ADJECTIVE [and ADJECTIVE] .

and every adjective belongs to one tone. With k asked nouns the gold reward of an answer is

    quality - LENGTH_COST * max(0, words / (WORDS * k) - 1) - FORM_COST * share of sentences that are not well-formed

where quality is the mean over asked nouns of MENTION (some well-formed sentence is about it) plus 1 - MENTION times
the share of asked-tone adjectives in the best of these sentences. Words count the full stop. Text after the last full
stop is one more sentence, not well-formed; an empty answer is one too. So more sentences cover more, and cost length;
openers and second adjectives are never worth it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.core.errors import ConfigError, DataError
from align.core.options import option
from align.core.seeds import generator
from align.worlds.base import Preferred, World, last_content, world

TONES = {
    "warm": ("dear", "kind", "gentle", "sunny", "tender", "cosy", "loving", "sweet"),
    "formal": ("proper", "exact", "orderly", "official", "precise", "correct", "regular", "measured"),
    "playful": ("bouncy", "silly", "cheeky", "giddy", "wobbly", "merry", "zany", "jolly"),
    "gloomy": ("grey", "dim", "weary", "hollow", "bleak", "sombre", "faded", "lonely"),
}
# fmt: off
NOUNS = (
    "fox", "lamp", "river", "bridge", "garden", "clock", "teacher", "robot", "letter", "window", "kettle", "boat",
    "mountain", "baker", "piano", "tower", "candle", "horse", "market", "pencil", "island", "engine", "blanket",
    "doctor", "forest", "violin", "ladder", "sailor", "museum", "pocket", "carpet", "winter", "station", "painter",
    "bottle", "village", "compass", "orchard", "curtain", "harbour",
)
# fmt: on
VERBS = ("is", "seems", "looks", "feels", "stays", "sounds")
OPENERS = ("today", "often", "perhaps", "indeed")
MENTION, LENGTH_COST, FORM_COST, WORDS = 0.3, 0.4, 0.5, 5

_TONE_OF = {word: tone for tone, words in TONES.items() for word in words}
_SENTENCE = re.compile(
    rf"(?:(?:{'|'.join(OPENERS)}) )?the ({'|'.join(NOUNS)}) (?:{'|'.join(VERBS)}) "
    rf"({'|'.join(_TONE_OF)})(?: and ({'|'.join(_TONE_OF)}))? \."
)
_PROMPT = re.compile(r"write a (\w+) note about (.+)")


@world("style")
@dataclass(frozen=True, kw_only=True)
class Style(World):
    """Short notes about named things in an asked tone; the people who demonstrate it write unevenly."""

    least_nouns: int = option(2, at_least=1, at_most=8, doc="nouns a prompt names, at least")
    most_nouns: int = option(4, at_least=1, at_most=8, doc="nouns a prompt names, at most")
    right_tone: float = option(0.5, at_least=0, at_most=1, doc="chance that a demonstrated sentence has the asked tone")
    careful: int = option(0, at_least=0, doc="annotators who follow the gold reward")
    hasty: int = option(0, at_least=0, doc="annotators who say the opposite with chance `flip`")
    lengthy: int = option(0, at_least=0, doc="annotators who prefer the answer of more words")
    flip: float = option(0.3, at_least=0, below=1, doc="chance that a hasty annotator says the opposite")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least_nouns > self.most_nouns:
            raise ConfigError(
                f"`least_nouns` is {self.least_nouns}, `most_nouns` {self.most_nouns}", mend="the least comes first"
            )

    def draw_prompt(self, rng: np.random.Generator) -> str:
        count = int(rng.integers(self.least_nouns, self.most_nouns + 1))
        nouns = [f"the {noun}" for noun in rng.choice(NOUNS, count, replace=False)]
        named = nouns[0] if count == 1 else f"{' , '.join(nouns[:-1])} and {nouns[-1]}"
        return f"write a {rng.choice(list(TONES))} note about {named}"

    def demonstrate(self, prompt: str, rng: np.random.Generator) -> str:
        tone, nouns = asked(prompt)
        said = [noun for noun in nouns if rng.random() < 0.85] or nouns[:1]
        if rng.random() < 0.4:
            said.append(str(rng.choice(NOUNS if rng.random() < 0.5 else nouns)))
        return " ".join(_broken(self._sentence(noun, tone, rng), rng) for noun in said)

    def _sentence(self, noun: str, tone: str, rng: np.random.Generator) -> list[str]:
        kept = tone if rng.random() < self.right_tone else str(rng.choice(list(TONES)))
        words = [str(rng.choice(OPENERS))] if rng.random() < 0.25 else []
        words += ["the", noun, str(rng.choice(VERBS)), str(rng.choice(TONES[kept]))]
        if rng.random() < 0.25:
            words += ["and", str(rng.choice(TONES[kept]))]
        return [*words, "."]

    def better_writer(self) -> World:
        """People who keep the asked tone nineteen times in twenty."""
        return replace(self, right_tone=max(self.right_tone, 0.95))

    def near(self, prompt: str) -> list[str]:
        """The same note in each other tone."""
        tone, _ = asked(prompt)
        return [prompt.replace(f" {tone} ", f" {other} ", 1) for other in TONES if other != tone]

    def reward(self, prompt: str, completion: str) -> float:
        tone, nouns = asked(prompt)
        best = dict.fromkeys(nouns, 0.0)
        sentences = split(completion)
        broken = 0
        for sentence in sentences:
            found = _SENTENCE.fullmatch(sentence)
            if found is None:
                broken += 1
                continue
            noun, *adjectives = (word for word in found.groups() if word)
            if noun in best:
                right = sum(_TONE_OF[word] == tone for word in adjectives) / len(adjectives)
                best[noun] = max(best[noun], MENTION + (1 - MENTION) * right)
        quality = sum(best.values()) / len(nouns)
        excess = max(0.0, len(completion.split()) / (WORDS * len(nouns)) - 1)
        return quality - LENGTH_COST * excess - FORM_COST * broken / len(sentences)

    def compare(self, prompt: str, first: str, second: str, seed: int, row: int) -> Preferred:
        """What one of the annotators says; without any, the gold reward itself."""
        gold = super().compare(prompt, first, second, seed, row)
        groups = ("careful",) * self.careful + ("hasty",) * self.hasty + ("lengthy",) * self.lengthy
        if not groups:
            return gold
        rng = generator(seed, "annotator", self.id, row)
        truth = gold.first
        number = int(rng.integers(len(groups)))
        annotator = f"{groups[number]}-{number}"
        said = truth
        if groups[number] == "lengthy":
            more = len(first.split()) - len(second.split())
            said = None if more == 0 else more > 0
        elif groups[number] == "hasty" and truth is not None and rng.random() < self.flip:
            said = not truth
        return Preferred(said, annotator, said is not None and truth is not None and said != truth)

    def speaks(self) -> World:
        """Annotators demonstrate nothing: whoever they are, the starting model is that of the same style."""
        return Style(least_nouns=self.least_nouns, most_nouns=self.most_nouns, right_tone=self.right_tone)

    def vocabulary(self) -> tuple[str, ...]:
        words = ("write", "a", "note", "about", "the", "and", ",", ".")
        return (*words, *TONES, *NOUNS, *VERBS, *OPENERS, *_TONE_OF)


def gold_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The gold reward as a reward function, with TRL's signature; prompts and completions are texts or messages."""
    judge = Style()
    return [
        judge.reward(last_content(prompt), last_content(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def gold_preference(prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the first has the higher gold reward, 0 where the second has, 1/2 for a tie; texts or messages."""
    judge = Style()
    return [
        judge.win_probability(last_content(prompt), last_content(one), last_content(other))
        for prompt, one, other in zip(prompts, first, second, strict=True)
    ]


def asked(prompt: str) -> tuple[str, list[str]]:
    """The tone and the nouns that a prompt asks for.

    Raises:
        DataError: it is no prompt of this world.
    """
    found = _PROMPT.fullmatch(" ".join(prompt.split()))
    nouns = [word for word in found.group(2).split() if word in NOUNS] if found else []
    if found is None or found.group(1) not in TONES or not nouns:
        raise DataError(
            f"`{prompt[:80]}` is no prompt of the world `style`",
            mend="its prompts read: write a warm note about the fox , the lamp and the river",
        )
    return found.group(1), nouns


def split(completion: str) -> list[str]:
    """Sentences with their full stops; what follows the last one is a sentence too, and so is an empty answer."""
    words = completion.split()
    sentences, start = [], 0
    for place, word in enumerate(words):
        if word == ".":
            sentences.append(" ".join(words[start : place + 1]))
            start = place + 1
    if start < len(words) or not words:
        sentences.append(" ".join(words[start:]))
    return sentences


def _broken(words: list[str], rng: np.random.Generator) -> str:
    """One sentence in ten loses a word, says one twice, or swaps two."""
    if rng.random() < 0.1:
        place = int(rng.integers(len(words) - 1))
        kind = int(rng.integers(3))
        if kind == 0:
            words = words[:place] + words[place + 1 :]
        elif kind == 1:
            words = words[: place + 1] + words[place:]
        else:
            words = [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
    return " ".join(words)
