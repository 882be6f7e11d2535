"""Every registered method passes the automatic battery and has a loop of its own; and the battery catches mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from align.core.errors import AlignError, ConfigError
from align.methods import METHODS, Method, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs, Singles
from align.testing import battery, check_method
from align.testing.checks import variants
from tests.methods.loops import LOOPS


@pytest.mark.parametrize("name", METHODS.entries())
def test_battery(name: str) -> None:
    results = battery(name)
    assert len({result.name for result in results}) == 9
    assert not [str(result) for result in results if not result.ok]


@pytest.mark.parametrize("name", METHODS.entries())
def test_every_method_has_a_loop(name: str) -> None:
    assert name in LOOPS, f"write {name} as a plain loop from its paper in tests/methods/loops.py"


def test_no_loop_without_a_method() -> None:
    assert set(LOOPS) == set(METHODS.entries())


def test_variants_take_every_choice_and_move_every_number() -> None:
    made = variants(METHODS.get("rpo"))
    assert list(made) == ["defaults", "baseline=sft", "baseline=samples", "sft_reduction=token_mean", "numbers moved"]
    moved: Any = made["numbers moved"]
    assert (moved.beta, moved.eta) == pytest.approx((0.015, 0.0075))
    simpo: Any = variants(METHODS.get("simpo"))["numbers moved"]
    assert simpo.label_smoothing == 0.3


@method("good", view="pairs", needs={"ref_logp"})
class Good(Method):
    """A method as a user writes it."""

    beta: float = option(0.1, above=0, doc="scale")

    def loss(self, pairs: Pairs) -> Any:
        return logistic(self.beta * pairs.delta)


class TakesMean(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return super().loss(pairs).mean()


class ReadsUnscored(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * (pairs.chosen.log_ratio.sum(-1) - pairs.rejected.log_ratio.sum(-1)))


class ReadsWidth(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return super().loss(pairs) / pairs.chosen.mask.shape[1]


class ReadsPlace(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return super().loss(pairs) * torch.arange(1, len(pairs) + 1)


class CentresOverTheMicroBatch(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * (pairs.delta - pairs.delta.mean().detach()))


class CountsByTheModel(Good):
    def loss(self, pairs: Pairs) -> Any:
        from align.methods import Unit

        return {"loss": Term(super().loss(pairs), Unit("pair", where=pairs.chosen.sum_logp < -1.001))}


class Overflows(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return torch.log1p(torch.exp(-self.beta * pairs.delta))


class HalfPrecision(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        column = torch.where(pairs.chosen.mask, pairs.chosen.logp, 0)
        return -column.sum(-1)


class WeighsTwice(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return super().loss(pairs) * pairs.weight


class NoGradient(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return super().loss(pairs).detach()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class WrongGradient(Good):
    def loss(self, pairs: Pairs) -> Tensor:
        return _Doubled.apply(super().loss(pairs))


class ForgetsState(Good):
    def initial_state(self) -> dict[str, Tensor]:
        return {"steps": torch.zeros(())}

    def observe(self, view: Pairs) -> dict[str, Tensor]:
        return {"step": torch.ones(())}


class ChangesState(Good):
    def initial_state(self) -> dict[str, Tensor]:
        return {"steps": torch.zeros(())}

    def loss(self, pairs: Pairs) -> Tensor:
        pairs.state["steps"].add_(1)
        return super().loss(pairs)


class Lenient(Good):
    def __post_init__(self) -> None:
        """No checks."""


BROKEN = {
    TakesMean: {"finite differences", "order"},
    ReadsUnscored: {"masked positions"},
    ReadsWidth: {"padding", "splitting"},
    ReadsPlace: {"order", "splitting"},
    CentresOverTheMicroBatch: {"splitting"},
    CountsByTheModel: {"weights"},
    Overflows: {"extremes"},
    HalfPrecision: {"extremes"},
    WeighsTwice: {"weights"},
    NoGradient: {"finite differences", "splitting"},
    WrongGradient: {"finite differences"},
    ForgetsState: {"state"},
    ChangesState: {"state"},
    Lenient: {"options"},
}


def test_a_good_method_passes() -> None:
    check_method(Good)
    check_method(Good(beta=0.7))
    check_method(f"{__name__}:Good")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_the_battery_catches(broken: type[Method]) -> None:
    failed = {result.name for result in battery(broken) if not result.ok}
    assert failed >= BROKEN[broken]
    with pytest.raises(AlignError, match="fails") as caught:
        check_method(broken)
    assert all(name in str(caught.value) for name in failed)


def test_a_batch_statistic_must_be_declared() -> None:
    kto = METHODS.get("kto")

    class Undeclared(kto):  # type: ignore[misc, valid-type]
        coupling = "unit"

    assert {result.name for result in battery(Undeclared) if not result.ok} == {"splitting"}


def test_options_without_a_default_need_an_instance() -> None:
    @method("bare", view="singles")
    class Bare(Method):
        beta: float = option(above=0, doc="scale")

        def loss(self, view: Singles) -> Tensor:
            return -self.beta * view.completions.sum_logp

    with pytest.raises(ConfigError, match="without a default: beta"):
        battery(Bare)
    assert all(result.ok for result in battery(Bare(beta=1.0)))
