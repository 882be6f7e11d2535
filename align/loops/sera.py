"""SeRA: between rounds, keep the pairs of large implicit margin and add pairs that the policy makes of its own samples.

An add-on for any objective on pairs (arXiv 2410.09362). h is the log-ratio of the last round's policy to the initial
reference, summed over scored tokens, and m = h(chosen) - h(rejected), without beta. A round t >= 2 trains on

    offline pairs:  the keep * N with the largest (1 - g) m_{t-1} + g m_{t-2}
    own pairs:      of R samples a prompt the one of largest and the one of smallest h; those of the largest margins

and round 1 on everything. The reference of the training stays the initial one. Adding any f(x) to the reference
changes nothing here. Margins are sums, so long answers are favoured; `per_token` takes means over tokens instead.
Selection keeps what the model believes already: rounds must be short (noise that was memorised has a large margin), and
`Report` says how lengths and sources move. The paper's fractions and g are given here from memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.core.errors import ConfigError, DataError
from align.core.options import check_all, option
from align.core.progress import Progress, silent
from align.data.groups import Group, RowId, TokenGroup
from align.data.readers import reader_for
from align.data.rows import RowError
from align.data.tokenise import Tokeniser
from align.evaluate.sides import Side
from align.sampling.base import SamplingParams
from align.scoring.assemble import trees_of
from align.scoring.layout import Tree

Margins = Mapping[str, float]
"""Id of a row (`FILE:LINE`, `NAME row NUMBER`) -> its margin in nats; a round keeps them for the next."""


@dataclass(frozen=True, kw_only=True)
class Sera:
    """Options of a round."""

    keep: float = option(0.7, above=0, at_most=1, doc="share of the offline pairs that is kept; published 0.5 to 0.8")
    bootstrap: float = option(0.3, at_least=0, doc="own pairs added, as a share of the offline pairs kept")
    samples: int = option(4, at_least=2, doc="samples a prompt, R")
    ensemble: float = option(0.3, at_least=0, at_most=1, doc="weight g of the margins of the round before the last")
    per_token: bool = option(False, doc="log-ratios as means over tokens instead of sums")

    def __post_init__(self) -> None:
        check_all(self, "sera")


@dataclass(frozen=True)
class Drawn:
    """A pair that the policy made: a row to train on, and its margin."""

    row: Mapping[str, Any]
    margin: float


@dataclass(frozen=True)
class Report:
    """What a selection did: rows by source; mean characters of chosen and rejected answers, before and after."""

    offline: int
    kept: int
    own: int
    before: tuple[float, float]
    after: tuple[float, float]


def log_ratios(
    policy: Side, reference: Side, groups: Sequence[TokenGroup], per_token: bool = False
) -> list[np.ndarray]:
    """h of every completion: per group float64 [K], the sum (or mean) over scored tokens of log pi - log pi_ref."""
    trees = trees_of(groups)
    found = []
    for tree, ours, theirs in zip(trees, policy.logp(trees), reference.logp(trees), strict=True):
        found.append(_ratios(tree, ours, theirs, per_token))
    return found


def pair_margins(
    rows: Sequence[Mapping[str, Any]],
    policy: Side,
    reference: Side,
    *,
    tokenise: Tokeniser | None = None,
    per_token: bool = False,
    name: str = "rows",
) -> dict[str, float]:
    """Margins of rows of pairs (any format that is read as pairs), by row id `NAME row NUMBER`.

    A row that is bad, tied or too long has none.
    """
    own, groups = [dict(row) for row in rows], []
    reader = reader_for(own, where=name)
    tokenise = tokenise or Tokeniser(policy.tokenizer, "pairs")
    for number, row in enumerate(own):
        try:
            groups.append(tokenise(reader(row, RowId(name, number))))
        except RowError:
            continue
    ratios = log_ratios(policy, reference, groups, per_token)
    return {
        str(group.row): float(h[group.preferences[0].winner] - h[group.preferences[0].loser])
        for group, h in zip(groups, ratios, strict=True)
    }


def ensemble(last: Margins, before: Margins | None, weight: float) -> dict[str, float]:
    """(1 - weight) * last + weight * before; `last` alone for a row that had no margin before, or without `before`."""
    earlier = before or {}
    return {row: (1 - weight) * m + weight * earlier.get(row, m) for row, m in last.items()}


def largest(margins: Margins, count: int) -> list[str]:
    """Ids of the `count` largest margins, largest first; equal margins in the order of their ids."""
    return sorted(margins, key=lambda row: (-margins[row], row))[:count]


def best_and_worst(h: Sequence[float]) -> tuple[int, int, float]:
    """(index of the largest log-ratio, of the smallest, their difference); the first of equal ones."""
    best, worst = int(np.argmax(h)), int(np.argmin(h))
    return best, worst, float(h[best] - h[worst])


def bootstrap(
    prompts: Sequence[Group],
    policy: Side,
    reference: Side,
    options: Sera,
    params: SamplingParams,
    progress: Progress = silent,
) -> list[Drawn]:
    """A pair of the policy's own samples for each prompt that has two different finished ones."""
    asked = [group.prompt for group in prompts]
    ids, drawn = policy.sample(asked, [group.tools for group in prompts], options.samples, params, progress)
    kept = [[one for one in own if one.finished and one.text.strip()] for own in drawn]
    places = [i for i, own in enumerate(kept) if len({one.text for one in own}) > 1]
    trees = [Tree.of(ids[i], [one.ids.tolist() for one in kept[i]]) for i in places]
    found = []
    for i, tree, ours, theirs in zip(places, trees, policy.logp(trees), reference.logp(trees), strict=True):
        best, worst, margin = best_and_worst(_ratios(tree, ours, theirs, options.per_token).tolist())
        texts = {"chosen": kept[i][best].text, "rejected": kept[i][worst].text}
        if texts["chosen"] != texts["rejected"]:
            found.append(Drawn(_row(prompts[i], texts), margin))
    return found


def select_round(
    rows: Sequence[Mapping[str, Any]],
    options: Sera,
    last: Margins | None = None,
    before: Margins | None = None,
    own: Sequence[Drawn] = (),
    name: str = "rows",
) -> tuple[list[Mapping[str, Any]], Report]:
    """The rows to train on: all of them in round 1 (no `last`), else the kept ones in their order, then own pairs.

    Args:
        last, before: margins of the policies of the last round and of the one before, by row id.
        own: pairs of the policy's samples, of which the largest margins are taken.

    Raises:
        ConfigError: own pairs in round 1.
        DataError: margins that are not of these rows.
    """
    if last is None:
        if own:
            raise ConfigError("sera: round 1 has no policy of its own yet", mend="leave `own` out, or give `last`")
        return list(rows), _report(rows, rows, [])
    ids = {str(RowId(name, number)): row for number, row in enumerate(rows)}
    strange = next((row for row in last if row not in ids), None)
    if strange is not None:
        raise DataError(
            f"sera: a margin of row `{strange}`, which is not among the rows", mend=f"name them `{name} row 0` ..."
        )
    chosen = set(kept_rows(last, before, options))
    kept = [row for row_id, row in ids.items() if row_id in chosen]
    added = strongest(own, len(kept), options)
    return [*kept, *added], _report(rows, kept, added)


def kept_rows(last: Margins, before: Margins | None, options: Sera) -> list[str]:
    """Ids of the offline pairs that a round keeps, the largest margin first; at least one."""
    margins = ensemble(last, before, options.ensemble)
    return largest(margins, max(1, round(options.keep * len(margins))))


def strongest(own: Sequence[Drawn], kept: int, options: Sera) -> list[Mapping[str, Any]]:
    """Rows of the own pairs that a round adds to `kept` offline ones, the largest margin first."""
    order = sorted(range(len(own)), key=lambda i: (-own[i].margin, i))[: round(options.bootstrap * kept)]
    return [own[i].row for i in order]


def _ratios(tree: Tree, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], per_token: bool) -> np.ndarray:
    sums = [float((a - b)[mask].sum()) for a, b, mask in zip(ours, theirs, tree.scored, strict=True)]
    tokens = [int(mask.sum()) if per_token else 1 for mask in tree.scored]
    return np.array(sums) / np.maximum(tokens, 1)


def _row(group: Group, texts: Mapping[str, str]) -> dict[str, Any]:
    if isinstance(group.prompt, str):
        return {"prompt": group.prompt, **texts}
    spoken = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
    return {"prompt": list(group.prompt), **spoken}


def _report(
    rows: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], added: Sequence[Mapping[str, Any]]
) -> Report:
    return Report(len(rows), len(kept), len(added), _lengths(rows), _lengths([*kept, *added]))


def _lengths(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean characters of the chosen and the rejected answer, where the rows have columns of these names."""

    def characters(value: Any) -> int:
        return len(value) if isinstance(value, str) else sum(len(str(turn.get("content"))) for turn in value or ())

    sides = [[characters(row.get(side)) for row in rows] for side in ("chosen", "rejected")]
    return tuple(float(np.mean(own)) if own else 0.0 for own in sides)  # type: ignore[return-value]
