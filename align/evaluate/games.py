"""Preference games: equilibria, exploitability, ratings and what they leave out, and exact steps of whole populations.

A game of n answers is a matrix P, float64 [n, n]: P[i, j] is the probability that answer i is preferred to answer j, so
P + P^T = 1 and the diagonal is 1/2. A policy pi is a distribution over the answers, [n]. P(y > pi) = (P pi)_y. Where P
is intransitive no reward explains it, and the answer to "what is best" is the Nash equilibrium: the policy that no
answer beats more than half of the time. Everything here is numpy in float64, and exact up to rounding.

The step of a population is what a method's loop does with infinitely many samples and an exact minimisation. `eta` is
a step size in some papers and its inverse in others: arguments are named `step` (it multiplies P) and `temperature` (it
divides P).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from align.core.errors import ConfigError
from align.evaluate.intervals import Estimate
from align.evaluate.wins import win_rate

MOST_ANSWERS = 14
"""Answers up to which all supports are tried: 2^14 small linear systems."""
_ZERO = 1e-10
"""Below it a win rate's excess over a half, or an entry of an equilibrium, is rounding."""
_ROUNDS = 10_000


@dataclass(frozen=True, eq=False)
class Game:
    """A preference matrix, its answers, and a reference policy.

    Attributes:
        P: [n, n], P[i, j] = P(i beats j).
        actions: the n answers.
        ref: [n], the reference policy, positive.

    Raises:
        ConfigError: P is no preference matrix, or the sizes differ.
    """

    P: np.ndarray
    actions: tuple[str, ...]
    ref: np.ndarray

    def __post_init__(self) -> None:
        check_matrix(self.P)
        if not len(self.actions) == len(self.ref) == len(self.P):
            raise ConfigError(
                f"a game of {len(self.P)} answers has {len(self.actions)} names and a reference of {len(self.ref)}"
            )

    def __len__(self) -> int:
        return len(self.actions)


def twist(a: float = 0.4, b: float = 0.1, c: float = 0.2, decoy: Sequence[float] = (0.95, 0.55, 0.55)) -> Game:
    """Rock, paper, scissors with unequal stakes, and a decoy X that loses to them with chances `decoy`.

    P(R > S) = 1/2 + a, P(S > P) = 1/2 + b, P(P > R) = 1/2 + c. The equilibrium is (b, a, c, 0) / (a + b + c), unique,
    whatever the decoy; Bradley-Terry ratings depend on whom the decoy flatters.
    """
    P = np.full((4, 4), 0.5)
    for winner, loser, lead in ((0, 2, a), (2, 1, b), (1, 0, c), *((i, 3, decoy[i] - 0.5) for i in range(3))):
        P[winner, loser] += lead
        P[loser, winner] -= lead
    return _uniform(P, ("R", "P", "S", "X"))


def dice() -> Game:
    """Three dice {2, 4, 9}, {1, 6, 8}, {3, 5, 7}: each beats the next with 5/9. Source: arXiv 2312.00886."""
    faces = ((2, 4, 9), (1, 6, 8), (3, 5, 7))
    P = np.array([[np.mean([[x > y for y in theirs] for x in own]) for theirs in faces] for own in faces])
    np.fill_diagonal(P, 0.5)
    return _uniform(P, faces)


def three_raters(eps: float) -> Game:
    """Three kinds of raters in equal numbers, up to `eps`, each with a cycle of its own. Source: arXiv 2312.00886.

    P(y2 > y1) = 2/3 - eps/2 and the other two of the cycle 2/3 + eps/4. The equilibrium (1/3 + eps/2, 1/3 + eps/2,
    1/3 - eps) is continuous in eps, while the highest Bradley-Terry rating jumps from y2 to y1 as eps turns positive.
    """
    P = np.full((3, 3), 0.5)
    for winner, loser, chance in ((1, 0, 2 / 3 - eps / 2), (0, 2, 2 / 3 + eps / 4), (2, 1, 2 / 3 + eps / 4)):
        P[winner, loser], P[loser, winner] = chance, 1 - chance
    return _uniform(P, ("y1", "y2", "y3"))


def ladder(strengths: Sequence[float]) -> Game:
    """The Bradley-Terry game of these strengths: P(i > j) = sigmoid(s_i - s_j). Nothing of it is cyclic."""
    s = np.asarray(strengths, float)
    return _uniform(_sigmoid(s[:, None] - s), range(len(s)))


def thresholded(P: np.ndarray) -> np.ndarray:
    """The game in which the likelier winner always wins: what a judge plays who says only which answer is better."""
    return (np.sign(P - 0.5) + 1) / 2


def _uniform(P: np.ndarray, actions: Sequence[object]) -> Game:
    return Game(P, tuple(map(str, actions)), np.full(len(P), 1 / len(P)))


def check_matrix(P: np.ndarray) -> None:
    """Refuse what is no preference matrix.

    Raises:
        ConfigError: not square, outside [0, 1], or P + P^T is not 1.
    """
    if P.ndim != 2 or P.shape[0] != P.shape[1] or not len(P):
        raise ConfigError(f"a preference matrix has the shape {P.shape}", mend="give one row and column per answer")
    if not ((P >= 0) & (P <= 1)).all() or not np.allclose(P + P.T, 1, atol=1e-9):
        raise ConfigError(
            "this is no preference matrix",
            why="P(i > j) and P(j > i) lie in [0, 1] and sum to 1",
            mend="average both orders of a judge, and let a tie count half",
        )


# Equilibria and exploitability


def win_rates(P: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """P(y > pi) of every answer, [n]."""
    return P @ pi


def duality_gap(pi: np.ndarray, P: np.ndarray) -> float:
    """2 max_y P(y > pi) - 1, in [0, 1]: what the best answer to pi gains. 0 exactly at a Nash equilibrium."""
    return float(2 * win_rates(P, pi).max() - 1)


def regularised_gap(pi: np.ndarray, P: np.ndarray, ref: np.ndarray, tau: float) -> float:
    """The gap of the game whose players pay tau KL to the reference; 0 exactly at `regularised_nash`.

    2 [tau log E_ref exp(P(y > pi) / tau) + tau KL(pi || ref)] - 1: the best answer in policies, found in closed form.
    """
    exponent = np.log(ref) + win_rates(P, pi) / tau
    best = tau * _log_sum_exp(exponent)
    return float(2 * (best + tau * kl(pi, ref)) - 1)


def equilibria(P: np.ndarray) -> list[np.ndarray]:
    """All extreme Nash equilibria, by trying every support; one where the equilibrium is unique.

    On a support S an equilibrium solves (P pi)_S = 1/2 with sum 1; it is extreme where that has one solution, and one
    at all where no entry is negative and no answer outside S beats it.

    Raises:
        ConfigError: more than `MOST_ANSWERS` answers.
    """
    n = len(P)
    if n > MOST_ANSWERS:
        raise ConfigError(
            f"a game of {n} answers", why=f"all {2**n - 1} supports would be tried", mend="group answers, or drop some"
        )
    A = P - 0.5
    found: list[np.ndarray] = []
    for size in range(1, n + 1):
        for support in itertools.combinations(range(n), size):
            pi = _on_support(A, list(support))
            if pi is not None and not any(np.allclose(pi, other, atol=1e-8) for other in found):
                found.append(pi)
    return found


def _on_support(A: np.ndarray, support: list[int]) -> np.ndarray | None:
    """The one equilibrium whose support this is; None where there is none, or more than one."""
    system = np.vstack([A[np.ix_(support, support)], np.ones(len(support))])
    target = np.zeros(len(system))
    target[-1] = 1
    solution, _, rank, _ = np.linalg.lstsq(system, target, rcond=None)
    if rank < len(support) or np.abs(system @ solution - target).max() > _ZERO or solution.min() < _ZERO:
        return None
    pi = np.zeros(len(A))
    pi[support] = solution
    return pi if (A @ pi).max() <= _ZERO else None


def nash(P: np.ndarray) -> np.ndarray:
    """The Nash equilibrium, [n]: the unique one, or that of maximum entropy. See `nash_averaging`."""
    return nash_averaging(P)


def nash_averaging(P: np.ndarray) -> np.ndarray:
    """The Nash equilibrium of maximum entropy, [n]: a ranking of policies that copies of one of them do not change.

    The equilibria are the mixtures of `equilibria`; the entropy of a mixture is concave in its weights, and the
    multiplicative update raises it with every step. Source: arXiv 1806.02643.
    """
    corners = np.array(equilibria(P))
    weights = np.full(len(corners), 1 / len(corners))
    for _ in range(_ROUNDS):
        pi = weights @ corners
        slope = -corners @ np.log(np.maximum(pi, 1e-300))
        if slope.max() - weights @ slope < 1e-14:
            break
        weights = normalised(np.log(np.maximum(weights, 1e-300)) + slope)
    return weights @ corners


def regularised_nash(P: np.ndarray, ref: np.ndarray, tau: float) -> np.ndarray:
    """pi* proportional to ref exp(P(y > pi*) / tau), [n]: the Nash equilibrium with a KL leash; unique for tau > 0.

    Newton's method in the log-probabilities. The Jacobian 1 - P J / tau is regular at every policy (P - 1/2 is
    antisymmetric), so halving the step where the residual would not fall leads to the solution from anywhere.

    Raises:
        ConfigError: tau is not positive, or so small that float64 does not resolve it.
    """
    if not tau > 0:
        raise ConfigError(f"the temperature is {tau}", mend="use a positive one, or `nash` for 0")
    base = np.log(ref)
    logits = base.copy()

    def residual(at: np.ndarray) -> np.ndarray:
        return centred(at - base - P @ normalised(at) / tau)

    r = residual(logits)
    for _ in range(_ROUNDS):
        if np.abs(r).max() < 1e-12 * max(1.0, 1 / tau):
            return normalised(logits)
        pi = normalised(logits)
        slope = np.eye(len(P)) - P @ (np.diag(pi) - np.outer(pi, pi)) / tau
        direction = np.linalg.lstsq(slope - slope.mean(0), -r, rcond=None)[0]
        scale = 1.0
        while scale > 1e-9 and np.linalg.norm(residual(logits + scale * direction)) >= np.linalg.norm(r):
            scale /= 2
        logits = centred(logits + scale * direction)
        r = residual(logits)
    raise ConfigError(f"no equilibrium at temperature {tau}", why="float64 does not resolve it", mend="use `nash`")


# Ratings, and what they leave out


def cyclic_fraction(P: np.ndarray, scale: Literal["probability", "logit"] = "probability") -> float:
    """The share of the energy of P - 1/2 (or of logit P) that no rating of the answers explains, in [0, 1].

    The flow A of all pairs is split into the differences of its row means, which a rating explains, and a rest without
    any (Hodge decomposition of the complete graph, all pairs weighing the same). On `logit` it is 0 exactly for a
    Bradley-Terry ladder; 1 where answers only go round. 0 where all answers are equal: there is nothing to explain.

    Raises:
        ConfigError: a probability of 0 or 1 on the scale `logit`.
    """
    if scale == "logit":
        if ((P <= 0) | (P >= 1)).any():
            raise ConfigError("a win rate of 0 or 1 has no logit", mend="use the scale `probability`, or smooth counts")
        flow = np.log(P) - np.log1p(-P)
    else:
        flow = P - 0.5
    rating = flow.mean(1)
    energy = float((flow**2).sum())
    return float(((flow - rating[:, None] + rating) ** 2).sum()) / energy if energy > 0 else 0.0


def bradley_terry(counts: np.ndarray) -> np.ndarray:
    """Maximum-likelihood strengths s [n], of mean 0, from counts[i, j] of i beating j; weights will do for counts.

    Raises:
        ConfigError: some answers never lose to the others, so that no finite strengths are the likeliest.
    """
    n = len(counts)
    reach = np.linalg.matrix_power(np.eye(n) + (counts > 0), n) > 0
    if not reach.all():
        raise ConfigError(
            "no finite Bradley-Terry strengths",
            why="some answers never lost to any of the others",
            mend="compare more, or smooth the counts",
        )
    both = counts + counts.T
    return _strengths(both, counts / np.where(both > 0, both, 1))


def _strengths(weight: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """s [n] of mean 0 with sum_j weight[i, j] (rate[i, j] - sigmoid(s_i - s_j)) = 0 for every i.

    A row of `weight` may be scaled by any number: here to sum 1, so that an answer that hardly ever occurs is rated as
    exactly as the others. Newton's method, halving the step where the residual would not fall.
    """
    weight = weight * (1 - np.eye(len(weight)))
    weight = weight / weight.sum(1, keepdims=True)

    def residual(at: np.ndarray) -> np.ndarray:
        return (weight * (rate - _sigmoid(at[:, None] - at))).sum(1)

    s = np.zeros(len(weight))
    r = residual(s)
    for _ in range(_ROUNDS):
        if np.abs(r).max() < 1e-14:
            break
        p = _sigmoid(s[:, None] - s)
        slope = weight * p * (1 - p)
        slope -= np.diag(slope.sum(1))
        direction = centred(np.linalg.lstsq(slope, -r, rcond=1e-15)[0])
        step = min(1.0, 4 / float(np.abs(direction).max()))
        while step > 1e-9 and np.linalg.norm(residual(s + step * direction)) >= np.linalg.norm(r):
            step /= 2
        if step <= 1e-9:  # rounding: the residual does not fall any more
            break
        s = s + step * direction
        r = residual(s)
    if np.abs(r).max() > 1e-9:
        raise ConfigError("Bradley-Terry strengths do not converge", why=f"{np.abs(r).max():.2g} of a win rate is left")
    return s


def elo_update(ratings: np.ndarray, first: int, second: int, score: float, k: float = 32.0) -> np.ndarray:
    """Elo ratings [n] after `first` scored `score` (1 a win, 1/2 a tie, 0 a loss) against `second`; their sum stays.

    Depends on the order of the games, unlike `bradley_terry`.
    """
    expected = 1 / (1 + 10 ** ((ratings[second] - ratings[first]) / 400))
    after = ratings.astype(float)
    after[first] += k * (score - expected)
    after[second] -= k * (score - expected)
    return after


def win_matrix(counts: np.ndarray, ties: np.ndarray | None = None) -> list[list[Estimate]]:
    """Win rates of row against column with Wilson intervals, ties counting half, from whole counts [n, n]."""
    tied = np.zeros_like(counts) if ties is None else ties
    n = range(len(counts))
    return [[win_rate(int(counts[i, j]), int(counts[j, i]), int(tied[i, j])) for j in n] for i in n]


# Exact steps of a population. Policies are [n]; `rewards` is [n], for example `win_rates(P, pi)`


def exponential_step(pi: np.ndarray, rewards: np.ndarray, step: float) -> np.ndarray:
    """pi exp(step * rewards) / Z: rebel, sppo and spo (their eta is `step`); dno and dpo on pi (1 / `step`)."""
    return normalised(np.log(pi) + step * rewards)


def mwu_step(pi: np.ndarray, P: np.ndarray, step: float) -> np.ndarray:
    """Multiplicative weights against oneself: `exponential_step` on P(y > pi). The last iterate cycles; the mean of
    the iterates has a gap of at most 2 (log n / (step T) + step / 8) after T steps."""
    return exponential_step(pi, win_rates(P, pi), step)


def optimistic_mwu(pi: np.ndarray, previous: np.ndarray, P: np.ndarray, step: float) -> np.ndarray:
    """Multiplicative weights with the rewards 2 P(y > pi) - P(y > previous): the last iterate converges."""
    return exponential_step(pi, 2 * win_rates(P, pi) - win_rates(P, previous), step)


def dno_step(pi: np.ndarray, P: np.ndarray, temperature: float) -> np.ndarray:
    """pi exp(P(y > pi) / temperature) / Z. Source: arXiv 2404.03715."""
    return mwu_step(pi, P, 1 / temperature)


def inpo_step(pi: np.ndarray, P: np.ndarray, ref: np.ndarray, tau: float, temperature: float) -> np.ndarray:
    """ref^(tau/eta) pi^(1 - tau/eta) exp(P(y > pi) / eta) / Z with eta = `temperature`. Source: arXiv 2407.00617.

    `regularised_nash` is a fixed point for every eta.
    """
    share = tau / temperature
    return normalised(share * np.log(ref) + (1 - share) * np.log(pi) + win_rates(P, pi) / temperature)


def nash_md_step(pi: np.ndarray, P: np.ndarray, ref: np.ndarray, tau: float, step: float) -> np.ndarray:
    """mix exp(eta P(y > mix)) / Z with mix = pi^(1 - eta tau) ref^(eta tau), eta = `step`. Source: arXiv 2312.00886."""
    mix = geometric_mixture(pi, ref, step * tau)
    return exponential_step(mix, win_rates(P, mix), step)


def best_response(pi: np.ndarray, P: np.ndarray, ref: np.ndarray, tau: float) -> np.ndarray:
    """ref exp(P(y > pi) / tau) / Z: the best answer to pi under a KL leash."""
    return exponential_step(ref, win_rates(P, pi), 1 / tau)


def preference_step(pi: np.ndarray, P: np.ndarray, anchor: np.ndarray, beta: float) -> np.ndarray:
    """anchor exp(s / beta) / Z, s the Bradley-Terry fit to pairs of pi: dpo to convergence on its own samples."""
    return exponential_step(anchor, _strengths(np.tile(pi, (len(pi), 1)), P), 1 / beta)


def spin_step(pi: np.ndarray, data: np.ndarray, beta: float) -> np.ndarray:
    """pi (data / pi)^(1/beta) / Z: the error in log-odds is multiplied by 1 - 1/beta. Source: arXiv 2401.01335."""
    return alpha_spin_step(pi, pi, data, 0.0, beta)


def alpha_spin_step(pi: np.ndarray, base: np.ndarray, data: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """pi^(1 - alpha) base^alpha (data / pi)^(1/beta) / Z. Source: arXiv 2404.04291.

    Fixed point (data base^(alpha beta))^(1 / (1 + alpha beta)); stable where |1 - alpha - 1/beta| < 1.
    """
    return normalised((1 - alpha - 1 / beta) * np.log(pi) + alpha * np.log(base) + np.log(data) / beta)


def best_of(pi: np.ndarray, rewards: np.ndarray, k: int) -> np.ndarray:
    """The law of the best of k draws, [n]: F(y)^k - F(y-)^k, ties shared in proportion to pi. It is exact raft."""
    below = np.array([pi[rewards < r].sum() for r in rewards])
    level = np.array([pi[rewards == r].sum() for r in rewards])
    return pi / np.where(level > 0, level, 1) * ((below + level) ** k - below**k)


def geometric_mixture(pi: np.ndarray, ref: np.ndarray, share: float) -> np.ndarray:
    """pi^(1 - share) ref^share / Z."""
    return normalised((1 - share) * np.log(pi) + share * np.log(ref))


def kl(pi: np.ndarray, ref: np.ndarray) -> float:
    """KL(pi || ref), nats; an entry 0 of pi counts 0."""
    there = pi > 0
    return float((pi[there] * np.log(pi[there] / ref[there])).sum())


def normalised(logits: np.ndarray) -> np.ndarray:
    """softmax, [n]."""
    return np.exp(logits - _log_sum_exp(logits))


def centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _log_sum_exp(values: np.ndarray) -> float:
    highest = values.max()
    return float(highest + np.log(np.exp(values - highest).sum()))
