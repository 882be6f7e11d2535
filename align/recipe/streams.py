"""What can be said about the streams of a recipe, and about rounds over them, before their data are opened."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from align.core.errors import AlignError, ConfigError, suggestion
from align.recipe.sections import Recipe, Stream

_WINNER = (
    "write a column, {chosen: COLUMN, rejected: COLUMN}, or {column: LABEL, values: {VALUE: COLUMN, VALUE: COLUMN}, "
    "tie: [VALUE]}"
)


def stream_faults(stream: Stream, owner: str, given: Mapping[str, str], where: str) -> Iterator[AlignError]:
    """Yield the faults of one stream. `owner` is its key (`data.train.0`), `given` what was written -> where."""
    yield from _columns(stream, owner, given)
    yield from _winner(stream, owner, given)
    yield from _format(stream, owner, given, where)
    yield from _filters(stream, owner, given)
    if Path(stream.name).expanduser().exists():
        for option in ("config", "data_dir", "revision"):
            if getattr(stream, option) is not None:
                yield ConfigError(
                    f"`{owner}.{option}` is unused",
                    where=given.get(f"{owner}.{option}", where),
                    why=f"`{stream.name}` is a file or folder, and no hub id",
                    mend="remove it",
                )


_BESIDE = ("probability", "margin", "samples", "baseline", "contrasts", "token_reward")
"""Columns of the rows that a policy's own samples do not have."""


def round_faults(recipe: Recipe, given: Mapping[str, str], view: str, needs: Collection[str]) -> Iterator[AlignError]:
    """Yield what `rounds` does not go with."""
    where = given.get("rounds.kind", "") or next((at for key, at in given.items() if key.startswith("rounds.")), "")
    name = recipe.method.name
    found: list[tuple[bool, str, str, str]] = [
        (view != "pairs", f"`{name}` reads {view}", "SeRA chooses pairs", "take a method on pairs"),
        (
            recipe.data.pairs != "best_worst",
            f"`data.pairs: {recipe.data.pairs}`",
            "a row is kept or left out as one pair",
            "write `best_worst`",
        ),
        (
            any(stream.weight != 1 for stream in recipe.data.train),
            "streams with a `weight`",
            "the pairs kept are the mixture",
            "leave `weight` out",
        ),
        (
            recipe.model.peft is not None,
            "`model.peft`",
            "a round starts from the last one's whole policy",
            "train all weights, or merge between runs of your own",
        ),
        (
            recipe.reference.kind in ("ema", "adapter_off"),
            f"`reference.kind: {recipe.reference.kind}`",
            "the reference of every round is the initial model",
            "write `frozen` or `cached`",
        ),
        (
            recipe.train.resume not in ("auto", "never"),
            "`train.resume` from a checkpoint",
            "every round has checkpoints of its own",
            "write `auto`",
        ),
    ]
    missing = [column for column in _BESIDE if column in needs]
    if missing and recipe.rounds is not None and recipe.rounds.bootstrap:
        own = f"pairs of the policy's own samples have no `{missing[0]}`, which `{name}` reads"
        found.append((True, "`rounds.bootstrap` above 0", own, "write `bootstrap: 0`"))
    for wrong, what, why, mend in found:
        if wrong:
            yield ConfigError(f"`rounds` with {what}", where=where, why=why, mend=mend)


def _columns(stream: Stream, owner: str, given: Mapping[str, str]) -> Iterator[AlignError]:
    from align.data.layout import PARTS

    if stream.columns is None:
        return
    place = given.get(f"{owner}.columns", "")
    if not isinstance(stream.columns, Mapping):
        yield ConfigError(
            f"`{owner}.columns` is {stream.columns!r}", where=place, mend="write {PART: COLUMN}, as {prompt: task}"
        )
        return
    for part, column in stream.columns.items():
        here = given.get(f"{owner}.columns.{part}", place)
        if part not in PARTS:
            yield ConfigError(f"`{owner}.columns` names the part `{part}`", where=here, mend=suggestion(part, PARTS))
        elif not isinstance(column, str):
            yield ConfigError(f"`{owner}.columns.{part}` is {column!r}", where=here, mend="give the name of a column")


def _winner(stream: Stream, owner: str, given: Mapping[str, str]) -> Iterator[AlignError]:
    winner, where = stream.winner, given.get(f"{owner}.winner", "")
    if winner is None or isinstance(winner, str):
        return
    forms = ({"chosen", "rejected"}, {"column", "values"}, {"column", "values", "tie"})
    if not isinstance(winner, Mapping) or set(winner) not in forms:
        yield ConfigError(f"`{owner}.winner` is {_short(winner)}", where=where, mend=_WINNER)
    elif "values" in winner:
        values = winner["values"]
        answers = set(map(str, values.values())) if isinstance(values, Mapping) else set()
        if len(answers) != 2:
            here = given.get(f"{owner}.winner.values", where)
            yield ConfigError(
                f"`{owner}.winner.values` names {len(answers)} answer columns, not two", where=here, mend=_WINNER
            )


def _format(stream: Stream, owner: str, given: Mapping[str, str], where: str) -> Iterator[AlignError]:
    from align.core.errors import DataError
    from align.data.known import BY_COLUMNS, by_name

    if stream.format is None or stream.format == BY_COLUMNS:
        return
    place = given.get(f"{owner}.format", where)
    try:
        by_name(stream.format, place)
    except DataError as error:
        yield ConfigError(error.what, where=place, why=error.why, mend=error.mend)
        return
    for option in ("winner", "columns"):
        if getattr(stream, option) is not None:
            yield ConfigError(
                f"`{owner}.{option}` is unused",
                where=given.get(f"{owner}.{option}", where),
                why=f"`format: {stream.format}` says how the rows are read",
                mend=f"remove it, or write `format: {BY_COLUMNS}`",
            )


def _filters(stream: Stream, owner: str, given: Mapping[str, str]) -> Iterator[AlignError]:
    from align.core.errors import DataError
    from align.data.filters import FORMS, filters_of

    filters, place = stream.filters, given.get(f"{owner}.filters", "")
    if filters is None or filters == "recommended":
        return
    if not isinstance(filters, Mapping):
        yield ConfigError(
            f"`{owner}.filters` is {_short(filters)}", where=place, mend="write column: condition; " + FORMS
        )
        return
    for column, condition in filters.items():
        try:
            filters_of({column: condition})
        except DataError as error:
            here = given.get(f"{owner}.filters.{column}", place)
            yield ConfigError(error.what, where=here, why=error.why, mend=error.mend)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
