"""What a method sees: completions with their per-token numbers, and the ways they are grouped.

Shapes: N completions, padded to T tokens; P pairs; G groups. Every [N, T] tensor is zero where `mask` is false.
Views hold tensors and arithmetic only, so a method can be evaluated on bare numbers in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from align.core.errors import ConfigError

TOKEN_COLUMNS = (
    "logp",
    "ref_logp",
    "old_logp",
    "sampler_logp",
    "kl_ref_policy",
    "kl_policy_ref",
    "cross_entropy",
    "entropy",
    "log_sum_sq",
    "log_max",
    "logit",
    "logsumexp",
    "token_reward",
    "advantage",
)
COMPLETION_COLUMNS = ("label", "reward", "weight", "finished", "key")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else `dtype`: sums over tokens and losses are never taken in half precision."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def wide(values: Tensor) -> Tensor:
    """`values` in `wide_dtype`."""
    return values.to(wide_dtype(values.dtype))


@dataclass(frozen=True, eq=False)
class Completions:
    """N completions of up to T tokens.

    Attributes:
        mask: bool [N, T], true where a token is scored.
        columns: name -> tensor; [N, T] for `TOKEN_COLUMNS`, `step` and `marked`, [N, T + 1] for `value`
            (V of the state before each token, and of the end), [N] for `COMPLETION_COLUMNS`.
        anchors: name -> [N, T], log-probabilities of other frozen policies.
        rewards: aspect -> [N].
        role: N strings, free labels such as `sample` or `demonstration`.
    """

    mask: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    anchors: Mapping[str, Tensor] = field(default_factory=dict)
    rewards: Mapping[str, Tensor] = field(default_factory=dict)
    role: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.mask.shape[0]

    def column(self, name: str) -> Tensor:
        try:
            return self.columns[name]
        except KeyError:
            raise ConfigError(
                f"this view has no `{name}`",
                why="columns present: " + ", ".join(sorted(self.columns)),
                mend=f"declare it: @method(..., needs={{'{name}'}}), or supply it in the data",
            ) from None

    def anchor(self, name: str) -> Tensor:
        try:
            return self.anchors[name]
        except KeyError:
            raise ConfigError(
                f"this view has no anchor `{name}`", why="anchors present: " + ", ".join(sorted(self.anchors))
            ) from None

    @property
    def logp(self) -> Tensor:
        """log pi(y_t | x, y_<t) under the policy, [N, T]."""
        return self.column("logp")

    @property
    def ref_logp(self) -> Tensor:
        """The same under the reference, [N, T], no gradient."""
        return self.column("ref_logp")

    @property
    def old_logp(self) -> Tensor:
        return self.column("old_logp")

    @property
    def sampler_logp(self) -> Tensor:
        return self.column("sampler_logp")

    @property
    def kl_ref_policy(self) -> Tensor:
        """KL(reference || policy) over the vocabulary at each position, [N, T]."""
        return self.column("kl_ref_policy")

    @property
    def kl_policy_ref(self) -> Tensor:
        """KL(policy || reference) over the vocabulary at each position, [N, T]."""
        return self.column("kl_policy_ref")

    @property
    def cross_entropy(self) -> Tensor:
        """-sum_v q(v) log pi(v) at each position with q of the reference, [N, T]."""
        return self.column("cross_entropy")

    @property
    def entropy(self) -> Tensor:
        return self.column("entropy")

    @property
    def log_sum_sq(self) -> Tensor:
        """log sum_v pi(v)^2, [N, T]."""
        return self.column("log_sum_sq")

    @property
    def log_max(self) -> Tensor:
        """log max_v pi(v), [N, T]."""
        return self.column("log_max")

    @property
    def logit(self) -> Tensor:
        return self.column("logit")

    @property
    def logsumexp(self) -> Tensor:
        return self.column("logsumexp")

    @property
    def token_reward(self) -> Tensor:
        return self.column("token_reward")

    @property
    def advantage(self) -> Tensor:
        """What shaping made of the rewards, [N, T], no gradient."""
        return self.column("advantage")

    @property
    def value(self) -> Tensor:
        """V(s_t) for t = 0..T, [N, T + 1]; V(s_0) stands at the last prompt token."""
        return self.column("value")

    @property
    def step(self) -> Tensor:
        return self.column("step")

    @property
    def marked(self) -> Tensor:
        """bool [N, T], true where the token is in a segment that differs from the pair's other answer."""
        return self.column("marked")

    @property
    def label(self) -> Tensor:
        """bool [N], true where the completion is desirable."""
        return self.column("label")

    @property
    def reward(self) -> Tensor:
        return self.column("reward")

    @property
    def weight(self) -> Tensor:
        """[N]; 1 where the data say nothing."""
        given = self.columns.get("weight")
        return torch.ones(len(self), device=self.mask.device) if given is None else given

    @property
    def key(self) -> Tensor:
        """long [N], a number of the row and the completion's place in it: the same in every epoch, order and split."""
        return self.column("key")

    @property
    def finished(self) -> Tensor:
        return self.column("finished")

    def sum(self, values: Tensor) -> Tensor:
        """Sum of [N, T] values over scored tokens, [N]; in float32 where they are of half precision."""
        return torch.where(self.mask, wide(values), 0.0).sum(-1)

    @property
    def length(self) -> Tensor:
        """Scored tokens of each completion, [N], in the dtype of a sum of `logp`."""
        return self.mask.sum(-1).to(wide_dtype(self.logp.dtype))

    @property
    def sum_logp(self) -> Tensor:
        return self.sum(self.logp)

    @property
    def mean_logp(self) -> Tensor:
        """log pi(y | x) / |y|, [N]."""
        return self.sum_logp / self.length.clamp(min=1)

    @property
    def sum_ref_logp(self) -> Tensor:
        return self.sum(self.ref_logp)

    @property
    def log_ratio(self) -> Tensor:
        """h_t = log pi(y_t) - log pi_ref(y_t), [N, T]."""
        return wide(self.logp) - wide(self.ref_logp)

    @property
    def sum_log_ratio(self) -> Tensor:
        """h = log pi(y | x) - log pi_ref(y | x), [N]. Per token first: a difference of long sums rounds."""
        return self.sum(self.log_ratio)

    @property
    def mean_log_ratio(self) -> Tensor:
        return self.sum_log_ratio / self.length.clamp(min=1)

    def select(self, index: Tensor) -> Completions:
        """The completions at `index` (long [M]), in that order."""
        picked = index.tolist() if self.role else ()
        return Completions(
            mask=self.mask.index_select(0, index),
            columns={name: column.index_select(0, index) for name, column in self.columns.items()},
            anchors={name: column.index_select(0, index) for name, column in self.anchors.items()},
            rewards={name: column.index_select(0, index) for name, column in self.rewards.items()},
            role=tuple(self.role[i] for i in picked),
        )

    def only(self, names: Collection[str]) -> Completions:
        """The same without the columns that are not named; `logp` and `weight` stay."""
        kept = {"logp", "weight", *names}
        return replace(
            self,
            columns={name: column for name, column in self.columns.items() if name in kept},
            anchors={name: column for name, column in self.anchors.items() if f"anchor.{name}" in kept},
            rewards=self.rewards if "rewards" in kept else {},
        )

    def detach(self) -> Completions:
        return replace(
            self,
            columns={name: column.detach() for name, column in self.columns.items()},
            anchors={name: column.detach() for name, column in self.anchors.items()},
        )


@dataclass(frozen=True, eq=False)
class View:
    """What all views share: the method's checkpointed state, and how to count units.

    `seed` is a function of (run seed, step): what a method draws inside a step comes from it and from `rows`.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    own_unit = "completion"
    feedback: ClassVar[Mapping[str, str]] = {}
    """Field -> the column that a method declares to see it; the field is None where it does not."""

    def counts(self) -> dict[str, int]:
        """Unit -> how many of it this view holds."""
        raise NotImplementedError

    def only(self, names: Collection[str]) -> Self:
        """The view without what these names do not declare: a method cannot read it, by a default in silence or so."""
        changed: dict[str, Any] = {name: None for name, column in self.feedback.items() if column not in names}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Completions) and one.name not in changed:
                changed[one.name] = value.only(names)
        return replace(self, **changed)

    def weights(self) -> dict[str, Tensor]:
        """Unit -> weight of each of them, where the view has weights."""
        return {}


@dataclass(frozen=True, eq=False)
class Pairs(View):
    """P pairs: `chosen` and `rejected` are Completions of length P, aligned.

    Attributes:
        probability: [P] P(chosen beats rejected); 1 where the data say nothing.
        margin: [P] or None, how much better the chosen one is, in the data's unit.
        weight: [P] multiplies the values, never a count.
        baseline: Completions of length P or None, a third response (RPO's baseline).
        samples: M Completions or None, samples of a frozen policy for the same prompts.
        sample_pair: long [M] or None, the pair that each sample belongs to; every pair has at least one.
        contrasts: M Completions or None, answers after other prompts; `role` is `KIND:NUMBER:SIGN`: the sign with which
            the log-ratio enters contrast NUMBER of the pair, KIND being `intra` (one answer) or `inter` (a pair).
        contrast_pair: long [M] or None, the pair that each of them belongs to.
    """

    chosen: Completions
    rejected: Completions
    probability: Tensor
    weight: Tensor
    margin: Tensor | None = None
    baseline: Completions | None = None
    samples: Completions | None = None
    sample_pair: Tensor | None = None
    contrasts: Completions | None = None
    contrast_pair: Tensor | None = None

    own_unit = "pair"
    feedback: ClassVar[Mapping[str, str]] = {
        "margin": "margin",
        "baseline": "baseline",
        "samples": "samples",
        "sample_pair": "samples",
        "contrasts": "contrasts",
        "contrast_pair": "contrasts",
    }

    def only(self, names: Collection[str]) -> Self:
        made = super().only(names)
        if "probability" not in names:
            object.__delattr__(made, "probability")
        return made

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "probability":
                raise ConfigError(
                    "this view has no `probability`",
                    mend="declare it: @method(..., needs={'probability'}), or takes={'probability'} where it may be 1",
                )
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def delta(self) -> Tensor:
        """h(chosen) - h(rejected), [P]."""
        return self.chosen.sum_log_ratio - self.rejected.sum_log_ratio

    def counts(self) -> dict[str, int]:
        tokens = int(self.chosen.mask.sum()) + int(self.rejected.mask.sum())
        return {"pair": len(self), "completion": 2 * len(self), "token": tokens}

    def weights(self) -> dict[str, Tensor]:
        """Values in unit `token` are [P, T]; in unit `completion` [2 P], the chosen before the rejected."""
        return {"pair": self.weight, "token": self.weight, "completion": torch.cat([self.weight, self.weight])}


@dataclass(frozen=True, eq=False)
class Singles(View):
    """N completions judged one by one (`label` or `reward`).

    `mismatched` [N], where the method needs it: another row's completion after the same prompt. `samples` are M
    samples of a frozen policy for the same prompts, and `sample_of` (long [M]) the completion that each belongs to:
    every completion has at least one.
    """

    completions: Completions
    mismatched: Completions | None = None
    samples: Completions | None = None
    sample_of: Tensor | None = None

    own_unit = "completion"
    feedback: ClassVar[Mapping[str, str]] = {"mismatched": "mismatched", "samples": "samples", "sample_of": "samples"}

    def __len__(self) -> int:
        return len(self.completions)

    def counts(self) -> dict[str, int]:
        return {"completion": len(self), "token": int(self.completions.mask.sum())}

    def weights(self) -> dict[str, Tensor]:
        """Values in unit `token` are [N, T]."""
        return {"completion": self.completions.weight, "token": self.completions.weight}


@dataclass(frozen=True, eq=False)
class Demonstrations(Singles):
    """N completions to imitate."""


@dataclass(frozen=True, eq=False)
class Lists(View):
    """G groups of K_g scored completions each, ragged.

    Attributes:
        completions: N = sum K_g completions.
        group: long [N], 0..G-1, non-decreasing.
        scores: [N] or None, higher is better. ranks: long [N] or None, 1 is best.
        weight: [G].
    """

    completions: Completions
    group: Tensor
    weight: Tensor
    scores: Tensor | None = None
    ranks: Tensor | None = None

    own_unit = "group"
    feedback: ClassVar[Mapping[str, str]] = {"scores": "scores", "ranks": "ranks"}

    def __len__(self) -> int:
        return self.weight.shape[0]

    def counts(self) -> dict[str, int]:
        return {"group": len(self), "completion": len(self.completions), "token": int(self.completions.mask.sum())}

    def weights(self) -> dict[str, Tensor]:
        """A group's weight holds for its completions and their tokens too; values in unit `token` are [N, T]."""
        each = self.completions.weight * self.weight.index_select(0, self.group)
        return {"group": self.weight, "completion": each, "token": each}


def win_shares(ranks: Sequence[float]) -> list[float]:
    """Ranks of one list (1 is best) to the share of the other completions that each beats, a tie counting half."""
    others = max(len(ranks) - 1, 1)
    return [(sum(r < other for other in ranks) + 0.5 * (ranks.count(r) - 1)) / others for r in ranks]


@dataclass(frozen=True, eq=False)
class Groups(Lists):
    """G groups of rollouts with rewards; the online methods' view."""


VIEWS: dict[str, type[View]] = {
    "pairs": Pairs,
    "singles": Singles,
    "lists": Lists,
    "groups": Groups,
    "demonstrations": Demonstrations,
}


def dimensions(view: Any) -> str:
    """A short text for errors: the view's kind and sizes."""
    return f"{type(view).__name__}({view.counts()})"
