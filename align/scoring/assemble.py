"""From token groups to trees, and from the engine's outputs to a view: the two ends of a forward pass.

Branches of a group are its completions, then its mismatched completions. Outputs are [N, T] tensors whose N rows are
the branches of all groups in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from align.core.errors import ConfigError, DataError, suggestion
from align.core.seeds import derive
from align.data.groups import CONTRASTS, ROLES, Preference, RowId, TokenCompletion, TokenGroup, beside
from align.scoring.layout import Tree
from align.scoring.views import (
    TOKEN_COLUMNS,
    VIEWS,
    Completions,
    Demonstrations,
    Groups,
    Lists,
    Pairs,
    Singles,
    View,
    win_shares,
)

SAMPLE_ROLE, BASELINE_ROLE = ROLES["samples"], ROLES["baseline"]

REFERENCE_COLUMNS = frozenset({"ref_logp"})
VALUE_COLUMNS = frozenset({"value"})
DATA_COLUMNS = frozenset(
    {
        "label",
        "reward",
        "rewards",
        "token_reward",
        "sampler_logp",
        "advantage",
        "probability",
        "margin",
        "mismatched",
        "baseline",
        "samples",
        "contrasts",
        "scored_prompts",
        "scores",
        "ranks",
        "marked",
        "step",
        "ties",
        "key",
        "finished",
        "role",
    }
)
PREVIOUS_COLUMNS = frozenset({"old_logp"})
ANCHOR = "anchor."
"""`anchor.NAME` is the column of log-probs of another frozen policy, or of the reference after another prompt."""
TWO_MODEL_COLUMNS = frozenset({"kl_ref_policy", "kl_policy_ref", "cross_entropy"})
ENGINE_COLUMNS = frozenset(TOKEN_COLUMNS) - REFERENCE_COLUMNS - DATA_COLUMNS - PREVIOUS_COLUMNS


class Declares(Protocol):
    """What `columns_needed` reads of a method (methods stand on a higher floor)."""

    def requires(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class ColumnsNeeded:
    """Where each column of a method comes from.

    Attributes:
        engine: `logp` and vocabulary functionals of the policy's own forward pass, with gradient.
        reference: of the reference's forward pass or the cache.
        previous: of the policy before the step or round.
        value: of the value role.
        data: of the rows.
        anchors: `anchor.NAME`, log-probs of other frozen policies or after other prompts.
    """

    engine: frozenset[str]
    reference: frozenset[str]
    previous: frozenset[str]
    value: frozenset[str]
    data: frozenset[str]
    anchors: frozenset[str] = frozenset()

    @property
    def live_reference(self) -> bool:
        """Whether the reference's hidden states are needed beside the policy's, which a cache cannot give."""
        return bool(self.engine & TWO_MODEL_COLUMNS)

    @property
    def outputs(self) -> frozenset[str]:
        """Every column that `make_view` expects in `outputs`."""
        return self.engine | self.reference | self.previous | self.value | self.anchors

    @property
    def frozen(self) -> frozenset[str]:
        """Outputs that carry no gradient and are the same in a second pass over a batch."""
        return self.reference | self.anchors | self.previous


def columns_needed(method: Declares) -> ColumnsNeeded:
    """Sort what a method instance requires by origin.

    Raises:
        ConfigError: for a name that no part produces.
    """
    needs = method.requires()
    known = ENGINE_COLUMNS | REFERENCE_COLUMNS | PREVIOUS_COLUMNS | VALUE_COLUMNS | DATA_COLUMNS
    anchors = frozenset(name for name in needs if name.startswith(ANCHOR))
    for name in sorted(needs - known - anchors):
        raise ConfigError(f"no part of align produces the column `{name}`", mend=suggestion(name, known))
    return ColumnsNeeded(
        engine=(needs & ENGINE_COLUMNS) | {"logp"},
        reference=needs & REFERENCE_COLUMNS,
        previous=needs & PREVIOUS_COLUMNS,
        value=needs & VALUE_COLUMNS,
        data=needs & DATA_COLUMNS,
        anchors=anchors,
    )


def trees_of(groups: Sequence[TokenGroup], context: str = "") -> list[Tree]:
    """One tree a group; branches are the completions, then the mismatched completions.

    `context` names the prompt of `TokenGroup.contexts` that takes the place of the group's own.
    """
    trees = []
    for group in groups:
        branches = (*group.completions, *group.mismatched)
        prompt = group.contexts[context] if context else group.prompt
        trees.append(Tree(prompt, tuple(b.ids for b in branches), tuple(b.mask for b in branches)))
    return trees


def placeholder_outputs(groups: Sequence[TokenGroup], needs: Iterable[str]) -> dict[str, Tensor]:
    """Zeros in the shape of the outputs; the terms of a loss of them have the unit counts of the real ones."""
    lengths = [len(branch) for group in groups for branch in (*group.completions, *group.mismatched)]
    n, width = len(lengths), max(lengths, default=0)
    wanted = {"logp", *needs}
    outputs = {name: torch.zeros(n, width) for name in wanted if name in TOKEN_COLUMNS or name.startswith(ANCHOR)}
    if "value" in needs:
        outputs["value"] = torch.zeros(n, width + 1)
    return outputs


def make_view(
    view: str,
    groups: Sequence[TokenGroup],
    outputs: Mapping[str, Tensor],
    *,
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> View:
    """Join the engine's outputs with what the data say.

    Args:
        view: a name of `views.VIEWS`.
        groups: those whose branches the rows of `outputs` are.
        outputs: name -> [N, T] (`value`: [N, T + 1]); `logp` always. Gradients pass through.
        state, seed: of the view.
        dtype: floating dtype of all columns of the view; outputs of another one are converted.

    Raises:
        ConfigError: unknown view, or outputs of other shapes than the groups'.
        DataError: feedback that the view needs is missing in some of the groups.
    """
    if view not in VIEWS:
        raise ConfigError(f"unknown view `{view}`", mend="one of " + ", ".join(VIEWS))
    shared: dict[str, Any] = {"state": state or {}, "seed": seed}
    branches = _Branches(groups, outputs, dtype)
    if view == "pairs":
        return _pairs(branches, shared)
    if view in ("lists", "groups"):
        return _lists(Groups if view == "groups" else Lists, branches, shared)
    return _singles(Demonstrations if view == "demonstrations" else Singles, branches, shared)


class _Branches:
    """All branches of some groups with their columns; `take(index)` makes the Completions at these rows."""

    def __init__(self, groups: Sequence[TokenGroup], outputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.groups, self.dtype = groups, dtype
        self.all: list[TokenCompletion] = []
        self.starts: list[int] = []
        for group in groups:
            self.starts.append(len(self.all))
            self.all += group.completions
            self.all += group.mismatched
        self.keys = [
            completion_key(group.row, place)
            for group in groups
            for place in range(len(group.completions) + len(group.mismatched))
        ]
        self.device = outputs["logp"].device
        width = outputs["logp"].shape[-1]
        lengths = np.fromiter((len(branch.ids) for branch in self.all), np.int64, len(self.all))
        _check_shapes(outputs, len(self.all), int(lengths.max(initial=0)), width)
        filled = np.arange(width) < lengths[:, None]
        mask = np.zeros(filled.shape, bool)
        step = np.zeros(filled.shape, np.int64)
        if self.all:
            mask[filled] = np.concatenate([branch.mask for branch in self.all])
            step[filled] = np.concatenate([branch.step for branch in self.all])
        self.mask = torch.from_numpy(mask).to(self.device)
        given = {name: column.to(dtype) for name, column in outputs.items()}
        self.columns = {name: column for name, column in given.items() if not name.startswith(ANCHOR)}
        self.anchors = {n.removeprefix(ANCHOR): column for n, column in given.items() if n.startswith(ANCHOR)}
        self.columns["step"] = torch.from_numpy(step).to(self.device)

    def floats(self, values: Sequence[float | None]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)

    def index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def completions(self) -> list[int]:
        """Rows of the groups' completions, without the mismatched ones."""
        starts = zip(self.starts, self.groups, strict=True)
        return [start + i for start, group in starts for i in range(len(group.completions))]

    def take(self, rows: Sequence[int]) -> Completions:
        picked = [self.all[row] for row in rows]
        index = self.index(rows)
        whole = len(rows) == len(self.all) and all(i == row for i, row in enumerate(rows))
        columns = self.columns if whole else {name: c.index_select(0, index) for name, c in self.columns.items()}
        columns = dict(columns)
        columns["weight"] = self.floats([one.weight for one in picked])
        columns["finished"] = torch.tensor([one.finished for one in picked], device=self.device)
        columns["key"] = self.index([self.keys[row] for row in rows])
        if picked and all(one.label is not None for one in picked):
            columns["label"] = torch.tensor([bool(one.label) for one in picked], device=self.device)
        if picked and all(one.reward is not None for one in picked):
            columns["reward"] = self.floats([one.reward for one in picked])
        if picked and all(one.step_rewards is not None for one in picked):
            columns["token_reward"] = self._token_rewards(picked, int(columns["step"].shape[1]))
        for name in self._carried(picked):
            columns.setdefault(name, self._token_column(picked, name))
        aspects = [name for name in (picked[0].rewards if picked else ()) if all(name in one.rewards for one in picked)]
        return Completions(
            mask=self.mask if whole else self.mask.index_select(0, index),
            columns=columns,
            anchors={name: column.index_select(0, index) for name, column in self.anchors.items()},
            rewards={name: self.floats([one.rewards[name] for one in picked]) for name in aspects},
            role=tuple(one.role for one in picked) if any(one.role for one in picked) else (),
        )

    def _token_rewards(self, picked: Sequence[TokenCompletion], width: int) -> Tensor:
        """Each step's reward at its last scored token, [N, T]; a step whose end was cut earned nothing."""
        table = np.zeros((len(picked), width))
        for row, one in zip(table, picked, strict=True):
            whole = one.step[-1] + one.finished
            for step in np.unique(one.step[one.mask]):
                if step < whole:
                    row[np.flatnonzero(one.mask & (one.step == step))[-1]] = (one.step_rewards or ())[step]
        return torch.from_numpy(table).to(self.device, self.dtype)

    def _carried(self, picked: Sequence[TokenCompletion]) -> list[str]:
        """Names of the columns that came with every one of these completions."""
        return [name for name in (picked[0].columns if picked else ()) if all(name in one.columns for one in picked)]

    def _token_column(self, picked: Sequence[TokenCompletion], name: str) -> Tensor:
        return torch.from_numpy(padded_column(picked, name, int(self.mask.shape[1]))).to(self.device, self.dtype)

    def marked(self, completions: Completions, marks: Sequence[np.ndarray | None]) -> Completions:
        """The completions with a `marked` column, where each has marks."""
        if not marks or any(own is None for own in marks):
            return completions
        table = np.zeros(tuple(completions.mask.shape), dtype=bool)
        for row, own in zip(table, marks, strict=True):
            if own is not None:
                row[: len(own)] = own
        columns = {**completions.columns, "marked": torch.from_numpy(table).to(self.device)}
        return replace(completions, columns=columns)


def padded_column(completions: Sequence[TokenCompletion], name: str, width: int) -> np.ndarray:
    """A column that came with the tokens, float64 [N, width], 0 behind the end of a completion."""
    table = np.zeros((len(completions), width))
    for row, one in zip(table, completions, strict=True):
        row[: len(one)] = one.columns[name]
    return table


@lru_cache(maxsize=1 << 16)
def completion_key(row: RowId, place: int) -> int:
    """A number in [0, 2**63) of a row and the place of a branch in it, for what a method draws or keeps for each."""
    return derive(0, "completion", row.source, row.row, place)


def _check_shapes(outputs: Mapping[str, Tensor], n: int, longest: int, width: int) -> None:
    for name, column in outputs.items():
        expected = (n, width + 1) if name == "value" else (n, width)
        if tuple(column.shape) != expected or width < longest:
            raise ConfigError(
                f"output `{name}` has shape {tuple(column.shape)}",
                why=f"the groups have {n} branches of up to {longest} tokens",
                mend=f"give {expected[0]} x at least {longest + (name == 'value')}",
            )


def _pairs(branches: _Branches, shared: Mapping[str, Any]) -> Pairs:
    chosen: list[int] = []
    rejected: list[int] = []
    preferences: list[Preference] = []
    baseline: list[int] = []
    samples: list[int] = []
    owner: list[int] = []
    contrasts: list[int] = []
    contrast_owner: list[int] = []
    for start, group in zip(branches.starts, branches.groups, strict=True):
        if not group.preferences:
            continue
        paired = {i for preference in group.preferences for i in (preference.winner, preference.loser)}
        others = [(i, one.role) for i, one in enumerate(group.completions) if i not in paired]
        demonstrations = [start + i for i, role in others if role == BASELINE_ROLE]
        own_samples = [start + i for i, role in others if role == SAMPLE_ROLE]
        own_contrasts = [start + i for i, role in others if role.partition(":")[0] in CONTRASTS]
        for preference in group.preferences:
            samples += own_samples
            owner += [len(preferences)] * len(own_samples)
            contrasts += own_contrasts
            contrast_owner += [len(preferences)] * len(own_contrasts)
            baseline += demonstrations[:1]
            chosen.append(start + preference.winner)
            rejected.append(start + preference.loser)
            preferences.append(preference)
    pairs = len(preferences)
    if baseline and len(baseline) != pairs:
        raise DataError("some prompts of this batch have a baseline response and some have none")
    if samples and len(set(owner)) != pairs:
        raise DataError("some prompts of this batch have samples and some have none")
    margins = [preference.margin for preference in preferences]
    return Pairs(
        chosen=branches.marked(branches.take(chosen), [p.marks and p.marks[0] for p in preferences]),
        rejected=branches.marked(branches.take(rejected), [p.marks and p.marks[1] for p in preferences]),
        probability=branches.floats([1.0 if p.probability is None else p.probability for p in preferences]),
        weight=branches.floats([p.weight for p in preferences]),
        margin=branches.floats(margins) if pairs and None not in margins else None,
        baseline=branches.take(baseline) if baseline else None,
        samples=branches.take(samples) if samples else None,
        sample_pair=branches.index(owner) if samples else None,
        contrasts=branches.take(contrasts) if contrasts else None,
        contrast_pair=branches.index(contrast_owner) if contrasts else None,
        **shared,
    )


def _singles(cls: type[Singles], branches: _Branches, shared: Mapping[str, Any]) -> View:
    mismatched = [
        start + len(group.completions) + i
        for start, group in zip(branches.starts, branches.groups, strict=True)
        for i in range(len(group.mismatched))
    ]
    rows: list[int] = []
    samples: list[int] = []
    owner: list[int] = []
    for start, group in zip(branches.starts, branches.groups, strict=True):
        drawn = [start + i for i, one in enumerate(group.completions) if one.role == SAMPLE_ROLE]
        for i, one in enumerate(group.completions):
            if not beside(one.role):
                samples += drawn
                owner += [len(rows)] * len(drawn)
                rows.append(start + i)
    if samples and len(set(owner)) != len(rows):
        raise DataError("some prompts of this batch have samples and some have none")
    if mismatched and len(mismatched) != len(rows):
        raise DataError("some completions of this batch have a mismatched partner and some have none")
    return cls(
        completions=branches.take(rows),
        mismatched=branches.take(mismatched) if mismatched else None,
        samples=branches.take(samples) if samples else None,
        sample_of=branches.index(owner) if samples else None,
        **shared,
    )


def _lists(cls: type[Lists], branches: _Branches, shared: Mapping[str, Any]) -> View:
    completions = branches.take(branches.completions())
    sizes = [len(group.completions) for group in branches.groups]
    own_ranks = [[one.rank for one in group.completions if one.rank is not None] for group in branches.groups]
    ranks = [rank for own in own_ranks for rank in own]
    ranked = bool(ranks) and len(ranks) == len(completions)
    scores = completions.columns.get("reward")
    if scores is None and ranked:
        scores = branches.floats([share for own in own_ranks for share in win_shares(own)])
    ones = torch.ones_like(completions.weight)
    return cls(
        # The completions' weights are those of their list (`_group_weight`), and must not count twice.
        completions=replace(completions, columns={**completions.columns, "weight": ones}),
        group=branches.index(np.repeat(np.arange(len(sizes)), sizes).tolist()),
        weight=branches.floats([_group_weight(group) for group in branches.groups]),
        scores=scores,
        ranks=branches.index(ranks) if ranked else None,
        **shared,
    )


def _group_weight(group: TokenGroup) -> float:
    """The weight of a list: that of its row, which the readers give to each of its completions."""
    weights = {one.weight for one in group.completions}
    if len(weights) != 1:
        raise DataError(
            f"the completions of a list have the weights {sorted(weights)}",
            where=str(group.row),
            why="a list is one unit, with one weight",
            mend="give the row one `weight`",
        )
    return weights.pop()
