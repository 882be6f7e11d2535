"""The operators on small sources: which faults they make, and which places they leave alone."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutation.operators import Mutant, Source
from tests.mutation.planting import Unplantable, planted


def faults(line: str, operator: str, head: str = "def loss(self, pairs, chosen, rejected) -> Tensor:") -> set[str]:
    """What an operator makes of the one line of a function."""
    source = Source("scratch", f"class Scratch:\n    beta: float = option(1.0)\n    {head}\n        {line}\n")
    return {mutant.after for mutant in source.mutants if mutant.operator == operator and mutant.inside}


@pytest.mark.parametrize(
    ("operator", "line", "expected"),
    [
        ("flip_sign", "x = -a", {"a"}),
        ("flip_sign", "x = a + b", {"a - b"}),
        ("flip_sign", "x = a - b", {"a + b"}),
        ("flip_sign", "x += a", {"x -= a"}),
        ("flip_sign", "x = logistic(m)", {"logistic(-m)"}),
        ("flip_sign", "x = m.sigmoid()", {"(-m).sigmoid()"}),
        ("flip_sign", "return m", {"return -m"}),
        ("flip_sign", "x = m.sum(-1)", set()),
        ("swap_sides", "x = pairs.chosen.mask", {"pairs.rejected"}),
        ("swap_sides", "x = f(chosen)", {"rejected"}),
        ("swap_sides", "x = one.logp", {"one.ref_logp"}),
        ("swap_sides", "x = f(chosen, rejected)", {"rejected", "chosen", "x = f(rejected, chosen)"}),
        ("swap_sides", "x = torch.where(c, a, b)", {"torch.where(c, b, a)"}),
        ("swap_sides", "x = a - b", {"b - a"}),
        ("swap_sides", "x = (a - b).square()", set()),
        ("swap_sides", "x = f(pairs.chosen) + f(pairs.rejected)", {"pairs.rejected", "pairs.chosen"}),
        ("sum_for_mean", "x = one.sum_logp", {"one.mean_logp"}),
        ("sum_for_mean", "x = one.mean_log_ratio", {"one.sum_log_ratio"}),
        ("sum_for_mean", "x = one.sum(one.logp)", {"one.sum(one.logp) / one.length.clamp(min=1)"}),
        ("sum_for_mean", "x = t.sum(-1)", {"t.mean(-1)"}),
        ("sum_for_mean", "x = t.mean()", {"t.sum()"}),
        ("sum_for_mean", "x = nll(one, 'sum')", {"'token_mean'"}),
        ("wrong_reduction", "x = t.amax(0)", {"t.amin(0)", "t.amax()"}),
        ("wrong_reduction", "x = t.cumsum(-1)", {"t"}),
        ("wrong_reduction", "x = Term(v, 'pair')", {"'token'"}),
        ("wrong_reduction", "x = Unit('pair', kept)", set()),
        ("drop_stop", "x = h.detach()", {"h"}),
        ("drop_stop", "x = h.detach() < 0", set()),
        ("drop_stop", "x = stop_gradient(h)", {"h"}),
        ("wrong_constant", "x = 3 * h", {"h", "6"}),
        ("wrong_constant", "x = self.beta * h", {"h", "2 * self.beta"}),
        ("wrong_constant", "x = h / 2", {"h", "4"}),
        ("wrong_constant", "x = h.clamp(min=0)", {"1"}),
        ("wrong_constant", "x = h.sum(-1)[:, 0]", set()),
        ("wrong_constant", "x = 1 if self.beta else h", {"2"}),
        ("drop_term", "x = a - b", {"a", "-b"}),
        ("drop_term", "x = {'a': p, 'b': q}", {"{'a': p}", "{'b': q}"}),
        ("drop_term", "x = Term(v, 'pair', s, weight=w)", {"Term(v, 'pair', weight=w)", "Term(v, 'pair', s)"}),
        ("drop_term", "state['n'] = v", {"pass"}),
        ("off_by_one", "x = t[:, 1:]", {"2:", ":"}),
        ("off_by_one", "x = t[:-1]", {":", ":-2"}),
        ("off_by_one", "x = t[:, 0]", {"1"}),
        ("off_by_one", "x = one.mask", {"one.mask.roll(1, -1)"}),
        ("off_by_one", "x = one.length", {"one.length + 1"}),
        ("off_by_one", "x = range(len(one))", {"len(one) + 1"}),
        ("off_by_one", "x = sum_by(v, owner, len(one))", set()),
        ("wrong_condition", "x = a > b", {"a < b"}),
        ("wrong_condition", "x = a and b", {"a or b"}),
        ("wrong_condition", "x = p if self.beta else q", {"not self.beta"}),
        ("boundary", "x = a > b", {"a >= b"}),
        ("boundary", "x = 0 < a <= b", {"0 <= a <= b", "0 < a < b"}),
        ("drop_clamp", "x = t.clamp(min=0)", {"t"}),
        ("drop_clamp", "x = t.clamp(min=0, max=9)", {"t", "t.clamp(min=0)", "t.clamp(max=9)"}),
        ("drop_clamp", "x = torch.maximum(a, b)", {"a", "b"}),
        ("drop_clamp", "x = torch.where(c, a, b)", {"a", "b"}),
    ],
)
def test_faults(operator: str, line: str, expected: set[str]) -> None:
    assert faults(line, operator) == expected


DECLARATIONS = '''
"""A file."""

LIMIT = 0.5


@method("scratch", paper="1234.5678", view="pairs", needs={"a", "b"}, coupling="batch")
class Scratch(Method):
    """loss = 1 - x"""

    beta: float = option(0.1, above=0, doc="scale, 1 to 3")

    def loss(self, x: Tensor) -> dict[str, Tensor]:
        if x is None:
            raise ConfigError("1 - x", mend=f"{x - 1}")
        return {}
'''


def test_declarations_are_changed_and_texts_are_not() -> None:
    made = Source("scratch", DECLARATIONS).mutants
    inside = {mutant.after for mutant in made if mutant.inside}
    assert inside == {"x is not None"}
    outside = {(mutant.operator, mutant.after) for mutant in made if not mutant.inside}
    assert outside == {
        ("wrong_constant", "1.0"),
        ("wrong_constant", "0.2"),
        ("wrong_constant", "1"),
        ("wrong_constant", "option(0.1)"),
        ("boundary", "option(0.1, at_least=0)"),
        ("drop_declaration", "{'a'}"),
        ("drop_declaration", "{'b'}"),
        ("drop_declaration", "method('scratch', needs={'a', 'b'})"),
    }


def test_equal_places_have_different_keys() -> None:
    keys = [mutant.key for mutant in Source("scratch", "def f(a):\n    return a + a - (a + a)\n").mutants]
    assert len(keys) == len(set(keys))
    assert any(key.endswith(" #1") for key in keys)


LIVE = """
from dataclasses import dataclass, field
from functools import cache

SCALE = 3

@dataclass(frozen=True)
class Shape:
    side: float = 2.0

    @property
    def area(self):
        return self.side * self.side

    @staticmethod
    def corners():
        return 4

class Solid(Shape):
    @property
    def volume(self):
        return super().area * self.side

@cache
def scaled(x, by=1):
    return x * SCALE + by
"""


@pytest.fixture
def live(tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "live.py"
    path.write_text(LIVE)
    spec = importlib.util.spec_from_file_location("scratch_package.live", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[module.__name__]


@pytest.mark.parametrize(
    ("place", "before", "after", "expression", "there", "here"),
    [
        ("Shape.area", "self.side * self.side", "self.side", "made.area", 2.0, 4.0),
        ("Solid.volume", "super().area * self.side", "super().area", "solid.volume", 4.0, 8.0),
        ("scaled", "x * SCALE + by", "x * SCALE - by", "module.scaled(2)", 5, 7),
        ("Shape", "2.0", "4.0", "module.Shape().area", 16.0, 4.0),
        ("", "3", "6", "module.scaled(2)", 13, 7),
        ("", "1", "2", "module.scaled(2)", 8, 7),
    ],
)
def test_a_planted_fault_is_seen_by_all_and_taken_out_again(
    live: ModuleType, place: str, before: str, after: str, expression: str, there: float, here: float
) -> None:
    source = Source("live", LIVE, str(live.__file__))
    (mutant,) = (m for m in source.mutants if (m.place, m.before, m.after) == (place, before, after))
    names = {"module": live, "made": live.Shape(), "solid": live.Solid()}
    assert eval(expression, names) == here  # noqa: S307
    with planted(mutant, source.compile(mutant), "scratch_package"):
        if place != "scaled":  # planting empties the cache of the function itself only
            live.scaled.cache_clear()
        assert eval(expression, names) == there  # noqa: S307
    live.scaled.cache_clear()
    assert eval(expression, names) == here  # noqa: S307
    assert live.Shape() == names["made"]


def test_a_file_that_cannot_be_imported_is_told_apart(live: ModuleType) -> None:
    source = Source("live", LIVE, str(live.__file__))
    mutant: Mutant = next(m for m in source.mutants if not m.inside)
    broken = compile("1 / 0", "live", "exec")
    with pytest.raises(Unplantable, match="ZeroDivisionError"), planted(mutant, broken, "scratch_package"):
        pass
