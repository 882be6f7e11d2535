"""Data sets of a world: what each kind of row says is recounted from the gold reward."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest

from align.data.groups import RowId
from align.data.readers import reader_for
from align.worlds.base import as_assistant, as_user, last_content
from align.worlds.noisy import Flipped, LengthBiased, Noisy
from align.worlds.rows import KINDS, RARE
from align.worlds.start import Start, starting_model
from align.worlds.style import Style, asked, gold_reward

WORLD = Style()
PROMPTS = WORLD.prompts(300, "train", 3)
TEXTS = [
    [WORLD.demonstrate(prompt, np.random.default_rng([row, n])) for n in range(4)] for row, prompt in enumerate(PROMPTS)
]
TEXTS[0], TEXTS[1] = ["", "the fox is dear .", "", ""], [TEXTS[1][0]] * 4


def rows_of(kind, world=WORLD, seed=1):
    return KINDS[kind](world, PROMPTS, TEXTS, seed)


def gold(row, key):
    return gold_reward([row["prompt"]], [row[key]])[0]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows_are_read_without_a_word_about_them(kind) -> None:
    rows = rows_of(kind)
    assert len(rows) > 250 and rows == rows_of(kind)
    read = reader_for(rows)
    for part in read.layout.extras:
        read = replace(read, layout=read.layout.reading({part}))
    groups = [read(row, RowId("world", number)) for number, row in enumerate(rows)]
    assert all(group.completions for group in groups)
    assert set(read.layout.unused) == set()


def test_the_best_and_the_worst_of_a_prompt_are_its_pair() -> None:
    answers = dict(zip(PROMPTS, TEXTS, strict=True))
    for row in rows_of("pairs"):
        rewards = [WORLD.reward(last_content(row["prompt"]), text) for text in answers[last_content(row["prompt"])]]
        assert (gold(row, "chosen"), gold(row, "rejected")) == (max(rewards), min(rewards))


def test_a_panel_votes() -> None:
    assert {row["probability"] for row in rows_of("voted")} == {1.0}
    rows = rows_of("voted", Flipped())
    shares = [row["probability"] for row in rows]
    assert min(shares) > 0.5 and abs(statistics.mean(shares) - 0.72) < 0.03  # E max(k, 9 - k) / 9, k ~ B(9, 0.7)
    wrong = sum(gold(row, "chosen") < gold(row, "rejected") for row in rows) / len(rows)
    assert abs(wrong - 0.099) < 0.04  # P(k < 5)
    sure = [row for row in rows if row["probability"] > 0.85]
    assert sum(gold(row, "chosen") < gold(row, "rejected") for row in sure) <= 0.02 * len(sure)


def test_lists_and_rewards_carry_the_gold_reward() -> None:
    for row in rows_of("lists"):
        assert row["scores"] == gold_reward([row["prompt"]] * len(row["completions"]), row["completions"])
    for row in rows_of("rewarded"):
        assert row["reward"] == gold(row, "completion")


def test_win_shares_count_who_is_beaten() -> None:
    for row, plain in zip(rows_of("shares"), rows_of("lists"), strict=True):
        for score, own in zip(row["scores"], plain["scores"], strict=True):
            others = list(plain["scores"])
            others.remove(own)
            assert score == sum(0.5 if own == other else float(own > other) for other in others) / len(others)


def test_labels_are_unbalanced_and_split_at_the_median() -> None:
    rows = rows_of("labelled")
    good, bad = ([gold(row, "completion") for row in rows if row["label"] is want] for want in (True, False))
    assert min(good) > max(bad)
    assert len(bad) > 2.5 * len(good) and abs(len(good) / len(bad) - 1 / RARE) < 0.08


def test_samples_stand_beside_pairs_that_are_those_of_pairs() -> None:
    pairs = {last_content(row["prompt"]): row for row in rows_of("pairs")}
    demonstrated = []
    for row in rows_of("sampled"):
        same = pairs[last_content(row["prompt"])]
        assert (row["chosen"], row["rejected"]) == (same["chosen"], same["rejected"])
        assert row["samples"] and row["chosen"] not in row["samples"] and row["rejected"] not in row["samples"]
        demonstrated.append(gold(row, "baseline"))
    assert 0.2 < statistics.mean(demonstrated) < 0.6


def test_self_play_sets_a_demonstration_against_an_own_answer() -> None:
    answers = dict(zip(PROMPTS, TEXTS, strict=True))
    for row in rows_of("played"):
        own = next(text for text in answers[last_content(row["prompt"])] if text)
        assert last_content(row["rejected"]) == own != last_content(row["chosen"])
    shown, own = ([gold(row, key) for row in rows_of("played")] for key in ("chosen", "rejected"))
    assert statistics.mean(shown) > statistics.mean(own) + 0.15


def test_contrasts_differ_in_the_tone_and_favour_the_own_prompt() -> None:
    kinds = []
    for row in rows_of("contrasted"):
        for one in row["contrasts"]:
            kinds.append(one["kind"])
            better, worse = last_content(one["better"]), last_content(one["worse"])
            assert better == last_content(row["prompt"])
            assert asked(better)[1] == asked(worse)[1] and asked(better)[0] != asked(worse)[0]
            if one["kind"] == "intra":
                assert WORLD.reward(better, last_content(one["completion"])) > WORLD.reward(
                    worse, last_content(one["completion"])
                )
            else:
                gaps = [
                    WORLD.reward(prompt, last_content(row["chosen"]))
                    - WORLD.reward(prompt, last_content(row["rejected"]))
                    for prompt in (better, worse)
                ]
                assert gaps[0] > gaps[1]
    assert kinds.count("intra") > 150 and kinds.count("inter") > 150


def test_annotators_of_the_worlds_with_one_fault() -> None:
    count = 2000
    good, long = "the fox is dear .", "today the fox is dear and kind . the fox is dear ."
    prompt = "write a warm note about the fox"
    flipped = [Flipped().compare(prompt, good, long, 0, row) for row in range(count)]
    assert abs(sum(one.flipped for one in flipped) / count - 0.3) < 0.04
    biased = [LengthBiased().compare(prompt, good, long, 0, row) for row in range(count)]
    assert abs(sum(one.flipped for one in biased) / count - 0.5) < 0.05
    assert {one.annotator.split("-")[0] for one in biased} == {"careful", "lengthy"}


def test_annotators_share_the_starting_model(tmp_path) -> None:
    start = Start(demonstrations=32, epochs=1, batch=32, layers=1, width=32)
    first = starting_model(Style(), start, tmp_path)
    assert starting_model(Noisy(), start, tmp_path) == starting_model(Flipped(), start, tmp_path) == first
    assert starting_model(Noisy(right_tone=0.9), start, tmp_path) != first


def test_forms() -> None:
    assert as_user("a") == [{"role": "user", "content": "a"}] and last_content(as_assistant("b")) == "b"
