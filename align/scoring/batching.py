"""Which group goes to which rank and micro-batch: one deterministic plan that every rank computes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from align.core.errors import ConfigError

Plan = list[list[list[int]]]
"""[rank][micro-batch][index of the group]."""


def plan(costs: Sequence[int], world: int = 1, budget: int | None = None, equal: bool = True) -> Plan:
    """Spread groups over ranks and fill micro-batches of at most `budget` tokens.

    Args:
        costs: unique tokens of each group of the global batch.
        world: number of ranks.
        budget: tokens of a micro-batch; None for one micro-batch per rank. A larger group is alone.
        equal: every rank gets the same number of micro-batches, by splitting further; a rank with fewer groups than
            that has empty ones, for which the caller runs a dummy tree whose loss counts zero times.
    Returns:
        [rank][micro-batch][index]. Every index once; a function of the arguments alone.
    """
    if world < 1:
        raise ConfigError(f"a plan needs at least one rank, not {world}")
    if budget is not None and budget < 1:
        raise ConfigError(f"tokens per micro-batch must be at least 1, not {budget}")
    shares = _shares(costs, world)
    micro = [_fill(share, costs, budget) for share in shares]
    if equal:
        most = max(1, *(len(batches) for batches in micro))
        micro = [_split(batches, costs, most) for batches in micro]
    return micro


def predicted_gain(lengths: Iterable[tuple[int, Sequence[int]]]) -> float:
    """How many times fewer tokens sharing prompts needs: `lengths` are (prompt, branches) of each group."""
    unique = naive = 0
    for prompt, branches in lengths:
        unique += prompt + sum(branches)
        naive += prompt * len(branches) + sum(branches)
    return naive / unique if unique else 1.0


def _by_falling_cost(indices: Iterable[int], costs: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-costs[index], index))


def _shares(costs: Sequence[int], world: int) -> list[list[int]]:
    """Longest first to the rank with the least work: ranks end within one group of each other."""
    shares: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for index in _by_falling_cost(range(len(costs)), costs):
        rank = min(range(world), key=lambda r: (load[r], len(shares[r]), r))
        shares[rank].append(index)
        load[rank] += costs[index]
    return shares


def _fill(share: Sequence[int], costs: Sequence[int], budget: int | None) -> list[list[int]]:
    """Sorted by length and filled in order, so that a micro-batch holds groups of similar length."""
    if budget is None:
        return [list(share)] if share else []
    batches: list[list[int]] = []
    used = 0
    for index in share:
        if not batches or used + costs[index] > budget:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += costs[index]
    return batches


def _split(batches: list[list[int]], costs: Sequence[int], count: int) -> list[list[int]]:
    """Exactly `count` micro-batches: halve the largest that can be halved, then add empty ones."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        divisible = [number for number, batch in enumerate(batches) if len(batch) > 1]
        if not divisible:
            return batches + [[] for _ in range(count - len(batches))]
        number = max(divisible, key=lambda n: (sum(costs[i] for i in batches[n]), -n))
        batches[number : number + 1] = _halves(batches[number], costs)
    return batches


def _halves(batch: Sequence[int], costs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two runs of the batch with costs as even as its order allows."""
    total, running = sum(costs[index] for index in batch), 0
    best, cut = total, 1
    for position in range(1, len(batch)):
        running += costs[batch[position - 1]]
        if max(running, total - running) < best:
            best, cut = max(running, total - running), position
    return list(batch[:cut]), list(batch[cut:])
