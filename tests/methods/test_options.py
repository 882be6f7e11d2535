"""Ranges of the methods' options, listed here once more so that a changed declaration is seen."""

from __future__ import annotations

import math
from typing import Any

import pytest

from align.core.errors import ConfigError, ErrorList
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


@pytest.mark.parametrize(("name", "options"), REFUSED)
def test_options_outside_the_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(options)[-1]):
        make_method(name, options)


ADMITTED = [
    ("simpo", {"gamma_ratio": 0, "label_smoothing": 0, "sft_weight": 0}),
    ("orpo", {"lambda": 0}),
    ("rpo", {"eta": 0}),
    ("kto", {"desirable_weight": 0, "undesirable_weight": 0}),
    ("bco", {"clip": [1, 1]}),
    ("tdpo", {"alpha": 0}),
    ("tdpo", {"variant": 1}),
]


@pytest.mark.parametrize(("name", "options"), ADMITTED)
def test_bounds_that_belong_to_the_range_are_admitted(name: str, options: dict[str, Any]) -> None:
    make_method(name, options)


@pytest.mark.parametrize(
    ("name", "odd", "usual"),
    [
        ("dpo", {"beta": 1.001}, {"beta": 1}),
        ("ipo", {"tau": 0.249}, {"tau": 0.25}),
        ("ipo", {"tau": 0.1, "normalize": "token"}, {"tau": 0.1, "normalize": "sum"}),
        ("simpo", {"beta": 0.999}, {"beta": 1}),
        ("rpo", {"eta": 0.101}, {"eta": 0.1}),
        ("rpo", {"eta": 0.2}, {"eta": 0.2, "sft_reduction": "token_mean"}),
    ],
)
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
