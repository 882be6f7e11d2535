"""The plan of ranks and micro-batches, as properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.core.errors import ConfigError
from align.scoring.batching import plan, predicted_gain

costs = st.lists(st.integers(1, 300), max_size=40)
budgets = st.none() | st.integers(1, 600)


@given(costs=costs, world=st.integers(1, 5), budget=budgets, equal=st.booleans())
def test_every_group_once_within_the_budget_in_equal_counts(
    costs: list[int], world: int, budget: int | None, equal: bool
) -> None:
    made = plan(costs, world, budget, equal)
    assert len(made) == world
    assert sorted(i for rank in made for batch in rank for i in batch) == list(range(len(costs)))
    assert made == plan(list(costs), world, budget, equal)
    for rank in made:
        for batch in rank:
            if budget is not None and len(batch) > 1:
                assert sum(costs[i] for i in batch) <= budget
    if equal:
        assert len({len(rank) for rank in made}) == 1
        for rank in made:
            groups = sum(map(len, rank))
            assert sum(not batch for batch in rank) == max(0, len(rank) - groups), "empty only for want of groups"
    if budget is None and costs:
        assert max(map(len, made)) == 1


@given(costs=costs, world=st.integers(1, 5))
def test_ranks_differ_by_at_most_one_group(costs: list[int], world: int) -> None:
    loads = [sum(costs[i] for batch in rank for i in batch) for rank in plan(costs, world)]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_ranks_share_the_work_and_not_the_count() -> None:
    assert plan([100, *[10] * 10], 2) == [[[0]], [list(range(1, 11))]]


def test_micro_batches_are_filled_by_length() -> None:
    assert plan([10, 90, 20, 80, 30], 1, 100) == [[[1], [3], [4, 2, 0]]]


def test_one_long_group_does_not_leave_the_others_alone() -> None:
    (rank,) = plan([5000, *[50] * 40], 1, 1000)
    assert rank[0] == [0]
    assert len(rank) == 3


def test_a_rank_with_fewer_groups_gets_empty_micro_batches() -> None:
    made = plan([100, 100, 100], 2, 100)
    assert [len(rank) for rank in made] == [2, 2]
    assert made[1][1] == []


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one rank"):
        plan([1], 0)
    with pytest.raises(ConfigError, match="at least 1"):
        plan([1], 1, 0)


def test_predicted_gain_is_the_token_ratio() -> None:
    assert predicted_gain([(126, [41, 52])]) == pytest.approx((2 * 126 + 93) / (126 + 93))
    assert predicted_gain([]) == 1.0
