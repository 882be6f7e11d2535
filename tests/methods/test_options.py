"""Ranges of the methods' options, listed here once more so that a changed declaration is seen."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from align.core.errors import ConfigError, ErrorList
from align.core.options import Range, declared
from align.methods import METHODS
from align.methods.evaluate import make_method

REFUSED = [
    ("sft", {"reduction": "mean"}),
    *[("dpo", {"beta": bad}) for bad in (0, -0.1)],
    ("ipo", {"tau": 0}),
    ("ipo", {"normalize": "mean"}),
    ("simpo", {"beta": 0}),
    ("simpo", {"gamma_ratio": -0.1}),
    ("simpo", {"label_smoothing": -0.1}),
    ("simpo", {"label_smoothing": 0.5}),
    ("simpo", {"sft_weight": -1}),
    ("orpo", {"lambda": -0.1}),
    ("rpo", {"beta": 0}),
    ("rpo", {"eta": -1e-9}),
    ("rpo", {"baseline": "rejected"}),
    ("rpo", {"sft_reduction": "mean"}),
    ("kto", {"beta": 0}),
    ("kto", {"desirable_weight": -1}),
    ("kto", {"undesirable_weight": -1}),
    ("bco", {"beta": 0}),
    *[("bco", {"clip": bad}) for bad in ((0, 1), (2, 1), (1,), "wide", (1, math.inf), (0.5, math.nan), 3)],
    ("lipo", {"beta": 0}),
    ("lipo", {"reduction": "none"}),
    ("tdpo", {"beta": 0}),
    ("tdpo", {"alpha": -0.1}),
    ("tdpo", {"variant": 3}),
    ("tdpo", {"variant": 1, "alpha": 0.9}),
    ("dro_v", {"tau": 0}),
    ("dro_v", {"policy_grad_scale": 0}),
]

ADMITTED = [
    ("simpo", {"gamma_ratio": 0, "label_smoothing": 0, "sft_weight": 0}),
    ("orpo", {"lambda": 0}),
    ("rpo", {"eta": 0}),
    ("kto", {"desirable_weight": 0, "undesirable_weight": 0}),
    ("bco", {"clip": [1, 1]}),
    ("tdpo", {"alpha": 0}),
    ("tdpo", {"variant": 1}),
]
CAUTIONS = [
    ("dpo", {"beta": 1.001}, {"beta": 1}),
    ("ipo", {"tau": 0.249}, {"tau": 0.25}),
    ("ipo", {"tau": 0.1, "normalize": "token"}, {"tau": 0.1, "normalize": "sum"}),
    ("simpo", {"beta": 0.999}, {"beta": 1}),
    ("rpo", {"eta": 0.101}, {"eta": 0.1}),
    ("rpo", {"eta": 0.2}, {"eta": 0.2, "sft_reduction": "token_mean"}),
]
"""Options that are warned about, and options beside them that are not."""

for _file in sorted(Path(__file__).parent.glob("options_*.py")):
    _family = importlib.import_module(f"tests.methods.{_file.stem}")
    REFUSED += _family.REFUSED
    ADMITTED += _family.ADMITTED
    CAUTIONS += _family.CAUTIONS


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_options_outside_the_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        make_method(name, options)


@pytest.mark.parametrize(("name", "options"), ADMITTED)
def test_bounds_that_belong_to_the_range_are_admitted(name: str, options: dict[str, Any]) -> None:
    make_method(name, options)


@pytest.mark.parametrize(("name", "odd", "usual"), CAUTIONS)
def test_cautions(name: str, odd: dict[str, Any], usual: dict[str, Any]) -> None:
    assert make_method(name, odd).cautions()
    assert not make_method(name, usual).cautions()


def test_every_option_is_listed() -> None:
    listed = {(name, option) for name, options in REFUSED for option in options}
    declared = {(name, option) for name, entry in METHODS.entries().items() for option in entry.options}
    assert listed == declared


def test_all_errors_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ErrorList) as caught:
        make_method("simpo", {"beta": 0, "gama_ratio": 0.5, "label_smoothing": 0.9})
    text = str(caught.value)
    assert len(caught.value.errors) == 3
    assert "did you mean `gamma_ratio`?" in text
    assert "`beta` is 0.0, outside its range" in text


def test_lambda_is_written_without_its_underscore() -> None:
    assert make_method("orpo", {"lambda": 0.3}).lambda_ == 0.3
    with pytest.raises(ConfigError, match="did you mean `lambda`"):
        make_method("orpo", {"lambda_": 0.3})


def outside(limits: Range, hint: Any) -> list[Any]:
    """For each bound of a numeric option a value just beyond it (the bound itself where it is excluded), and inf."""
    step = 1 if hint is int else 0
    beyond: list[Any] = [value for value in (limits.above, limits.below) if value is not None]
    if limits.at_least is not None:
        beyond.append(limits.at_least - step if step else math.nextafter(limits.at_least, -math.inf))
    if limits.at_most is not None:
        beyond.append(limits.at_most + step if step else math.nextafter(limits.at_most, math.inf))
    return [*(int(value) if step else float(value) for value in beyond), *([] if step else [math.inf, math.nan])]


def numeric(hint: Any) -> Any:
    """The number in `float | None`."""
    return next((arm for arm in (hint, *get_args(hint)) if arm in (int, float)), None)


BOUNDS = [
    pytest.param(name, option, bad, limits, id=f"{name} {option}={bad!r}")
    for name in METHODS.entries()
    for option, _, limits, hint in declared(METHODS.get(name))
    if get_origin(hint) is not Literal and (number := numeric(hint))
    for bad in outside(limits, number)
]


@pytest.mark.parametrize(("name", "option", "bad", "limits"), BOUNDS)
def test_each_bound_refuses_and_says_option_value_and_range(name: str, option: str, bad: Any, limits: Range) -> None:
    bounds = [(">", limits.above), (">=", limits.at_least), ("<", limits.below), ("<=", limits.at_most)]
    with pytest.raises(ConfigError) as caught:
        make_method(name, {option: bad})
    text = str(caught.value)
    assert f"method `{name}`" in text and f"`{option}` is {bad!r}" in text
    assert all(f"{sign} {bound:g}" in text for sign, bound in bounds if bound is not None), text


CHOICES = [
    pytest.param(name, option, get_args(hint), id=f"{name} {option}")
    for name in METHODS.entries()
    for option, _, _, hint in declared(METHODS.get(name))
    if get_origin(hint) is Literal
]


@pytest.mark.parametrize(("name", "option", "choices"), CHOICES)
def test_a_choice_that_is_not_there_is_refused_with_those_that_are(
    name: str, option: str, choices: tuple[Any, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_method(name, {option: "no such choice"})
    text = str(caught.value)
    assert f"`{option}` is 'no such choice'" in text
    assert all(repr(choice) in text for choice in choices), text
