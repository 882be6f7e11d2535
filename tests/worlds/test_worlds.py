"""Prompts, demonstrations, annotators, and the starting model's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.core.errors import ConfigError
from align.worlds.base import Preferred
from align.worlds.noisy import Noisy
from align.worlds.start import Start, starting_model, tokenizer
from align.worlds.style import Style, gold_reward

GOOD, BAD, LONG = "the fox is dear .", "the fox is silly .", "today the fox is silly and zany . the fox is zany ."
PROMPT = "write a warm note about the fox"


def test_prompts_are_distinct_and_held_out_ones_are_never_trained_on() -> None:
    world = Style()
    train = {prompt for seed in range(3) for prompt in world.prompts(3000, "train", seed)}
    held_out = {prompt for seed in range(3) for prompt in world.prompts(500, "held_out", seed)}
    assert len(world.prompts(3000, "train", 1)) == len(set(world.prompts(3000, "train", 1))) == 3000
    assert not train & held_out
    assert world.prompts(50, "train", 1) == world.prompts(3000, "train", 1)[:50]
    assert world.prompts(50, "train", 1) != world.prompts(50, "train", 2)
    assert {prompt.count("the ") for prompt in train} == {2, 3, 4}
    used = {word for prompt in train | held_out for word in prompt.split()}
    assert used <= set(world.vocabulary())


def test_more_prompts_than_there_are_is_an_error() -> None:
    small = Style(least_nouns=1, most_nouns=1)  # 160 prompts in all
    with pytest.raises(ConfigError, match="fewer than 500 distinct prompts"):
        small.prompts(500)
    assert len(small.prompts(100)) == 100


def test_nouns_out_of_order_are_an_error() -> None:
    with pytest.raises(ConfigError, match="least_nouns"):
        Style(least_nouns=4, most_nouns=2)


def test_demonstrations_are_uneven_and_in_the_vocabulary() -> None:
    world = Style()
    rows = world.demonstrations(1000, seed=1)
    assert rows == world.demonstrations(1000, seed=1) != world.demonstrations(1000, seed=2)
    rewards = gold_reward([row["prompt"] for row in rows], [row["completion"] for row in rows])
    mean = sum(rewards) / len(rewards)
    assert 0.25 < mean < 0.6
    assert sum(reward > 0.9 for reward in rewards) > 20 and sum(reward < 0 for reward in rewards) > 20
    words = {word for row in rows for word in row["completion"][0]["content"].split()}
    assert words <= set(world.vocabulary())
    better = Style(right_tone=1.0).demonstrations(1000, seed=1)
    assert sum(gold_reward([r["prompt"] for r in better], [r["completion"] for r in better])) > sum(rewards) + 100


def test_pairs_follow_the_gold_reward_whatever_the_order() -> None:
    world = Style()
    prompts = [PROMPT] * 4
    rows, counts = world.pairs(prompts, [[BAD, GOOD, ""], [GOOD, BAD, LONG], [GOOD, GOOD], ["", GOOD]], seed=0)
    assert counts == {"pairs": 2, "ties": 1, "flipped": 0, "empty": 1}
    assert [row["chosen"][0]["content"] for row in rows] == [GOOD, GOOD]
    assert [row["rejected"][0]["content"] for row in rows] == [BAD, LONG]
    assert rows[0]["prompt"] == [{"role": "user", "content": PROMPT}]


def test_annotators_of_the_noisy_world() -> None:
    careful = Noisy(careful=1, hasty=0, lengthy=0)
    lengthy = Noisy(careful=0, hasty=0, lengthy=1)
    hasty = Noisy(careful=0, hasty=1, lengthy=0, flip=0.3)
    assert careful.compare(PROMPT, GOOD, LONG, 0, 0) == Preferred(True, "careful-0")
    assert lengthy.compare(PROMPT, GOOD, LONG, 0, 0) == Preferred(False, "lengthy-0", flipped=True)
    assert lengthy.compare(PROMPT, GOOD, BAD, 0, 0).first is None
    said = [hasty.compare(PROMPT, GOOD, BAD, 0, row) for row in range(4000)]
    share = sum(one.flipped for one in said) / len(said)
    assert abs(share - 0.3) < 0.03
    assert all(one.first is not one.flipped for one in said)
    assert said == [hasty.compare(PROMPT, GOOD, BAD, 0, row) for row in range(4000)]
    mixed = Noisy()
    groups = [mixed.compare(PROMPT, GOOD, LONG, 0, row).annotator.split("-")[0] for row in range(2000)]
    assert abs(groups.count("lengthy") / 2000 - 0.2) < 0.04 and abs(groups.count("careful") / 2000 - 0.4) < 0.05
    rows, counts = mixed.pairs([PROMPT] * 500, [[GOOD, LONG]] * 500, seed=1)
    wrong = sum(row["chosen"][0]["content"] == LONG for row in rows)
    assert wrong == counts["flipped"] and abs(wrong / 500 - (0.2 + 0.4 * 0.3)) < 0.07


def test_the_tokenizer_gives_texts_back() -> None:
    world = Style()
    words = tokenizer(world)
    for row in world.demonstrations(50):
        text = row["completion"][0]["content"]
        assert words.decode(words(text, add_special_tokens=False)["input_ids"]) == text
    assert len(words) < 200


def test_a_starting_model_is_cached_by_content_and_made_anew_where_damaged(tmp_path: Path) -> None:
    world, start = Style(), Start(demonstrations=64, epochs=1, batch=32, layers=1, width=32)
    first = starting_model(world, start, tmp_path)
    weights = (first / "model.safetensors").read_bytes()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert starting_model(world, start, tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    other = starting_model(world, Start(demonstrations=64, epochs=1, batch=32, layers=1, width=32, seed=1), tmp_path)
    assert other != first and (other / "model.safetensors").read_bytes() != weights
    assert starting_model(Style(right_tone=0.9), start, tmp_path) not in (first, other)
    (first / "model.safetensors").write_bytes(weights[:100])
    assert starting_model(world, start, tmp_path) == first
    assert (first / "model.safetensors").read_bytes() == weights
    assert not list(tmp_path.glob(".making-*"))
