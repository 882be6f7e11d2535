"""`terms`: a method's loss on bare numbers, without a model, in float64; for tests, notebooks and reviewers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.core.errors import ConfigError, raise_all, suggestion
from align.core.options import build
from align.core.registry import METHODS
from align.methods.base import Method, Terms, finish
from align.scoring.views import (
    TOKEN_COLUMNS,
    Completions,
    Demonstrations,
    Groups,
    Lists,
    Pairs,
    Singles,
    View,
    win_shares,
)

Row = Mapping[str, Any]

_SCALARS = {"label": torch.bool, "finished": torch.bool, "reward": None, "weight": None, "key": torch.long}
_SCALAR_DEFAULTS = {"weight": 1.0, "finished": True}
_SEQUENCES = (*TOKEN_COLUMNS, "mask", "step", "marked", "value")
COMPLETION_FIELDS = (*_SEQUENCES, *_SCALARS, "anchor", "rewards", "role")
SINGLE_FIELDS = (*COMPLETION_FIELDS, "mismatched", "samples")
PAIR_FIELDS = ("chosen", "rejected", "probability", "margin", "weight", "baseline", "samples", "contrasts")
LIST_FIELDS = ("completions", "scores", "ranks", "weight")


def terms(
    name: str | type[Method] | Method,
    options: Mapping[str, Any] | None = None,
    *,
    pairs: Sequence[Row] | None = None,
    singles: Sequence[Row] | None = None,
    lists: Sequence[Row] | None = None,
    groups: Sequence[Row] | None = None,
    demonstrations: Sequence[Row] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Terms:
    """Evaluate a method in float64 on the rows of its view.

    Args:
        name: a registered id, `my_pkg.my_file:MyMethod`, a method class, or an instance (then without `options`).
        options: by their public names (`lambda`, not `lambda_`).
        pairs: dicts of `PAIR_FIELDS`; `chosen`, `rejected`, `baseline` are completions, `samples` a list of them.
        singles, demonstrations: completions; in singles with `mismatched`, a completion, and `samples`, a list of them.
        lists, groups: dicts of `completions` and, one number each, `scores` and `ranks`.
        state: the method's state before the step; its initial one by default.

    A completion is a dict of `COMPLETION_FIELDS`: lists of T numbers (`value`: T + 1), numbers, `anchor`
    {name: [T]} and `rewards` {aspect: number}. Lengths may differ between completions. Tensors are taken too, and
    keep their gradient.

    Returns:
        Terms whose values carry the rows' weights; `.total()` is the loss, `.state` what the method would carry on.

    Raises:
        ConfigError: an unknown method, option, field or state, a missing field, or rows of another view.
    """
    method = make_method(name, options)
    given = {"pairs": pairs, "singles": singles, "lists": lists, "groups": groups, "demonstrations": demonstrations}
    named = [view for view, rows in given.items() if rows is not None]
    if named != [method.view]:
        raise ConfigError(
            f"method `{method.id}` reads `{method.view}`, not {' and '.join(f'`{n}`' for n in named) or 'nothing'}",
            mend=f"call terms(..., {method.view}=[...])",
        )
    view = make_bare_view(
        method.view, given[method.view] or [], requires=method.requires(), state=_state(method, state)
    )
    view = view.only(method.reads())
    result = finish(method.loss(view), view)
    return Terms(result.terms, result.counts, method.observe(view))


def make_method(name: str | type[Method] | Method, options: Mapping[str, Any] | None = None) -> Method:
    """An instance from an id, class or instance and public option names; all errors of the options at once."""
    if isinstance(name, Method):
        if options:
            raise ConfigError("options given beside a method instance", mend="pass the class, or set them in it")
        return name
    cls = METHODS.get(name) if isinstance(name, str) else name
    instance, errors = build(cls, f"method `{cls.id}`", options or {})
    raise_all(errors)
    return instance


def make_bare_view(
    view: str,
    rows: Sequence[Row],
    *,
    requires: Iterable[str] = (),
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    width: int = 0,
) -> View:
    """The view of `terms` rows. `width` pads completions to at least that many tokens.

    `requires` names columns without which a row is refused.
    """
    reader = _Reader(dtype, width, frozenset(requires))
    shared: dict[str, Any] = {"state": dict(state or {}), "seed": seed}
    if not rows:
        raise ConfigError(f"`{view}` is empty", mend="give at least one row")
    if view == "pairs":
        return reader.pairs(rows, shared)
    if view in ("lists", "groups"):
        return reader.lists(Groups if view == "groups" else Lists, view, rows, shared)
    if view == "demonstrations":
        return Demonstrations(completions=reader.completions(_named(view, rows), COMPLETION_FIELDS), **shared)
    return reader.singles(rows, shared)


def _state(method: Method, given: Mapping[str, Any] | None) -> dict[str, Tensor]:
    state = dict(method.initial_state())
    for name, value in (given or {}).items():
        if name not in state:
            mend = suggestion(name, state) if state else "leave `state` out"
            raise ConfigError(f"method `{method.id}` has no state `{name}`", mend=mend)
        state[name] = torch.as_tensor(value, dtype=state[name].dtype)
    return state


def _named(view: str, rows: Sequence[Row], part: str = "") -> list[tuple[str, Row]]:
    return [(f"{view}[{i}]{part}", row) for i, row in enumerate(rows)]


def _check_fields(where: str, row: Any, known: Sequence[str]) -> None:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is {type(row).__name__}", mend="give a dict of " + ", ".join(known))
    for name in row:
        if name not in known:
            raise ConfigError(f"{where}: unknown field `{name}`", mend=suggestion(str(name), known))


@dataclass(frozen=True)
class _Reader:
    """Reads rows of one call: all completions get one dtype and width rule, and are checked for required columns."""

    dtype: torch.dtype
    width: int
    requires: frozenset[str] = field(default_factory=frozenset)

    def pairs(self, rows: Sequence[Row], shared: Mapping[str, Any]) -> Pairs:
        for where, row in _named("pairs", rows):
            _check_fields(where, row, PAIR_FIELDS)
        samples, owner = self._samples(rows, "pairs")
        contrasts, contrast_owner = self._samples(rows, "pairs", "contrasts")
        baseline = self._optional(rows, "pairs", "baseline")
        margin = self._optional(rows, "pairs", "margin")
        return Pairs(
            chosen=self._member(rows, "chosen"),
            rejected=self._member(rows, "rejected"),
            probability=self._numbers(self._optional(rows, "pairs", "probability") or [1.0] * len(rows)),
            weight=self._numbers([row.get("weight", 1.0) for row in rows]),
            margin=None if margin is None else self._numbers(margin),
            baseline=None if baseline is None else self._member(rows, "baseline"),
            samples=samples,
            sample_pair=owner,
            contrasts=contrasts,
            contrast_pair=contrast_owner,
            **shared,
        )

    def singles(self, rows: Sequence[Row], shared: Mapping[str, Any]) -> Singles:
        own = self.completions(_named("singles", rows), SINGLE_FIELDS)
        others = self._optional(rows, "singles", "mismatched")
        named = _named("singles", others or [], ".mismatched")
        feedback = _Reader(self.dtype, self.width, self.requires - {"label", "reward", "value"})
        samples, owner = feedback._samples(rows, "singles")
        return Singles(
            completions=own,
            mismatched=feedback.completions(named, COMPLETION_FIELDS) if others is not None else None,
            samples=samples,
            sample_of=owner,
            **shared,
        )

    def lists(self, cls: type[Lists], view: str, rows: Sequence[Row], shared: Mapping[str, Any]) -> Lists:
        for where, row in _named(view, rows):
            _check_fields(where, row, LIST_FIELDS)
            for name in ("scores", "ranks"):
                if row.get(name) is not None and len(row[name]) != len(row["completions"]):
                    raise ConfigError(f"{where}: `{name}` has not one number per completion")
        flat = [
            (f"{view}[{i}].completions[{j}]", one)
            for i, row in enumerate(rows)
            for j, one in enumerate(row["completions"])
        ]
        completions = self.completions(flat, COMPLETION_FIELDS)
        ranks = self._optional(rows, view, "ranks", required=False)
        scores = self._optional(rows, view, "scores", required=False)
        values = completions.columns.get("reward")
        if scores is not None:
            values = self._numbers([score for own in scores for score in own])
        elif values is None and ranks is not None:
            values = self._numbers([share for own in ranks for share in win_shares(own)])
        if values is None and "scores" in self.requires:
            raise ConfigError(f"{view}[0]: missing field `scores`", mend="give `scores`, `ranks` or rewards")
        owner = [i for i, row in enumerate(rows) for _ in row["completions"]]
        return cls(
            completions=completions,
            group=torch.tensor(owner),
            weight=self._numbers([row.get("weight", 1.0) for row in rows]),
            scores=values,
            ranks=None if ranks is None else torch.tensor([rank for own in ranks for rank in own]),
            **shared,
        )

    def completions(self, named: Sequence[tuple[str, Row]], known: Sequence[str]) -> Completions:
        """Completions from (where, row); a field that one row has, all must have."""
        for where, row in named:
            _check_fields(where, row, known)
        rows = [row for _, row in named]
        present = {name for row in rows for name in row if name not in ("mismatched", "samples", "role")}
        needed = (self.requires & set(COMPLETION_FIELDS)) | {"logp"}
        for where, row in named:
            for name in sorted((needed | present) - set(_SCALAR_DEFAULTS) - {"mask", "step"}):
                if name not in row:
                    raise ConfigError(f"{where}: missing field `{name}`", mend="every completion here must have it")
            for name in sorted(n for n in self.requires if n.startswith("anchor.")):
                if name.removeprefix("anchor.") not in row.get("anchor", {}):
                    raise ConfigError(f"{where}: missing field `{name}`", mend="every completion here must have it")
        lengths = [len(row["logp"]) for row in rows]
        defaults: dict[str, Any] = {"mask": 1, "step": 0}
        columns: dict[str, Tensor] = {}
        present |= needed & {*_SCALAR_DEFAULTS, *defaults}
        for name in sorted(present & set(_SEQUENCES) | {"mask"}):
            default = defaults.get(name)
            filled = [(w, row.get(name, [default] * n)) for (w, row), n in zip(named, lengths, strict=True)]
            columns[name] = self._sequences(name, filled, lengths)
        for name in sorted(present & set(_SCALARS)):
            values = [row.get(name, _SCALAR_DEFAULTS.get(name)) for row in rows]
            columns[name] = self._numbers(values, _SCALARS[name])
        return Completions(
            mask=columns.pop("mask"),
            columns=columns,
            anchors={
                key: self._sequences(f"anchor.{key}", [(where, row["anchor"][key]) for where, row in named], lengths)
                for key in _keys(named, "anchor")
            },
            rewards={key: self._numbers([row["rewards"][key] for row in rows]) for key in _keys(named, "rewards")},
            role=tuple(row.get("role", "") for row in rows) if any("role" in row for row in rows) else (),
        )

    def _samples(
        self, rows: Sequence[Row], view: str, name: str = "samples"
    ) -> tuple[Completions | None, Tensor | None]:
        """The completions that all rows list under `name`, and the row that each belongs to."""
        samples = self._optional(rows, view, name) or []
        flat = [(f"{view}[{i}].{name}[{j}]", one) for i, own in enumerate(samples) for j, one in enumerate(own)]
        owner = [i for i, own in enumerate(samples) for _ in own]
        if samples and name == "samples" and len(set(owner)) != len(rows):
            raise ConfigError(f"a row of `{view}` has an empty `samples`", mend="give every row at least one sample")
        return (self.completions(flat, COMPLETION_FIELDS), torch.tensor(owner)) if flat else (None, None)

    def _member(self, rows: Sequence[Row], name: str) -> Completions:
        for where, row in _named("pairs", rows):
            if name not in row:
                raise ConfigError(f"{where}: missing field `{name}`")
        return self.completions(_named("pairs", [row[name] for row in rows], f".{name}"), COMPLETION_FIELDS)

    def _optional(self, rows: Sequence[Row], view: str, name: str, required: bool | None = None) -> list[Any] | None:
        """The values of a field that all rows have or none; an error where some have it, or it is required."""
        missing = [i for i, row in enumerate(rows) if row.get(name) is None]
        needed = name in self.requires if required is None else required
        if len(missing) == len(rows) and not needed:
            return None
        if missing:
            raise ConfigError(f"{view}[{missing[0]}]: missing field `{name}`", mend="every row here must have it")
        return [row[name] for row in rows]

    def _numbers(self, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
        tensors = [torch.as_tensor(value, dtype=dtype or self.dtype) for value in values]
        return torch.stack(tensors) if tensors else torch.zeros(0, dtype=dtype or self.dtype)

    def _sequences(self, name: str, named: Sequence[tuple[str, Any]], lengths: Sequence[int]) -> Tensor:
        extra = int(name == "value")
        dtype = {"mask": torch.bool, "marked": torch.bool, "step": torch.long}.get(name, self.dtype)
        rows = []
        for (where, values), length in zip(named, lengths, strict=True):
            if len(values) != length + extra:
                raise ConfigError(
                    f"{where}: `{name}` has {len(values)} numbers, `logp` {length}",
                    mend=f"give {length + extra}" + (" (one per state, the last after the end)" if extra else ""),
                )
            rows.append(torch.as_tensor(values, dtype=dtype))
        padded = pad_sequence(rows, batch_first=True)
        short = self.width + extra - padded.shape[1]
        return torch.nn.functional.pad(padded, (0, short)) if short > 0 else padded


def _keys(named: Sequence[tuple[str, Row]], name: str) -> list[str]:
    """The keys of a dict field, which must be the same for all completions."""
    found = [(where, set(row.get(name, ()))) for where, row in named]
    everything = set().union(*(keys for _, keys in found)) if found else set()
    for where, keys in found:
        for key in sorted(everything - keys):
            raise ConfigError(f"{where}: missing field `{name}.{key}`", mend="every completion here must have it")
    return sorted(everything)
