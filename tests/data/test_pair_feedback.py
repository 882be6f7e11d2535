"""What a method is about must be in the rows: without it the method would be another one, and nobody would know."""

from __future__ import annotations

from typing import Any

import pytest

from align.core.errors import DataError
from align.data.prepare import PreparedData, prepare_data
from align.data.stream import Hole
from align.data.tokenise import Tokeniser
from align.methods import METHODS
from align.testing.tiny import random_pairs, tiny_tokenizer

PAIRS = random_pairs(4, seed=0)
SCORED = [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "scores": [1.0, 3.5]} for r in PAIRS]
RANKED = [{"prompt": r["prompt"], "completions": [r["rejected"], r["chosen"]], "ranks": [2, 1]} for r in PAIRS]
ABOUT = [("soft_dpo", {}), ("smpo", {}), ("robust_bt", {}), ("robust_bt", {"kind": "soft"})]


def prepare(rows: list[dict[str, Any]], name: str, **options: Any) -> PreparedData:
    method = METHODS.get(name)(**options)
    return prepare_data([rows], Tokeniser(tiny_tokenizer(), method.view, needs=method.requires()))


def sure(*values: float | None) -> list[dict[str, Any]]:
    return [{**row, "probability": value} for row, value in zip(PAIRS, values, strict=True)]


@pytest.mark.parametrize(("name", "options"), ABOUT)
def test_pairs_without_a_probability_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="needs the `probability` of each pair") as caught:
        prepare(PAIRS, name, **options)
    assert "columns: {probability: COLUMN}" in caught.value.mend
    assert "label: margin" not in caught.value.mend
    ready = prepare(sure(0.9, 0.5, 0.1, 1.0), name, **options)
    pairs = [item.preferences[0] for item in ready.dataset.__getitems__(range(4))]
    assert [pair.probability for pair in pairs] == [0.9, 0.5, 0.1, 1.0]


@pytest.mark.parametrize("name", ["soft_dpo", "smpo"])
def test_margins_need_scores_or_a_column(name: str) -> None:
    for rows in (PAIRS, RANKED):
        with pytest.raises(DataError, match="needs the `margin` of each pair"):
            prepare(rows, name, label="margin")
    with pytest.raises(DataError, match="`probability`") as caught:
        prepare(SCORED, name)
    assert "`label: margin`" in caught.value.mend
    stated = [{**row, "margin": 2.5} for row in PAIRS]
    for rows in (SCORED, stated):
        items = prepare(rows, name, label="margin").dataset.__getitems__(range(4))
        assert [item.preferences[0].margin for item in items] == [2.5] * 4


def test_a_row_without_its_number_is_bad_and_not_sure() -> None:
    rows = sure(0.9, None, 0.7, 0.6)
    tokenise = Tokeniser(tiny_tokenizer(), "pairs", needs=METHODS.get("soft_dpo")().requires())
    with pytest.raises(DataError, match="`probability`: missing"):
        prepare_data([rows], tokenise)
    dropped = prepare_data([[*rows, *sure(0.9, 0.9, 0.9, 0.9) * 40]], tokenise)
    (hole,) = (item for item in dropped.dataset.__getitems__(range(8)) if isinstance(item, Hole))
    assert (hole.row.row, hole.field, hole.reason) == (1, "probability", "missing")
    assert not any(isinstance(item, Hole) for item in prepare(rows, "dpo").dataset.__getitems__(range(4)))


def test_a_tie_says_both_numbers_itself() -> None:
    rows: list[dict[str, Any]] = [{**row, "tie": False, "probability": 0.8, "margin": 1.5} for row in PAIRS]
    rows[2] |= {"tie": True, "probability": None, "margin": None}
    for label, expected in (("probability", [0.8, 0.8, 0.5, 0.8]), ("margin", [1.5, 1.5, 0.0, 1.5])):
        items = prepare(rows, "soft_dpo", label=label).dataset.__getitems__(range(4))
        assert [getattr(item.preferences[0], label) for item in items] == expected


def rewarded(chosen: float | None = 0.75, rejected: float | None = 0.25) -> list[dict[str, Any]]:
    return [{**row, "chosen_reward": chosen, "rejected_reward": rejected} for row in PAIRS]


def test_each_answer_has_a_reward_of_its_own() -> None:
    for rows in (PAIRS, RANKED, [{**row, "chosen_reward": 1.0} for row in PAIRS]):
        with pytest.raises(DataError, match="needs a reward of each answer") as caught:
            prepare(rows, "sppo")
        assert "`chosen_reward` and `rejected_reward`" in caught.value.mend
    for ready, expected in ((rewarded(), (0.75, 0.25)), (SCORED, (3.5, 1.0))):
        for item in prepare(ready, "sppo").dataset.__getitems__(range(4)):
            (pair,) = item.preferences
            assert (item.completions[pair.winner].reward, item.completions[pair.loser].reward) == expected


def test_a_row_without_one_of_its_rewards_is_bad() -> None:
    for rows, part in ((rewarded(chosen=None), "chosen_reward"), (rewarded(rejected=None), "rejected_reward")):
        with pytest.raises(DataError, match=f"`{part}`: missing"):
            prepare(rows, "sppo")
        assert not any(isinstance(item, Hole) for item in prepare(rows, "dpo").dataset.__getitems__(range(4)))


def test_the_margin_is_that_of_the_rewards_unless_it_is_stated() -> None:
    for rows, expected in ((rewarded(), 0.5), ([{**row, "margin": 3.0} for row in rewarded()], 3.0)):
        items = prepare(rows, "dno").dataset.__getitems__(range(4))
        assert [item.preferences[0].margin for item in items] == [expected] * 4
    with pytest.raises(DataError, match="`margin`: missing"):
        prepare(rewarded(rejected=None), "dno")
