"""Rules that make preference pairs (or demonstrations) of a prompt's judged answers: pure functions of its numbers.

Missing feedback is never the worst: such an answer takes part in no comparison. Empty answers take part in nothing. A
tie and two equal texts make no pair; both are counted, like everything else that a prompt's pair is lost to.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from align.core.errors import AlignError, ConfigError
from align.core.options import check_all, option, public_name
from align.data.comparisons import Label, tournament
from align.data.rollouts import RolloutGroup

Rule = Literal[
    "best_worst",
    "best_random",
    "random",
    "margin",
    "length_matched",
    "tournament",
    "by_origin",
    "all",
    "top",
    "top_share",
]
DATA = "data"
"""Origins of answers that nobody sampled begin with it."""
_OF_RULE: Mapping[str, tuple[str, ...]] = {
    "margin": ("margin", "own_margin", "least_score"),
    "length_matched": ("length_tolerance",),
    "by_origin": ("chosen_from", "rejected_from"),
    "top_share": ("share",),
}
_WITHOUT_FEEDBACK = ("by", "scale", "length_penalty", "label", "reward")
_SINGLE = ("top", "top_share")
_BY_TWO = ("random", "all", "length_matched", "tournament")
"""Rules that compare two answers with each other, where others look at the score of each."""


@dataclass(frozen=True, kw_only=True)
class PairSpec:
    """How pairs are made of judged answers; the options that a rule does not name are refused with it.

    `best_worst`: RLHFlow (arXiv 2405.07863), BW of PF-PPO (2409.06957); `best_random`: its BR; `margin`: DNO
    (2404.03715); `tournament`: INPO (2407.00617); `by_origin`: SPIN (2401.01335); `top` and `top_share`: RAFT
    (2304.06767).
    """

    rule: Rule = option(doc="which answers become a pair; `top`, `top_share`: which become demonstrations")
    by: Literal["reward", "wins"] | None = option(None, doc="what answers are ordered by; null: what was judged")
    margin: float = option(0.0, at_least=0, doc="least gap between chosen and rejected, with `rule: margin`")
    own_margin: float | None = option(
        None, at_least=0, doc="least gap where the policy wrote the chosen one; null: same"
    )
    least_score: float | None = option(None, doc="least score of a chosen answer, with `rule: margin`")
    length_tolerance: float = option(
        0.2, at_least=0, doc="largest difference in tokens, as a share of the longer answer"
    )
    chosen_from: str = option(DATA, doc="origin of chosen answers, with `rule: by_origin`")
    rejected_from: str = option("policy", doc="origin of rejected answers, with `rule: by_origin`")
    share: float = option(0.2, above=0, at_most=1, doc="best part of all answers, with `rule: top_share`")
    unfinished: Literal["keep", "drop", "reject"] = option("keep", doc="answers that were cut: `reject`: never chosen")
    length_penalty: float = option(0.0, at_least=0, doc="taken off a score for each token")
    scale: float | None = option(None, above=0, doc="P(i beats j) = sigmoid(scale * (score i - score j)) of rewards")
    label: Label = option("hard", doc="hard: the better one; sampled: drawn from P; prob: P as `probability`")
    reward: Literal["score", "win_rate"] = option("score", doc="what `chosen_reward` and `rejected_reward` hold")
    seed: int = option(0, at_least=0, doc="seed of what is drawn")

    def __post_init__(self) -> None:
        check_all(self, "pairs")


def unused(rule: str) -> dict[str, str]:
    """Options that a rule does not read -> why."""
    found = {
        name: f"it belongs to `rule: {owner}`" for owner, names in _OF_RULE.items() if owner != rule for name in names
    }
    if rule == "by_origin":
        found |= dict.fromkeys(_WITHOUT_FEEDBACK, "`rule: by_origin` asks for no feedback")
    if rule in _SINGLE:
        found |= dict.fromkeys(("label", "scale", "reward"), f"`rule: {rule}` makes demonstrations")
    if rule not in ("best_random", "random"):
        found["seed"] = "nothing is drawn"
    return found


def faults(spec: PairSpec, given: Mapping[str, str]) -> Iterator[AlignError]:
    """Yield what does not fit together. `given`: option that was written -> where."""
    for name, why in unused(spec.rule).items():
        if name == "seed" and spec.label == "sampled":
            continue
        if name in given:
            yield ConfigError(f"`pairs.{public_name(name)}` is unused", where=given[name], why=why, mend="remove it")
    if spec.by == "wins" and spec.scale is not None:
        yield ConfigError(
            "`pairs.scale` is unused",
            where=given.get("scale", ""),
            why="`by: wins` has probabilities already",
            mend="remove it",
        )
    if spec.rule == "by_origin" and spec.chosen_from == spec.rejected_from:
        yield ConfigError(
            f"`pairs.chosen_from` and `pairs.rejected_from` are both `{spec.chosen_from}`",
            where=given.get("chosen_from", given.get("rejected_from", "")),
            mend="name two origins",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """A prompt's K answers in numbers.

    Attributes:
        score: float64 [K], what answers are ordered by: reward or win rate, less the length penalty; NaN is missing.
        wins: float64 [K, K], P(i beats j), NaN where it is not known.
        win_rate: float64 [K], see `rates_against`.
        length: int64 [K], tokens. finished, empty: bool [K].
        origin, text: K each.
        direct: whether two answers are compared by `wins` and not by their scores.
    """

    score: np.ndarray
    wins: np.ndarray
    win_rate: np.ndarray
    length: np.ndarray
    finished: np.ndarray
    empty: np.ndarray
    origin: tuple[str, ...]
    text: tuple[str, ...]
    direct: bool

    def __len__(self) -> int:
        return len(self.score)

    def gap(self, first: int, second: int) -> float:
        """How much better `first` is: P - 1/2 where the two were compared, else the difference of scores."""
        return float(self.wins[first, second] - 0.5 if self.direct else self.score[first] - self.score[second])


@dataclass(frozen=True, slots=True)
class Pair:
    """Indices of two answers; `probability` that the chosen one wins, `margin` of their scores: NaN where unknown."""

    chosen: int
    rejected: int
    probability: float = np.nan
    margin: float = np.nan
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Selected:
    """What became of a prompt: its pairs, or single answers, or the reason why there are none; answers left out."""

    pairs: tuple[Pair, ...] = ()
    singles: tuple[int, ...] = ()
    lost: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)


def rates_against(wins: np.ndarray, opponents: np.ndarray) -> np.ndarray:
    """float64 [K]: P(y > pi_t) of each answer, the mean of its row of `wins` over the policy's own answers.

    An answer of the policy meets itself too, with 1/2, as in SPPO's code (arXiv 2405.00675): the mean over the policy's
    answers is then 1/2, and P - 1/2 is (K - 1)/K of what it is without. Unknown comparisons are left out of the mean;
    an answer that met nobody else has NaN.

    Args:
        wins: float64 [K, K]. opponents: bool [K], the policy's answers.
    """
    among = np.array(wins, dtype=np.float64)
    np.fill_diagonal(among, 0.5)
    among[:, ~opponents] = np.nan
    known = ~np.isnan(among)
    others = known & ~np.eye(len(among), dtype=bool)
    sums = np.where(known, among, 0.0).sum(axis=1)
    return np.where(others.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), np.nan)


def candidates(group: RolloutGroup, spec: PairSpec, weights: Mapping[str, float] | None = None) -> Candidates:
    """The numbers of a group.

    Args:
        weights: of the rewards by name, see `RolloutGroup.rewards`.

    Raises:
        ConfigError: answers have rewards and were compared too, and `by` does not say which counts; a label needs P and
            there is no `scale`; a length penalty where answers are compared by P.
    """
    rewards = group.rewards(weights)
    direct = spec.rule != "by_origin" and (spec.by or _by(group)) == "wins"
    _check(spec, direct)
    length = np.array([len(answer) for answer in group.answers], dtype=np.int64)
    wins = np.full((len(group), len(group)), np.nan)
    if direct and group.wins is not None:
        wins = np.array(group.wins, dtype=np.float64)
    elif not direct and spec.scale is not None:
        wins = _sigmoid(spec.scale * (rewards[:, None] - rewards[None, :]))
    own = np.array([not answer.origin.startswith(DATA) for answer in group.answers], dtype=bool)
    rates = rates_against(wins, own)
    return Candidates(
        score=(rates if direct else rewards) - spec.length_penalty * length,
        wins=wins,
        win_rate=rates,
        length=length,
        finished=np.array([answer.finished for answer in group.answers], dtype=bool),
        empty=np.array([not answer.text.strip() for answer in group.answers], dtype=bool),
        origin=tuple(answer.origin for answer in group.answers),
        text=tuple(answer.text for answer in group.answers),
        direct=direct,
    )


def select(one: Candidates, spec: PairSpec, rng: np.random.Generator) -> Selected:
    """The pairs of a prompt, or for `top` its best answer. Draws only from `rng`."""
    usable, left_out = _usable(one, spec)
    if spec.rule == "top":
        best = usable[int(np.argmax(one.score[usable]))] if len(usable) else -1
        return Selected(singles=(int(best),), left_out=left_out) if best >= 0 else Selected((), (), "missing", left_out)
    if spec.rule != "by_origin" and len(usable) < 2:
        return Selected(lost=_why_few(one, left_out), left_out=left_out)
    found, lost = _RULES[spec.rule](one, usable, spec, rng)
    pairs = [(chosen, rejected) for chosen, rejected in found if one.text[chosen] != one.text[rejected]]
    if not pairs:
        return Selected(lost="identical" if found else lost, left_out=left_out)
    labelled = [_labelled(one, *pair, spec, rng) for pair in pairs]
    whole = tuple(pair for pair in labelled if spec.label == "hard" or not np.isnan(pair.probability))
    return Selected(whole, lost="" if whole else "missing", left_out=left_out)


def top_share(groups: Sequence[Candidates], spec: PairSpec) -> list[Selected]:
    """The best `share` of all usable answers of all prompts, RAFT's `top`: at least one; of equals the earlier."""
    usable = [_usable(one, spec) for one in groups]
    scores = [(-one.score[k], number, int(k)) for number, one in enumerate(groups) for k in usable[number][0]]
    kept: dict[int, list[int]] = {}
    for _, number, k in sorted(scores)[: max(1, round(spec.share * len(scores)))]:
        kept.setdefault(number, []).append(k)
    return [
        Selected(
            singles=tuple(sorted(kept.get(number, ()))),
            lost="" if number in kept else "not among the best" if len(which) else "missing",
            left_out=left_out,
        )
        for number, (which, left_out) in enumerate(usable)
    ]


Found = tuple[list[tuple[int, int]], str]
"""Ordered pairs (chosen, rejected), and why there are none."""


def _best_worst(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    best, worst = _extreme(one, _may_win(one, usable, spec), np.argmax), _extreme(one, usable, np.argmin)
    if best is None or worst is None:
        return [], "unfinished"
    return ([(best, worst)], "") if one.score[best] > one.score[worst] else ([], "tie")


def _best_random(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    best = _extreme(one, _may_win(one, usable, spec), np.argmax)
    if best is None:
        return [], "unfinished"
    below = [int(k) for k in usable if one.score[k] < one.score[best] and one.text[k] != one.text[best]]
    return ([(best, below[int(rng.integers(len(below)))])], "") if below else ([], "tie")


def _random(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    first, second = (int(k) for k in rng.choice(usable, 2, replace=False))
    return _ordered(one, [(first, second)], spec)


def _all(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    return _ordered(one, list(itertools.combinations(map(int, usable), 2)), spec)


def _margin(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    """The pair of largest gap among those that pass: a chosen answer of the policy's own may need another gap (DNO)."""
    best: tuple[float, int, int] | None = None
    for chosen in map(int, _may_win(one, usable, spec)):
        own = not one.origin[chosen].startswith(DATA)
        least = spec.own_margin if own and spec.own_margin is not None else spec.margin
        if spec.least_score is not None and one.score[chosen] < spec.least_score:
            continue
        rejected = _extreme(one, usable, np.argmin)
        gap = float(one.score[chosen] - one.score[rejected])
        if gap > 0 and gap >= least and (best is None or gap > best[0]):
            best = gap, chosen, int(rejected or 0)
    if best is not None:
        return [best[1:]], ""
    return [], "tie" if np.ptp(one.score[usable]) == 0 else "margin"


def _length_matched(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    near = [
        (int(a), int(b))
        for a, b in itertools.combinations(usable, 2)
        if abs(one.length[a] - one.length[b]) <= spec.length_tolerance * max(one.length[a], one.length[b])
    ]
    if not near:
        return [], "length"
    ordered, lost = _ordered(one, near, spec)
    best = max(ordered, key=lambda pair: one.gap(*pair), default=None)
    return ([best], "") if best is not None else ([], lost)


def _tournament(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    """The winner of a knock-out against its loser, where it wins against that one too (INPO's final check)."""
    wins = np.array([[0.5 if a == b else _says(one.gap(int(a), int(b))) for b in usable] for a in usable])
    played = tournament(wins)
    if played.winner is None or played.loser is None:
        return [], "missing"
    winner, loser = int(usable[played.winner]), int(usable[played.loser])
    if spec.unfinished == "reject" and not one.finished[winner]:
        return [], "unfinished"
    if played.kept:
        return [(winner, loser)], ""
    return [], "missing" if np.isnan(one.gap(winner, loser)) else "tie" if one.gap(
        winner, loser
    ) == 0 else "final check"


def _by_origin(one: Candidates, usable: np.ndarray, spec: PairSpec, rng: np.random.Generator) -> Found:
    """Every answer of one origin under the first of the other."""
    chosen = [int(k) for k in _may_win(one, usable, spec) if one.origin[k] == spec.chosen_from]
    rejected = [int(k) for k in usable if one.origin[k] == spec.rejected_from]
    return ([(chosen[0], k) for k in rejected], "") if chosen and rejected else ([], "origin")


_RULES: Mapping[str, Callable[[Candidates, np.ndarray, PairSpec, np.random.Generator], Found]] = {
    "best_worst": _best_worst,
    "best_random": _best_random,
    "random": _random,
    "margin": _margin,
    "length_matched": _length_matched,
    "tournament": _tournament,
    "by_origin": _by_origin,
    "all": _all,
}


def _ordered(one: Candidates, pairs: Sequence[tuple[int, int]], spec: PairSpec) -> Found:
    """The better of two answers first. Only hard labels leave a tie out: a drawn label, or P, takes it as it is."""
    found, lost = [], Counter[str]()
    for first, second in pairs:
        gap = one.gap(first, second)
        chosen, rejected = (first, second) if gap >= 0 else (second, first)
        if np.isnan(gap):
            lost["missing"] += 1
        elif gap == 0 and spec.label == "hard":
            lost["tie"] += 1
        elif spec.unfinished == "reject" and not one.finished[chosen]:
            lost["unfinished"] += 1
        else:
            found.append((chosen, rejected))
    return found, lost.most_common(1)[0][0] if lost else ""


def _says(gap: float) -> float:
    """1, 0 or 1/2 by the sign of a gap; NaN where it is not known."""
    return float(0.5 * (1.0 + np.sign(gap)))


def _labelled(one: Candidates, chosen: int, rejected: int, spec: PairSpec, rng: np.random.Generator) -> Pair:
    probability = float(one.wins[chosen, rejected])
    if spec.rule == "by_origin":
        return Pair(chosen, rejected, margin=float(one.score[chosen] - one.score[rejected]))
    # A draw for every pair, whatever its probability: what the next pair gets does not depend on it.
    swapped = spec.label == "sampled" and bool(rng.random() >= probability)
    if swapped:
        chosen, rejected, probability = rejected, chosen, 1 - probability
    return Pair(chosen, rejected, probability, float(one.score[chosen] - one.score[rejected]), swapped)


def _usable(one: Candidates, spec: PairSpec) -> tuple[np.ndarray, dict[str, int]]:
    """Indices that may take part, and how many may not, by reason; each answer by its first."""
    missing = np.isnan(one.score) if spec.rule != "by_origin" else np.zeros(len(one), dtype=bool)
    cut = ~one.finished if spec.unfinished == "drop" else np.zeros(len(one), dtype=bool)
    counts = {
        "empty": int(one.empty.sum()),
        "missing": int((missing & ~one.empty).sum()),
        "unfinished": int((cut & ~missing & ~one.empty).sum()),
    }
    return np.flatnonzero(~(one.empty | missing | cut)), {name: count for name, count in counts.items() if count}


def _may_win(one: Candidates, usable: np.ndarray, spec: PairSpec) -> np.ndarray:
    return usable[one.finished[usable]] if spec.unfinished == "reject" else usable


def _extreme(one: Candidates, among: np.ndarray, which: Callable[..., np.intp]) -> int | None:
    """The first of the best (`np.argmax`) or worst (`np.argmin`) answers."""
    return int(among[int(which(one.score[among]))]) if len(among) else None


def _why_few(one: Candidates, left_out: Mapping[str, int]) -> str:
    """The commonest reason for fewer than two usable answers."""
    return max(left_out, key=lambda name: left_out[name]) if left_out else "one answer"


def _check(spec: PairSpec, direct: bool) -> None:
    if not direct and spec.scale is None and (spec.label != "hard" or spec.reward == "win_rate"):
        option_ = f"label: {spec.label}" if spec.label != "hard" else "reward: win_rate"
        raise ConfigError(
            f"`pairs.{option_}` needs the probability that one answer beats another",
            why="there are rewards, and nothing says how a difference of rewards becomes a probability",
            mend="write `pairs.scale: 1` (Bradley-Terry), or judge by a pairwise feedback",
        )
    if direct and spec.length_penalty and spec.rule in _BY_TWO:
        raise ConfigError(
            "`pairs.length_penalty` is unused",
            why=f"`rule: {spec.rule}` compares two answers by the probability that one beats the other",
            mend="remove it, or write `by: reward`",
        )


def _by(group: RolloutGroup) -> Literal["reward", "wins"]:
    if group.wins is None:
        return "reward"
    if not any(answer.rewards for answer in group.answers):
        return "wins"
    raise ConfigError(
        "answers have rewards and were compared with each other too",
        where="pairs.by",
        why="`pairs.by` does not say which of the two orders them",
        mend="write `by: reward` or `by: wins`",
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))
