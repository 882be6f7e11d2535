"""What is made of judged rollouts: selection, labels, shaping, parts of a batch, and a checkpoint's copy of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from align.data.groups import RowId, TokenGroup
from align.data.rollouts import Answer, RolloutGroup
from align.methods.base import Draw, Rollouts
from align.trainers import rollouts

NAN = float("nan")


def group(rewards: list[float] | None = None, wins: Any = None, row: int = 0, ids: Any = None) -> RolloutGroup:
    count = len(rewards) if rewards is not None else len(wins)
    texts = ids or [[5 + place, 6, 2][: 2 + place % 2] for place in range(count)]
    answers = tuple(
        Answer(
            np.array(texts[place]),
            f"answer {place}",
            logp=np.full(len(texts[place]), -0.5 - place, np.float32),
            origin=("policy", "reference")[place % 2],
            rewards={} if rewards is None else {"r": rewards[place]},
        )
        for place in range(count)
    )
    return RolloutGroup(
        RowId("made", row), "prompt", np.array([3, 4]), answers, None if wins is None else np.array(wins)
    )


def asked(select: str, feedback: str = "preference", label: str = "hard") -> Rollouts:
    return Rollouts((Draw("policy", 2),), feedback, select, label)  # type: ignore[arg-type]


def one(select: str, made: RolloutGroup, **kind: Any) -> TokenGroup:
    found = rollouts.select(asked(select, **kind), [made], seed=0)
    assert not found.left_out
    return found.groups[0]


@pytest.mark.parametrize(("p", "winner"), [(0.7, 0), (0.2, 1)])
def test_a_hard_label_is_the_likelier_answer(p: float, winner: int) -> None:
    pair = one("pair", group(wins=[[0.5, p], [1 - p, 0.5]])).preferences[0]
    assert (pair.winner, pair.loser, pair.probability, pair.margin) == (winner, 1 - winner, 1.0, None)


def test_a_label_as_probability_keeps_it() -> None:
    pair = one("pair", group(wins=[[0.5, 0.2], [0.8, 0.5]]), label="prob").preferences[0]
    assert (pair.winner, pair.probability) == (1, pytest.approx(0.8))
    tied = one("pair", group(wins=[[0.5, 0.5], [0.5, 0.5]]), label="prob").preferences[0]
    assert tied.probability == 0.5 and tied.tie


def test_sampled_labels_follow_p_and_the_row() -> None:
    made = [group(wins=[[0.5, 0.8], [0.2, 0.5]], row=row) for row in range(2000)]
    found = rollouts.select(asked("pair", label="sampled"), made, seed=3).groups
    share = np.mean([one.preferences[0].winner == 0 for one in found])
    assert abs(share - 0.8) < 4 * math.sqrt(0.16 / 2000)
    again = rollouts.select(asked("pair", label="sampled"), made[::-1], seed=3).groups[::-1]
    assert [a.preferences[0].winner for a in found] == [b.preferences[0].winner for b in again]
    other = rollouts.select(asked("pair", label="sampled"), made, seed=4).groups
    assert [a.preferences[0].winner for a in found] != [b.preferences[0].winner for b in other]


def test_what_teaches_nothing_is_left_out_and_counted() -> None:
    same = group(wins=[[0.5, 0.9], [0.1, 0.5]], ids=[[5, 6], [5, 6]])
    found = rollouts.select(
        asked("pair"), [group(wins=[[0.5, 0.5], [0.5, 0.5]]), group(wins=[[0.5, NAN], [NAN, 0.5]]), same], seed=0
    )
    assert not found.groups and dict(found.left_out) == {"a tie": 1, "no feedback": 1, "two equal answers": 1}


def test_rewards_make_preferences_and_margins() -> None:
    pair = one("pair", group([0.25, 1.0])).preferences[0]
    assert (pair.winner, pair.margin) == (1, pytest.approx(0.75))
    tied = one("pair", group([1.0, 1.0]), feedback="reward").preferences[0]
    assert tied.margin == 0.0  # a regression learns from equal rewards too
    assert rollouts.select(asked("pair"), [group([1.0, NAN])], 0).left_out == {"no feedback": 1}
    assert rollouts.win_matrix(group([1.0, 0.0, 1.0])).tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]


def test_preferences_make_rewards() -> None:
    wins = [[0.5, 0.9, 0.7], [0.1, 0.5, NAN], [0.3, NAN, 0.5]]
    assert rollouts.reward_of(group(wins=wins)) == pytest.approx([0.8, 0.1, 0.3])
    assert np.isnan(rollouts.reward_of(group(wins=[[0.5, NAN], [NAN, 0.5]]))).all()


def test_the_first_alone_has_its_chance_to_win_as_reward() -> None:
    made = one("first", group(wins=[[0.5, 0.3], [0.7, 0.5]]))
    assert len(made.completions) == 1 and made.completions[0].reward == pytest.approx(0.3)
    assert made.completions[0].role == "policy"


def test_a_group_keeps_all_answers_with_the_samplers_numbers() -> None:
    made = one("group", group([0.1, NAN, 0.3]), feedback="reward")
    assert [one.reward for one in made.completions] == [0.1, None, 0.3]
    assert [one.role for one in made.completions] == ["policy", "reference", "policy"]
    assert made.completions[1].columns[rollouts.SAMPLER].tolist() == [-1.5] * 3


def test_weights_of_rewards() -> None:
    made = group([1.0, 2.0])
    both = replace(
        made, answers=tuple(replace(a, rewards={**a.rewards, "s": 10.0 * i}) for i, a in enumerate(made.answers))
    )
    assert both.rewards().tolist() == [1.0, 12.0]
    assert both.rewards({"r": 2.0, "s": 0.5}).tolist() == [2.0, 9.0]
    assert both.rewards({"r": 1.0}).tolist() == [1.0, 2.0]


def trained() -> list[TokenGroup]:
    made = [one("group", group([0.1 * row, 0.3, 0.5], row=row), feedback="reward") for row in range(5)]
    n = 15
    columns = {
        name: np.arange(n * 3, dtype=float).reshape(n, 3) + at for at, name in enumerate((rollouts.OLD, rollouts.REF))
    }
    return rollouts.with_columns(made, columns)


def test_shaping_sees_every_token_and_its_ratio() -> None:
    batch = rollouts.batch_of(trained(), {"beta": np.array([0.5])})
    assert batch.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert batch.log_ratio is not None and (batch.log_ratio[batch.mask] == -1.0).all()
    assert (batch.log_ratio[~batch.mask] == 0).all() and batch.length.tolist() == [2, 3, 2] * 5
    assert batch.reward[3:6] == pytest.approx([0.1, 0.3, 0.5]) and batch.state["beta"].tolist() == [0.5]
    assert rollouts.batch_of([one("group", group([0.1, 0.2]), feedback="reward")], {}).log_ratio is None


def test_what_shaping_masks_is_not_trained_on() -> None:
    groups = trained()
    batch = rollouts.batch_of(groups, {})
    keep = batch.group != 1
    keep[7] = False
    made = rollouts.shaped(groups, replace(batch, train=keep, advantage=np.where(batch.mask, 2.5, 0.0)))
    assert [one.row.row for one in made] == [0, 2, 3, 4]
    assert [len(one.completions) for one in made] == [3, 2, 3, 3]
    assert made[1].completions[1].reward == 0.5 and made[1].completions[1].columns["advantage"].tolist() == [2.5, 2.5]


def test_parts_are_all_groups_once_an_epoch_and_mixed_anew() -> None:
    groups = trained()
    first, second = ([rollouts.part_of(groups, part, 2, seed=1) for part in parts] for parts in ((0, 1), (2, 3)))
    for epoch in (first, second):
        assert sorted(one.row.row for part in epoch for one in part) == [0, 1, 2, 3, 4]
    assert [[one.row.row for one in part] for part in first] != [[one.row.row for one in part] for part in second]
    assert rollouts.part_of(groups, 3, 1, seed=1) == groups


def test_a_checkpoint_holds_the_batch_bit_for_bit() -> None:
    pair = one("pair", group(wins=[[0.5, 0.2], [0.8, 0.5]]), label="prob")
    for groups in (trained(), [pair]):
        described, tensors = rollouts.to_tensors(groups)
        for before, after in zip(groups, rollouts.from_tensors(described, tensors), strict=True):
            assert before.row == after.row and before.preferences == after.preferences
            assert before.prompt.tolist() == after.prompt.tolist()
            for mine, theirs in zip(before.completions, after.completions, strict=True):
                assert (mine.ids.tolist(), mine.reward, mine.role) == (theirs.ids.tolist(), theirs.reward, theirs.role)
                assert mine.columns.keys() == theirs.columns.keys()
                assert all((mine.columns[name] == theirs.columns[name]).all() for name in mine.columns)
