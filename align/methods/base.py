"""What a method is: a declaration, options, and a pure loss of a view. And what a loss returns: `Terms`."""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, dataclass_transform

import numpy as np
import torch
from torch import Tensor

from align.core.errors import AlignError, ConfigError, TrainingError
from align.core.options import check_all, option
from align.methods.claim import Claim
from align.scoring.views import VIEWS, View

__all__ = ["Draw", "Live", "Method", "Rollouts", "Stage", "Term", "Terms", "Unit", "finish", "method", "option"]

Coupling = Literal["unit", "batch"]


@dataclass(frozen=True, eq=False)
class Unit:
    """What a term is averaged over.

    `name` is `pair`, `completion`, `group`, `prompt_pair`, `turn`, `token` or `constant`. `where` (bool, the shape of
    the values) restricts it to those units; the data decide it, never the model, so the count is known before the
    forward pass. `size` is the divisor of `constant`.
    """

    name: str
    where: Tensor | None = None
    size: float = 1.0


@dataclass(frozen=True, eq=False)
class Term:
    """Values of one additive part of the loss, one per unit, and the unit whose global count divides their sum.

    `weight` [units] replaces the view's weights of that unit, for a method that reads them in a way of its own.
    """

    values: Tensor
    unit: str | Unit
    scale: float = 1.0
    weight: Tensor | None = None

    @property
    def kind(self) -> Unit:
        return Unit(self.unit) if isinstance(self.unit, str) else self.unit


@dataclass(frozen=True, eq=False)
class Terms(Mapping[str, Term]):
    """name -> Term. `numpy.asarray` of it is the sum of scale * values where all terms share a unit."""

    terms: Mapping[str, Term]
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    state: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Term:
        return self.terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    def total(self, counts: Mapping[str, float] | None = None) -> Tensor:
        """sum over terms of scale * values.sum() / count, a scalar. `counts` are global; this view's own by default."""
        counts = self.counts if counts is None else counts
        parts = [term.scale * term.values.sum() / counts[name] for name, term in self.terms.items() if counts[name] > 0]
        if not parts:
            values = next(iter(self.terms.values())).values
            return values.sum() * 0.0
        return torch.stack(parts).sum()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        shapes = {name: (term.kind.name, tuple(term.values.shape)) for name, term in self.terms.items()}
        if len(set(shapes.values())) != 1:
            raise ConfigError(
                "these terms do not share a unit: " + ", ".join(f"{n} ({u})" for n, (u, _) in shapes.items()),
                mend="read them one by one, or take `.total()`",
            )
        summed = torch.stack([term.scale * term.values.detach() for term in self.terms.values()]).sum(0)
        return np.asarray(summed.cpu().numpy(), dtype=dtype)


@dataclass(frozen=True)
class Live:
    """Samples of the current policy that the trainer draws for every prompt before a step: `count` of each, of at most
    `max_new_tokens` tokens. They are the view's `samples`."""

    count: int
    max_new_tokens: int


@dataclass(frozen=True)
class Draw:
    """`count` completions of every prompt by one policy, before a step: the present `policy`, the `reference`, or their
    `mixture`, token by token softmax((1 - mix) log pi + mix log pi_ref)."""

    origin: Literal["policy", "reference", "mixture"] = "policy"
    count: int = 1
    mix: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stage of shaping, by its id in `align.shaping`, with its options."""

    id: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Rollouts:
    """What an online method wants before a step.

    Attributes:
        draws: who writes the completions of a prompt; they stand in this order.
        feedback: `reward`, a number for each completion, or `preference`, P(i beats j) between them.
        select: what is trained on. `group`: all completions, with `reward`, and the columns that `shaping` makes.
            `pair`: one preference between the first two, with `probability` and, from rewards, `margin`. `first`: the
            first completion alone, its `reward` being P(it beats the second).
        label: of `pair`. `hard`: the likelier one won, a tie is dropped; `sampled`: the winner is drawn from P; `prob`:
            the likelier one is the winner and `probability` its P.
        shaping: stages in order, over the whole batch of rollouts.
        ratio: whether the loss compares with the policy that sampled, so that truncated sampling would be wrong.
    """

    draws: tuple[Draw, ...]
    feedback: Literal["reward", "preference"]
    select: Literal["group", "pair", "first"]
    label: Literal["hard", "sampled", "prob"] = "hard"
    shaping: tuple[Stage, ...] = ()
    ratio: bool = False


@dataclass(frozen=True)
class Method:
    """Base of all methods: a frozen dataclass of options with a declaration made by `@method`."""

    id: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    view: ClassVar[str] = "pairs"
    needs: ClassVar[frozenset[str]] = frozenset()
    coupling: ClassVar[Coupling] = "unit"
    claim: ClassVar[Claim | None] = None
    formula: ClassVar[str] = ""
    r"""The loss in LaTeX, for its page: rows end in `\\`, columns in `&`, definitions in `\qquad`. A definition behind
    `\text{NAME:}\quad` holds for that choice of an option. Checked against `loss` by `tests/docs`."""
    when: ClassVar[str] = ""
    """One sentence for its page: when to pick it."""
    takes: ClassVar[frozenset[str]] = frozenset()
    """Columns that it reads where the data have them, and that have a value elsewhere (`probability`: 1)."""
    teacher: ClassVar[str] = ""
    """`previous_epoch`: the reference is the policy as it was when the epoch began, unless the run says otherwise."""

    def __post_init__(self) -> None:
        check_all(self, f"method `{self.id}`")
        self.check()

    def check(self) -> None:
        """Refuse combinations of options; ranges of single options are declared, not checked here."""

    def loss(self, view: Any) -> Terms | Mapping[str, Term] | Tensor:
        raise NotImplementedError

    def initial_state(self) -> dict[str, Tensor]:
        """Checkpointed state, float64 or long; `view.state` carries it into `loss`. A memory of examples may grow in
        its first dimension.

        The names `epoch` (from 0) and `epochs` (of the run) are written by the trainer before each step.
        """
        return {}

    def observe(self, view: Any) -> dict[str, Tensor]:
        """The next state, from the gathered, detached view of the whole global batch; once per optimiser step."""
        return dict(view.state)

    def requires(self) -> frozenset[str]:
        """Columns this instance reads; a subset of `needs` where an option makes one superfluous."""
        return self.needs

    def reads(self) -> frozenset[str]:
        """Columns that `loss`, `observe` and `measure` may see, beyond `logp` and `weight`."""
        return self.requires() | self.takes | ({"samples"} if self.live_samples() is not None else frozenset())

    def live_samples(self) -> Live | None:
        """Samples of the present policy that it wants drawn before each step; None: those of the data, or none."""
        return None

    def rollouts(self) -> Rollouts | None:
        """What it wants sampled and judged before each step; None for a method that trains on data that are there."""
        return None

    def contexts(self) -> Mapping[str, str]:
        """name -> text, with `{prompt}` for the prompt's last user turn: other prompts for `anchor.NAME` columns.

        `anchor.NAME` of such a name holds the reference's log-probs of the completions after that prompt.
        """
        return {}

    def penalty(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """A term on the parameters, once per global batch."""
        return None

    def after_step(self, module: Any) -> None:
        """Called after each optimiser step with the trained module."""

    def measure(self, view: Any) -> Mapping[str, tuple[Tensor, float]]:
        """Metrics of its own, name -> (sum, count), beside those of the view; called without gradient."""
        return {}

    def cautions(self) -> tuple[str, ...]:
        """Sentences about values that are allowed and seldom meant; shown once, never an error."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Public option names and values."""
        return {field.name.rstrip("_"): getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def method(
    id: str,
    *,
    view: str,
    paper: str = "",
    needs: Iterable[str] = (),
    coupling: Coupling = "unit",
    takes: Iterable[str] = (),
    claim: tuple[str, ...] = (),
) -> Callable[[type], type]:
    """Declare a method: its id, paper, view, the columns it reads beyond `logp`, and whether units are coupled.

    Data without a column of `needs` are refused; one of `takes` is read where the data have it.
    `claim` holds the fields of a `Claim`: the metric it is meant to move, up or down, the world, and against what.
    """
    if view not in VIEWS:
        raise ConfigError(f"method `{id}`: unknown view `{view}`", mend="one of " + ", ".join(VIEWS))

    def declare(cls: type) -> type:
        cls.id, cls.paper, cls.view = id, paper, view  # type: ignore[attr-defined]
        cls.needs, cls.coupling = frozenset(needs), coupling  # type: ignore[attr-defined]
        cls.takes = frozenset(takes)  # type: ignore[attr-defined]
        cls.claim = Claim(*claim) if claim else None  # type: ignore[arg-type, attr-defined]
        return dataclass(frozen=True, kw_only=True)(cls)

    return declare


def terms_of(method: Method, view: View) -> Terms:
    """`finish` of the method's loss.

    Raises:
        TrainingError: the loss raises, with the line of the method's file.
    """
    try:
        returned = method.loss(view.only(method.reads()))
    except (AlignError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a method may be a user's own file, whose faults are theirs to see
        file = inspect.getfile(type(method))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        raise TrainingError(
            f"the loss of the method `{method.id}` raises {type(error).__name__}",
            where=f"{file}:{lines[-1]}" if lines else file,
            why=str(error),
            mend="`align test` tries a method on small numbers; --debug shows the whole traceback",
        ) from error
    return finish(returned, view)


def finish(returned: Terms | Mapping[str, Term] | Tensor, view: View) -> Terms:
    """Normalise what a loss returned: name bare tensors, check shapes, apply the view's weights, count units."""
    if isinstance(returned, Tensor):
        returned = {"loss": Term(returned, view.own_unit)}
    counts, weights = view.counts(), view.weights()
    terms: dict[str, Term] = {}
    divisors: dict[str, float] = {}
    for name, term in returned.items():
        unit = term.kind
        weight = weights.get(unit.name) if term.weight is None else term.weight
        divisors[name] = _divisor(name, term, counts)
        terms[name] = Term(_weighted(name, term, weight), unit, term.scale)
    return Terms(terms, divisors)


def _divisor(name: str, term: Term, counts: Mapping[str, int]) -> float:
    """How many units of this view the term's sum is divided by; refuses values that are not one per unit."""
    unit, shape = term.kind, tuple(term.values.shape)
    if unit.name == "constant":
        return float(unit.size)
    if unit.name not in counts:
        raise ConfigError(
            f"term `{name}` is in unit `{unit.name}`, which this view does not have",
            mend="use one of " + ", ".join(sorted([*counts, "constant"])),
        )
    # Tokens come as [units, T]: their number is the mask's, not the shape's.
    if not shape or (unit.name != "token" and shape[0] != counts[unit.name]):
        raise _wrong_length(name, shape, f"{counts[unit.name]} units `{unit.name}`")
    return float(counts[unit.name]) if unit.where is None else float(unit.where.sum())


def _weighted(name: str, term: Term, weight: Tensor | None) -> Tensor:
    values, where = term.values, term.kind.where
    if weight is not None and term.kind.name != "constant":
        if values.shape[0] != weight.shape[0]:
            raise _wrong_length(name, tuple(values.shape), f"{weight.shape[0]} weights")
        values = values * weight.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return values if where is None else torch.where(where, values, torch.zeros_like(values))


def _wrong_length(name: str, shape: tuple[int, ...], units: str) -> ConfigError:
    return ConfigError(
        f"term `{name}` has values of shape {shape} for {units}",
        mend="return one value per unit; a method never calls mean() or sum() over units",
    )
