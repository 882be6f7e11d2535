"""KTO's partners: for each completion, one of another row to be scored after the same prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from align.core import seeds
from align.data.groups import TokenCompletion, TokenGroup, beside

_log = logging.getLogger(__name__)
_said: set[str] = set()


def add_mismatched(groups: Sequence[TokenGroup], seed: int) -> list[TokenGroup]:
    """Fill `mismatched` of each group with as many completions of rows with another prompt.

    The rows stand on a circle in an order drawn from (seed, row id); each takes the completions of the next row on
    it that has another prompt, from the first on, around again where that row has fewer. So a partner is a function
    of the seed and of the set of rows, never of their places in the list, the rank or the micro-batch.

    Where all prompts are equal `mismatched` stays empty: there is no KL to estimate, and KTO's z0 is 0.
    """
    circle = sorted(
        range(len(groups)),
        key=lambda index: (
            seeds.derive(seed, "partner", groups[index].row.source, groups[index].row.row),
            str(groups[index].row),
        ),
    )
    prompts = [group.prompt.tobytes() for group in groups]
    if len(set(prompts)) < 2:
        if len(groups) > 1 and "equal" not in _said:
            _said.add("equal")
            _log.warning("all %d prompts of a batch are equal: no mismatched completions, so z0 is 0", len(groups))
        return list(groups)
    partner = _next_other(circle, prompts)
    return [
        replace(group, mismatched=_taken(groups[partner[index]], len(_judged(group))))
        for index, group in enumerate(groups)
    ]


def _next_other(circle: list[int], prompts: list[bytes]) -> dict[int, int]:
    """For each row the next one on the circle with another prompt, in one pass backwards over the circle twice."""
    found: dict[int, int] = {}
    other: int | None = None  # the nearest row ahead whose prompt is not that of `ahead`
    ahead: int | None = None
    for index in [*circle[::-1], *circle[::-1]]:
        if ahead is not None and prompts[ahead] != prompts[index]:
            other = ahead
        if other is not None:
            found[index] = other
        ahead = index
    return found


def _taken(group: TokenGroup, count: int) -> tuple[TokenCompletion, ...]:
    own = _judged(group)
    return tuple(own[place % len(own)] for place in range(count))


def _judged(group: TokenGroup) -> list[TokenCompletion]:
    return [one for one in group.completions if not beside(one.role)]
