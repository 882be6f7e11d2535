"""Numbers out of comparisons: labels, win rates, and which answers a tournament compares.

A comparison is P(first beats second) in [0, 1]; 1/2 is a tie, NaN is missing. A matrix [K, K] of them holds 1/2 on its
diagonal and P[j, i] = 1 - P[i, j].
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from align.core.errors import ConfigError
from align.core.seeds import generator

Label = Literal["hard", "sampled", "prob"]
"""What a probability of winning becomes: the likelier winner, a draw of the winner, or itself."""

Pair = tuple[int, int]


def label(probability: float, kind: Label, seed: int = 0, *row: Any) -> float:
    """The target of a comparison: 1 the first won, 0 the second; NaN where the comparison is missing.

    `hard` is 1 above 1/2, 0 below, and 1/2 at a tie, which belongs in no pair. `sampled` draws the winner with the
    probability, as one annotator would; the draw is a function of (seed, row). `prob` keeps the probability. A loop on
    `hard` labels plays the game in which the likelier winner always wins, which is another game where preferences are
    mixed.

    Raises:
        ConfigError: the probability is outside [0, 1], or there is no such kind.
    """
    if np.isnan(probability):
        return float("nan")
    if not 0 <= probability <= 1:
        raise ConfigError(f"a probability of winning is {probability}")
    if kind == "prob":
        return float(probability)
    if kind == "hard":
        return 0.5 if probability == 0.5 else float(probability > 0.5)
    if kind == "sampled":
        return float(generator(seed, "label", *row).random() < probability)
    raise ConfigError(f"there is no label `{kind}`", mend="use hard, sampled or prob")


def win_rates(wins: np.ndarray, with_self: bool = True) -> np.ndarray:
    """float64 [K]: the mean of each row of a matrix of comparisons.

    Args:
        wins: [K, K].
        with_self: count j = i as 1/2, as SPPO's code does (arXiv 2405.00675), which shrinks P - 1/2 by (K - 1) / K;
            without it the rate against the other answers, SPO's reward (arXiv 2401.04056).

    Returns:
        NaN for an answer of which a comparison is missing, and without `with_self` for a single answer.
    """
    wins = np.asarray(wins, dtype=np.float64)
    count = len(wins)
    if wins.shape != (count, count):
        raise ConfigError(f"a matrix of comparisons has shape {wins.shape}", mend="make it [K, K]")
    others = np.where(np.eye(count, dtype=bool), 0.0, wins).sum(axis=1)
    if with_self:
        return (others + 0.5) / count
    return others / (count - 1) if count > 1 else np.full(1, np.nan)


@dataclass(frozen=True)
class Tournament:
    """What a knock-out tournament came to.

    Attributes:
        winner, loser: indices; None where a match that decides them is missing.
        kept: whether the winner beat the loser in their own match; what INPO asks of a pair.
        compared: the matches played, in order.
    """

    winner: int | None
    loser: int | None
    kept: bool
    compared: tuple[Pair, ...]


def play(count: int) -> Generator[list[Pair], list[float], Tournament]:
    """A knock-out tournament of `count` answers (INPO, arXiv 2407.00617), round by round.

    First neighbours meet: (0, 1), (2, 3), ... The winners play on for the best, where the winner advances, and the
    losers for the worst, where the loser advances; then best meets worst. A tie goes to the first, an odd one out
    advances unplayed. 8 answers take 11 matches.

    Yields the matches of a round, which do not depend on each other; send their P(first beats second) back.
    """
    compared: list[Pair] = []
    known: dict[Pair, float] = {}

    def ask(matches: list[Pair]) -> Generator[list[Pair], list[float], bool]:
        new = [match for match in matches if match not in known]
        if new:
            compared.extend(new)
            known.update(zip(new, (yield new), strict=True))
        return not any(np.isnan(known[match]) for match in matches)

    lost = Tournament(None, None, False, ())
    if count < 2:
        return lost
    best = worst = list(range(count))
    first = True
    while len(best) > 1 or len(worst) > 1:
        up, down = _neighbours(best), [] if first else _neighbours(worst)
        if not (yield from ask([*up, *down])):
            return Tournament(None, None, False, tuple(compared))
        losers = [j if known[i, j] >= 0.5 else i for i, j in (up if first else down)]
        # An odd one out of the first round has neither won nor lost: it goes on among both.
        worst = losers + (worst[-1:] if len(worst) % 2 else [])
        best = [i if known[i, j] >= 0.5 else j for i, j in up] + (best[-1:] if len(best) % 2 else [])
        first = False
    winner, loser = best[0], worst[0]
    match = (min(winner, loser), max(winner, loser))
    if winner == loser or not (yield from ask([match])):
        return Tournament(winner, loser, False, tuple(compared))
    won = known[match] if winner < loser else 1 - known[match]
    return Tournament(winner, loser, bool(won > 0.5), tuple(compared))


def tournament(wins: np.ndarray) -> Tournament:
    """`play` on a matrix that holds its matches already."""
    rounds = play(len(wins))
    try:
        asked = next(rounds)
        while True:
            asked = rounds.send([float(wins[match]) for match in asked])
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _neighbours(players: list[int]) -> list[Pair]:
    return list(zip(players[::2], players[1::2], strict=False))
