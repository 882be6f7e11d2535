"""Which completions of a group a view trains on, and with what feedback: pairs of K > 2, labels of pairs, and so on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from align.core.errors import DataError
from align.data.groups import ROLES, Completion, Group, Preference, beside
from align.data.rows import RowError

PairRule = Literal["best_worst", "all", "adjacent"]
VIEWS = ("pairs", "singles", "lists", "groups", "demonstrations", "prompts")


@dataclass(frozen=True, slots=True)
class Selection:
    """The completions used, and the pairs among them by index."""

    completions: tuple[Completion, ...]
    preferences: tuple[Preference, ...] = ()


def check_view(view: str, needs: Collection[str], gives: Collection[str], where: str, read_as: str = "") -> None:
    """Refuse a view that the feedback of a reader (`Reader.gives`, described as `read_as`) cannot make.

    Raises:
        DataError: names what is missing.
    """
    reward_view = view == "singles" and "reward" in needs
    possible: dict[str, set[str]] = {
        "pairs": {"preferences", "order"},
        "singles": {"preferences", "label"} | ({"reward", "order"} if reward_view else set()),
        "lists": {"preferences", "order"},
        "groups": {"preferences", "order"},
        "demonstrations": {"preferences", "label", "order", "demonstrations"},
        "prompts": {"preferences", "label", "order", "demonstrations", "reward", ""},
    }
    if view not in possible:
        raise DataError(f"there is no view `{view}`", mend="use one of " + ", ".join(VIEWS))
    if view == "prompts" or possible[view] & set(gives):
        return
    missing = {
        "pairs": "which of two answers is better (columns chosen/rejected, or completions with scores or ranks)",
        "singles": "a numeric `reward` or a `label`" if reward_view else "a `label` (true or false) for each answer",
        "demonstrations": "answers to imitate (prompt/completion, messages, text, or preferences)",
    }.get(view, "several answers a prompt with `scores` or `ranks`")
    has = ", ".join(f"`{name}`" for name in sorted(gives)) or "prompts only"
    raise DataError(
        f"the method needs {missing}",
        where=where,
        why=f"the rows give {has}; {read_as}".rstrip("; "),
        mend="name the columns with `columns:`, say which answer wins with `winner:`, or take a method of another view",
    )


def select(group: Group, view: str, rule: PairRule, ties: bool, reward: bool) -> Selection:
    """The part of a group that a view trains on.

    Args:
        rule: how pairs are made of more than two answers.
        ties: whether tied pairs are kept.
        reward: whether the method reads rewards (a label then counts as 1 or 0).

    Raises:
        RowError: the row has nothing for this view.
    """
    if view == "pairs":
        return _pairs(group, rule, ties)
    if view == "singles":
        return Selection(_singles(group, ties, reward))
    if view == "demonstrations":
        return Selection((_best(group),))
    if view == "prompts":
        return Selection(())
    return Selection(_list(group, ties))


def _pairs(group: Group, rule: PairRule, ties: bool) -> Selection:
    preferences = group.preferences or _made_pairs(group, rule, ties)
    kept = preferences if ties else tuple(pair for pair in preferences if not pair.tie)
    if not kept:
        raise RowError("", "a tie", dropped=True)
    used = sorted({index for pair in kept for index in (pair.winner, pair.loser)})
    used += [index for index, one in enumerate(group.completions) if beside(one.role) and index not in used]
    place = {index: new for new, index in enumerate(used)}
    return Selection(
        tuple(group.completions[index] for index in used),
        tuple(replace(pair, winner=place[pair.winner], loser=place[pair.loser]) for pair in kept),
    )


def _made_pairs(group: Group, rule: PairRule, ties: bool) -> tuple[Preference, ...]:
    """Pairs of a scored list; those of one prompt share weight 1 (times the row's weight)."""
    # Samples and demonstrations stand behind the judged ones, so indices stay.
    group = replace(group, completions=tuple(one for one in group.completions if not beside(one.role)))
    value = _value_of(group)
    order = sorted(range(len(group.completions)), key=lambda index: (-value(index), index))
    if len(order) < 2:
        raise RowError("", "one answer only: no pair", dropped=True)
    if rule == "best_worst":
        candidates = [(order[0], order[-1])]
    elif rule == "adjacent":
        candidates = list(itertools.pairwise(order))
    else:
        candidates = [(better, worse) for place, better in enumerate(order) for worse in order[place + 1 :]]
    pairs = [pair for pair in candidates if ties or value(pair[0]) > value(pair[1])]
    scored = group.completions[0].reward is not None
    return tuple(
        Preference(
            winner,
            loser,
            probability=0.5 if value(winner) == value(loser) else None,
            margin=value(winner) - value(loser) if scored else None,
            weight=group.completions[winner].weight / len(pairs),
            tie=value(winner) == value(loser),
        )
        for winner, loser in pairs
    )


def _value_of(group: Group) -> Callable[[int], float]:
    """Higher is better."""
    completions = group.completions
    if completions and all(completion.reward is not None for completion in completions):
        return lambda index: float(completions[index].reward or 0.0)
    if completions and all(completion.rank is not None for completion in completions):
        return lambda index: -float(completions[index].rank or 0)
    raise RowError("", "nothing tells which answer is better")


def _singles(group: Group, ties: bool, reward: bool) -> tuple[Completion, ...]:
    if not group.preferences:
        own = (completion for completion in group.completions if not beside(completion.role))
        return _with_extras([_single(completion, reward) for completion in own], group)
    singles: list[Completion] = []
    for pair in group.preferences:
        if pair.tie and not ties:
            continue
        for index, good in ((pair.winner, True), (pair.loser, False)):
            singles.append(
                replace(
                    group.completions[index], label=good, reward=float(good) if reward else None, weight=pair.weight
                )
            )
    if not singles:
        raise RowError("", "a tie", dropped=True)
    return _with_extras(singles, group)


def _with_extras(singles: list[Completion], group: Group) -> tuple[Completion, ...]:
    """The judged answers and what stands beside them; a sample that is an undesirable answer stays out."""
    undesirable = {completion.text for completion in singles if completion.label is False}
    extras = [completion for completion in group.completions if beside(completion.role)]
    kept = [one for one in extras if one.role != ROLES["samples"] or one.text not in undesirable]
    if len(kept) < len(extras) and not any(one.role == ROLES["samples"] for one in kept):
        raise RowError("samples", "all equal the undesirable answer", dropped=True)
    return (*singles, *kept)


def _single(completion: Completion, reward: bool) -> Completion:
    if reward and completion.reward is None:
        if completion.label is None:
            raise RowError("reward", "missing")
        return replace(completion, reward=float(completion.label))
    if not reward and completion.label is None:
        raise RowError("label", "missing")
    return completion


def _list(group: Group, ties: bool) -> tuple[Completion, ...]:
    if group.preferences:
        (pair, *more) = group.preferences
        if more:
            raise RowError("", "several pairs of one prompt are no list without scores or ranks")
        if pair.tie and not ties:
            raise RowError("", "a tie", dropped=True)
        winner, loser = (0.5, 0.5) if pair.tie else (1.0, 0.0)
        return (
            replace(group.completions[pair.winner], reward=winner, weight=pair.weight),
            replace(group.completions[pair.loser], reward=loser, weight=pair.weight),
        )
    value = _value_of(group)
    if len(group.completions) < 2:
        raise RowError("", "one answer only: no list", dropped=True)
    if not ties and len({value(index) for index in range(len(group.completions))}) == 1:
        raise RowError("", "a tie", dropped=True)
    return group.completions


def _best(group: Group) -> Completion:
    """The answer to imitate: a winner, the best of a list, a desirable one, a demonstration."""
    if group.preferences:
        pair = next((pair for pair in group.preferences if not pair.tie), None)
        if pair is None:
            raise RowError("", "a tie", dropped=True)
        return replace(group.completions[pair.winner], weight=pair.weight)
    if not group.completions:
        raise RowError("completion", "missing")
    if len(group.completions) > 1:
        value = _value_of(group)
        return group.completions[max(range(len(group.completions)), key=lambda index: (value(index), -index))]
    (only,) = group.completions
    if only.label is False:
        raise RowError("label", "an undesirable answer is no demonstration", dropped=True)
    return only
