"""Reward functions: how they are called, and what is said where they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.feedback.functions import load_reward

MODULE = """
import numpy, torch
seen = []

def full(prompts, completions, completion_ids=None, **columns):
    seen.append((prompts, completions, completion_ids, columns))
    return [1.0, None, float("nan"), numpy.float32(2)][: len(prompts)]

def narrow(prompts, completions):
    return [len(text) for text in completions]

def topical(completions, topic):
    return torch.tensor([float(one) for one in topic])

class Judge:
    def __call__(self, completions, **kwargs):
        return [0.5 for _ in completions]

class Needs:
    def __init__(self, path): ...

def few(completions, **kwargs):
    return [1.0]

def nothing(completions, **kwargs):
    return None

def words(completions, **kwargs):
    return ["good" for _ in completions]

def infinite(completions, **kwargs):
    return [float("inf") for _ in completions]

def broken(completions, **kwargs):
    return [1 / 0 for _ in completions]

number = 3
"""


@pytest.fixture
def name(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_rewards"


ASKED = (["a", "b"], ["one", "three"], [np.array([1]), np.array([2, 3])], {"topic": [7, 8]})


def test_the_signature_is_trls(name):
    reward = load_reward(f"{name}:full")
    chat = ({"role": "user", "content": "c"},)
    values = reward(["a", "b", chat, "d"], ["1", "2", "3", "4"], [[1]] * 4, {"topic": [1, 2, 3, 4]})
    assert values[0] == 1 and math.isnan(values[1]) and math.isnan(values[2]) and values[3] == 2
    import some_rewards

    prompts, completions, ids, columns = some_rewards.seen[-1]
    assert prompts == ["a", "b", [{"role": "user", "content": "c"}], "d"]
    assert completions == ["1", "2", [{"role": "assistant", "content": "3"}], "4"]
    assert ids == [[1]] * 4 and columns["topic"] == [1, 2, 3, 4]
    assert set(columns) == {"topic", "log_extra", "log_metric"}


def test_functions_that_take_less_classes_and_tensors(name):
    assert load_reward(f"{name}:narrow")(*ASKED).tolist() == [3, 5]
    assert load_reward(f"{name}:topical")(*ASKED).tolist() == [7, 8]
    assert load_reward(f"{name}:Judge")(*ASKED).tolist() == [0.5, 0.5]
    assert load_reward(f"{name}:full").source == load_reward(f"{name}:narrow").source != ""


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("some_rewards", "with the colon"),
        ("some_rewards:", "with the colon"),
        ("no_such_module:f", "cannot import `no_such_module`"),
        ("some_rewards:narow", "did you mean `narrow`?"),
        ("some_rewards:number", "not a function but int"),
        ("some_rewards:Needs", "cannot be made without arguments"),
    ],
)
def test_names_that_are_wrong(name, written, said):
    with pytest.raises(ConfigError, match=None) as caught:
        load_reward(written)
    assert said in str(caught.value)


def test_a_file_that_raises(tmp_path, monkeypatch):
    (tmp_path / "raising_rewards.py").write_text("x = 1\nraise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_reward("raising_rewards:f")
    assert "RuntimeError: no" in str(caught.value) and "raising_rewards.py:2" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("few", "1 rewards for 2 completions"),
        ("nothing", "NoneType, not a list"),
        ("words", "a str as a reward"),
        ("infinite", "it returned inf"),
        ("broken", "raises ZeroDivisionError"),
    ],
)
def test_answers_that_are_wrong(name, function, said):
    with pytest.raises(ConfigError) as caught:
        load_reward(f"{name}:{function}")(*ASKED)
    assert said in str(caught.value)
    if function == "broken":
        assert "some_rewards.py:" in caught.value.where
