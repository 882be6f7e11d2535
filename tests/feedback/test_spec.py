"""Feedback as a section of a recipe: what is refused, and that reading it needs no torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from align.core.errors import ConfigError
from align.feedback.spec import _ALWAYS, USES, FeedbackSpec

MISTAKES = [
    ({"kind": "function"}, "needs a function"),
    ({"kind": "function", "name": "a:b", "beta": 0.1}, "`beta` is not used by `kind: function`"),
    ({"kind": "reward_model"}, "needs `model`"),
    ({"kind": "reward_model", "model": "x", "swap": True}, "`swap` is not used"),
    ({"kind": "pairwise", "model": "x", "preference": "hard"}, "`preference` is not used"),
    ({"kind": "judge"}, "needs `file`"),
    ({"kind": "judge", "file": "points", "url": "http://x/v1"}, "needs the name of its `model`"),
    ({"kind": "judge", "file": "points", "retries": 3}, "there is no `url`"),
    ({"kind": "judge", "file": "points", "dtype": "float32"}, "of a model that is loaded here"),
    ({"kind": "implicit", "length_normalised": True, "beta": 0.1}, "not used under `length_normalised`"),
    ({"kind": "implicit", "rivals": 3}, "`rivals` is not used"),
    ({"kind": "pairwise", "model": "x", "rivals": 3}, "under `opponents: random` only"),
    ({"kind": "function", "name": "a:b", "scale": 2.0}, "under `preference: sigmoid` only"),
    ({"kind": "functoin", "name": "a:b"}, "'functoin'"),
    ({"kind": "implicit", "beta": 0.0}, "outside its range"),
    ({"kind": "function", "name": "a:b", "deadline": -1}, "outside its range"),
]


@pytest.mark.parametrize(("given", "said"), MISTAKES)
def test_what_cannot_be_meant_is_refused(given, said):
    with pytest.raises(ConfigError) as caught:
        FeedbackSpec(**given)
    assert said in str(caught.value)


def test_all_faults_at_once_and_who_reads_an_option():
    with pytest.raises(ConfigError) as caught:
        FeedbackSpec(kind="function", name="a:b", beta=0.1, url="http://x")
    text = str(caught.value)
    assert "`beta`" in text and "`url`" in text and "read by implicit" in text and "read by judge" in text


def test_every_option_is_read_by_some_kind_and_no_kind_reads_one_that_is_not_there():
    fields = {field.name for field in dataclasses.fields(FeedbackSpec)}
    assert set().union(*USES.values()) | _ALWAYS == fields


def test_names_by_default():
    assert FeedbackSpec(name="a:b").function == "a:b"
    assert FeedbackSpec(name="length", function="a:b").function == "a:b"
    assert FeedbackSpec(function="a:b").name == "a:b"
    assert FeedbackSpec(kind="judge", file="points").name == "points"
    assert FeedbackSpec(kind="reward_model", model="x/y").name == "x/y"
    assert FeedbackSpec(kind="implicit").name == "implicit"


def test_a_recipe_is_checked_without_torch():
    code = "import align.feedback, align.feedback.judge_file, align.feedback.endpoint, sys\n"
    code += "align.feedback.FeedbackSpec(name='a:b')\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
