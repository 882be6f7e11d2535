"""The gold reward against a second implementation, written from the docstring alone, on a thousand random texts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from align.core.errors import DataError
from align.worlds import WORLDS
from align.worlds.noisy import gold_reward as noisy_reward
from align.worlds.style import NOUNS, OPENERS, TONES, VERBS, Style, gold_reward

TEXTS = 1000


def by_hand(prompt: str, text: str) -> float:
    """No regular expressions: word by word, with a small automaton."""
    words = prompt.split(" ")
    tone = words[2]
    nouns = [words[place + 1] for place in range(len(words) - 1) if words[place] == "the"]
    sentences: list[list[str]] = [[]]
    for word in text.split():
        sentences[-1].append(word)
        if word == ".":
            sentences.append([])
    if not sentences[-1] and len(sentences) > 1:
        sentences.pop()
    credit = {noun: [0.0] for noun in nouns}
    bad = 0
    for sentence in sentences:
        parsed = parse(sentence)
        if parsed is None:
            bad += 1
        elif parsed[0] in credit:
            hits = [adjective in TONES[tone] for adjective in parsed[1]]
            credit[parsed[0]].append(0.3 + 0.7 * hits.count(True) / len(hits))
    quality = sum(max(values) for values in credit.values()) / len(nouns)
    relative = len(text.split()) / (5 * len(nouns))
    return quality - 0.4 * max(0, relative - 1) - 0.5 * bad / len(sentences)


def parse(sentence: list[str]) -> tuple[str, list[str]] | None:
    rest = list(sentence)
    adjectives = {word for words in TONES.values() for word in words}
    if rest and rest[0] in OPENERS:
        rest.pop(0)
    if len(rest) not in (5, 7) or rest[0] != "the" or rest[-1] != ".":
        return None
    said = [rest[3]] if len(rest) == 5 else [rest[3], rest[5]]
    if len(rest) == 7 and rest[4] != "and":
        return None
    if rest[1] not in NOUNS or rest[2] not in VERBS or not set(said) <= adjectives:
        return None
    return rest[1], said


def random_text(world: Style, prompt: str, rng: random.Random) -> str:
    """A demonstration, or one that was damaged, or words at random, or nothing."""
    kind = rng.random()
    text = world.demonstrate(prompt, np.random.default_rng(rng.randrange(2**32))).split()
    if kind < 0.3:
        return " ".join(text)
    if kind < 0.35:
        return rng.choice(["", " ", ".", ". .", "the fox"])
    vocabulary = world.vocabulary()
    if kind < 0.5:
        return " ".join(rng.choice(vocabulary) for _ in range(rng.randrange(30)))
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        change = rng.randrange(4)
        if change == 0:
            text.insert(place, rng.choice(vocabulary))
        elif change == 1:
            text = text[:place] + text[place + 1 :]
        elif change == 2:
            text = text * 2
        else:
            text = text[:place]
    return " ".join(text)


def test_the_gold_reward_is_what_its_docstring_says() -> None:
    world, rng = Style(most_nouns=5), random.Random(0)
    prompts = world.prompts(TEXTS, seed=3)
    texts = [random_text(world, prompt, rng) for prompt in prompts]
    theirs = [by_hand(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    ours = gold_reward(prompts, texts)
    assert np.allclose(ours, theirs, atol=1e-12)
    assert len(set(np.round(theirs, 6))) > 200 and min(theirs) < 0 < 0.95 < max(theirs) <= 1
    assert noisy_reward(prompts, texts) == ours


def test_reward_reads_messages_as_it_reads_text() -> None:
    prompt, text = "write a warm note about the fox and the lamp", "the fox is dear . the lamp is kind ."
    messages = gold_reward([[{"role": "user", "content": prompt}]], [[{"role": "assistant", "content": text}]])
    assert messages == gold_reward([prompt], [text]) == [pytest.approx(1.0)]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("the fox is dear . the lamp is kind .", "the fox is dear . the lamp is silly ."),
        ("the fox is dear . the lamp is silly .", "the fox is dear ."),
        ("the fox is dear . the lamp is kind .", "the fox is dear . the lamp is kind . the lamp is kind ."),
        ("the fox is dear . the lamp is kind .", "today the fox is dear . the lamp is kind ."),
        ("the fox is dear . the lamp is kind .", "the fox is dear and sweet . the lamp is kind ."),
        ("the fox is dear . the lamp is kind .", "the fox is dear . the lamp is kind"),
        ("the fox is dear .", "the river is dear ."),
        ("the fox is dear . the lamp is kind .", "the fox is dear . the lamp kind is ."),
    ],
)
def test_quality_is_traded_against_length_and_form(better: str, worse: str) -> None:
    prompt = "write a warm note about the fox and the lamp"
    first, second = gold_reward([prompt, prompt], [better, worse])
    assert first > second


def test_a_foreign_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="no prompt of the world"):
        gold_reward(["tell me a story"], ["once upon a time"])


def test_worlds_are_registered() -> None:
    assert set(WORLDS.entries()) == {"style", "noisy", "flipped", "length_biased", "twist"}
    assert WORLDS.entries()["noisy"].options["flip"] == 0.3
