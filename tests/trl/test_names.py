"""Every loss that TRL 1.16 names is an id of ours or answered with one; the lists are TRL's own code."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from align.core.clashes import METHOD_CLASHES
from align.core.errors import ConfigError
from align.core.registry import METHODS

pytest.importorskip("trl")

SAME_ID = {"ipo", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "kto", "simpo"}
"""Names that mean the same in both; `align recipes import` says where a default differs."""


def losses(module: str, trainer: str, method: str) -> set[str]:
    found = getattr(getattr(importlib.import_module(module), trainer), method)
    return set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(found)))


def names_of_trl() -> dict[str, set[str]]:
    from trl import SFTTrainer

    said = re.search(r"Supported values are (.*?)\.", inspect.getsource(SFTTrainer))
    assert said is not None
    return {
        "dpo": losses("trl", "DPOTrainer", "_compute_loss"),
        "kto": losses("trl", "KTOTrainer", "_compute_loss"),
        "cpo": losses("trl.experimental.cpo", "CPOTrainer", "cpo_loss"),
        "sft": set(re.findall(r"'(\w+)'", said.group(1))),
    }


def test_the_lists_are_read() -> None:
    assert {name: len(found) for name, found in names_of_trl().items()} == {"dpo": 15, "kto": 2, "cpo": 4, "sft": 2}


def test_every_name_is_an_id_or_answered() -> None:
    for name in sorted(set().union(*names_of_trl().values())):
        if name in METHODS.entries():
            assert name in SAME_ID, f"`{name}` is an id here and a loss of TRL: does it mean the same?"
            continue
        assert name in METHOD_CLASHES, f"TRL's `{name}` is unknown here"
        assert METHODS.unknown(name).why, name


def test_names_that_trl_has_for_divergences_are_answered() -> None:
    from trl import DPOTrainer

    kinds = set(re.findall(r'f_divergence_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert len(kinds) == 4
    assert {METHOD_CLASHES[kind].ours for kind in kinds} == {"f_dpo"}


@pytest.mark.parametrize(
    ("name", "ours", "words"),
    [
        ("robust", "rdpo", "`eps`"),
        ("exo_pair", "exo_pref", "`beta_pi`"),
        ("nca_pair", "nca", "`alpha: 0.01`"),
        ("sigmoid_norm", "dpo_norm", "beta is 5"),
        ("bco_pair", "bco", "no centre"),
        ("sppo_hard", "sppo", "twice `sppo`"),
        ("ld_alpha", "ld_dpo", "`alpha`"),
        ("use_weighting", "wpo", "`clamp: null`"),
        ("rpo_alpha", "rpo", "`sft_reduction: token_mean`"),
        ("f_alpha_divergence_coef", "f_dpo", "1 - alpha"),
        ("apo_zero_unpaired", "", "anchor held at 0"),
        ("simpo_gamma", "simpo", "beta times"),
    ],
)
def test_a_user_who_writes_it_is_told_the_id_and_the_scale(name: str, ours: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        METHODS.get(name)
    assert f"write `{ours}`" in caught.value.mend if ours else "write `" not in caught.value.mend
