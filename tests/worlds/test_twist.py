"""The world of moves that go round: classes, preferences, labels, and how a policy's gap on it is measured."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.evaluate import games
from align.evaluate.exploitability import cyclic_fraction_between, exploitability, gap_of
from align.worlds import WORLDS, rows
from align.worlds.base import last_content
from align.worlds.noisy import gold_preference as noisy_preference
from align.worlds.start import Start, starting_model, tokenizer
from align.worlds.style import Style
from align.worlds.style import gold_preference as style_preference
from align.worlds.twist import ACTIONS, EQUILIBRIUM, THINGS, Twist, gold_preference, gold_reward

WORLD = Twist()
PROMPT = "the fox meets the baker by the bridge , make a move"
SAID = {action: f"throw the old {things[1]} ." for action, things in THINGS.items()}


def said(shares: np.ndarray, count: int, seed: int) -> list[list[str]]:
    """Answers drawn with these shares of classes, one to a prompt."""
    return [[SAID[action]] for action in np.random.default_rng(seed).choice(ACTIONS, count, p=shares)]


def test_every_thing_is_in_one_class_and_what_is_not_well_formed_is_a_decoy() -> None:
    for action, things in THINGS.items():
        for thing in things:
            assert WORLD.classify(f"raise the heavy {thing} .") == action
    broken = (
        "",
        "throw the old rock",
        "the old rock .",
        "throw the old rock . .",
        "throw old rock .",
        "rock",
        "throw a old rock .",
    )
    for text in broken:
        assert WORLD.classify(text) == "X" and not WORLD.well_formed(text)
    assert WORLD.well_formed(SAID["R"]) and WORLD.classify(" throw  the old rock .\n") == "R"
    assert len({word for things in THINGS.values() for word in things}) == 16


def test_preferences_go_round_and_no_reward_orders_them() -> None:
    wins = {(a, b): WORLD.win_probability(PROMPT, SAID[a], SAID[b]) for a in ACTIONS for b in ACTIONS}
    assert wins["P", "R"] == 0.7 and wins["R", "S"] == 0.9 and wins["S", "P"] == 0.6 and wins["R", "X"] == 0.95
    assert all(wins[a, b] + wins[b, a] == pytest.approx(1) for a, b in wins)
    assert WORLD.win_probability(PROMPT, SAID["R"], "show the plain boulder .") == 0.5
    assert WORLD.win_probability(PROMPT, SAID["S"], "no move at all") == 0.55
    rewards = [WORLD.reward(PROMPT, SAID[action]) for action in ACTIONS]
    assert rewards == sorted(rewards, reverse=True) and rewards[0] == pytest.approx(2.65 / 4)
    assert np.argsort(games.bradley_terry(WORLD.preferences)).tolist() == np.argsort(rewards).tolist()
    assert games.cyclic_fraction(WORLD.preferences) > 0.5
    assert np.allclose(games.nash(WORLD.preferences), EQUILIBRIUM)


def test_functions_that_recipes_name() -> None:
    for world, function in ((WORLD, gold_preference), (Style(), style_preference)):
        module, _, name = world.preference_name.partition(":")
        assert (module, name) == (
            function.__module__,
            "gold_preference",
        ) and world.reward_name == f"{module}:gold_reward"
    texts = [SAID["R"], SAID["P"]]
    assert gold_preference([PROMPT] * 2, texts, texts[::-1]) == [0.3, 0.7]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    asked = [[{"role": "user", "content": PROMPT}]] * 2
    assert gold_preference(asked, turns, turns[::-1], extra=[1, 2]) == [0.3, 0.7]
    assert gold_reward(asked, turns) == [WORLD.reward(PROMPT, text) for text in texts]
    note, good, bad = "write a warm note about the fox", "the fox is dear .", "the fox is silly ."
    for preference in (style_preference, noisy_preference):
        assert preference([note] * 3, [good, bad, good], [bad, good, good]) == [1.0, 0.0, 0.5]


def test_labels_are_drawn_from_the_preferences() -> None:
    for first, second in (("P", "R"), ("S", "R"), ("R", "R")):
        chance = WORLD.win_probability(PROMPT, SAID[first], SAID[second])
        drawn = [WORLD.compare(PROMPT, SAID[first], SAID[second], 0, row) for row in range(4000)]
        share = sum(bool(one.first) for one in drawn) / 4000
        assert share == pytest.approx(chance, abs=0.025)
        assert sum(one.flipped for one in drawn) / 4000 == pytest.approx(
            min(chance, 1 - chance) * (chance != 0.5), abs=0.025
        )
    assert drawn == [WORLD.compare(PROMPT, SAID["R"], SAID["R"], 0, row) for row in range(4000)]
    assert drawn != [WORLD.compare(PROMPT, SAID["R"], SAID["R"], 1, row) for row in range(4000)]


def test_pairs_are_of_the_first_two_answers() -> None:
    texts = [[SAID["S"], SAID["P"], SAID["R"], SAID["X"]]] * 3000
    made, counts = WORLD.pairs([PROMPT] * 3000, texts, seed=3)
    assert counts["pairs"] == 3000 and counts["ties"] == 0
    won = Counter(WORLD.classify(last_content(row["chosen"])) for row in made)
    assert set(won) == {"S", "P"} and won["S"] / 3000 == pytest.approx(0.6, abs=0.03)
    assert counts["flipped"] == won["P"]
    voted = rows.voted(WORLD, [PROMPT], texts[:1], seed=0)
    assert 0.5 < voted[0]["probability"] <= 1


def test_demonstrations_are_even_well_formed_and_within_the_vocabulary() -> None:
    prompts = WORLD.prompts(2000)
    assert len(set(prompts)) == 2000 and not set(prompts) & set(WORLD.prompts(500, "held_out"))
    shown = [last_content(row["completion"]) for row in WORLD.demonstrations(4000, seed=1)]
    assert all(WORLD.well_formed(text) and len(text.split()) == 5 for text in shown)
    shares = Counter(map(WORLD.classify, shown))
    assert all(shares[action] / 4000 == pytest.approx(0.25, abs=0.03) for action in ACTIONS)
    better = WORLD.better_writer()
    played = Counter(WORLD.classify(better.demonstrate(PROMPT, np.random.default_rng(row))) for row in range(4000))
    assert played["X"] == 0 and played["P"] / 4000 == pytest.approx(4 / 7, abs=0.03)
    used = {word for text in (*prompts, *shown) for word in text.split()}
    assert used <= set(WORLD.vocabulary()) and len(set(WORLD.vocabulary())) == len(WORLD.vocabulary()) < 90
    words = tokenizer(WORLD)
    assert words.decode(words(shown[0], add_special_tokens=False)["input_ids"]) == shown[0]


def test_the_gap_of_answers_and_its_interval() -> None:
    uniform, nash = np.full(4, 0.25), np.array(EQUILIBRIUM)
    found = exploitability(said(uniform, 4000, 0), WORLD)
    assert found.gap.value == pytest.approx(games.duality_gap(found.shares, WORLD.preferences))
    assert found.gap.low < 0.325 < found.gap.high and found.gap.high - found.gap.low < 0.06
    assert exploitability(said(nash, 4000, 0), WORLD).gap.value < 0.03
    only_rock = exploitability([[SAID["R"], SAID["R"]]] * 3, WORLD)
    assert (only_rock.gap.value, only_rock.gap.low, only_rock.gap.high) == pytest.approx((0.4, 0.4, 0.4))
    assert only_rock.answers == 6 and only_rock.malformed.value == 0
    broken = exploitability([["nonsense", SAID["X"]], [SAID["X"], SAID["X"]]], WORLD)
    assert broken.malformed.value == 0.25 and broken.shares.tolist() == [0, 0, 0, 1]
    with pytest.raises(ConfigError, match="without an answer"):
        exploitability([[], []], WORLD)


def test_the_interval_covers_and_answers_to_one_prompt_go_together() -> None:
    # One answer wins most against the first, two tie against the second, three against the third: there the estimate is
    # biased most, and the interval is wide for it.
    uneven = np.array([0.5, 0.2, 0.2, 0.1])
    for truth, bound in ((np.full(4, 0.25), 0.98), (uneven, 1.0), (np.array(EQUILIBRIUM), 1.0)):
        gap = games.duality_gap(truth, WORLD.preferences)
        found = [exploitability(said(truth, 100, seed), WORLD, seed).gap for seed in range(100)]
        covered = sum(one.low <= gap + 1e-12 and gap <= one.high for one in found) / 100
        assert 0.92 <= covered <= bound
    single = said(np.array(EQUILIBRIUM), 100, 5)
    copied = exploitability([own * 4 for own in single], WORLD, 5).gap
    assert copied.high - copied.low == pytest.approx(found[5].high - found[5].low, abs=1e-12)


def test_win_rates_between_checkpoints_are_cyclic_where_they_play_the_game() -> None:
    pure = [exploitability([[SAID[action]]], WORLD) for action in ACTIONS]
    assert cyclic_fraction_between(pure, WORLD) == pytest.approx(games.cyclic_fraction(WORLD.preferences))
    better_and_better = [exploitability(said(np.array([w, 0, 0, 1 - w]), 500, 0), WORLD) for w in (0.1, 0.5, 0.9)]
    assert cyclic_fraction_between(better_and_better, WORLD) < 0.01


def test_a_starting_model_plays_all_classes_and_its_gap_is_that_of_its_answers(tmp_path: Path) -> None:
    """A small one, so that it is fast; the default one comes within 2 points of a quarter each, and 0.3 % malformed."""
    small = Start(demonstrations=1500, epochs=3, batch=32, layers=1, width=64, learning_rate=1e-2)
    folder = starting_model(WORLD, small, tmp_path)
    prompts = WORLD.prompts(150, "held_out")
    found = gap_of(folder, WORLD, prompts, n=2, seed=1)
    assert found.answers == 300 and found.malformed.value < 0.1
    assert all(0.1 < share < 0.45 for share in found.shares)
    again, other = gap_of(folder, WORLD, prompts, n=2, seed=1), gap_of(folder, WORLD, prompts, n=2, seed=2)
    assert np.array_equal(again.shares, found.shares) and again.gap == found.gap
    assert not np.array_equal(other.shares, found.shares)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"


def test_the_world_is_registered_and_its_option_checked() -> None:
    assert WORLDS.get("twist") is Twist
    assert WORLD.fingerprint() != replace(WORLD, skill=1.0).fingerprint()
    with pytest.raises(ConfigError, match="skill"):
        Twist(skill=1.5)
