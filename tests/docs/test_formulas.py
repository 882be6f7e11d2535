"""The formula on a method's page is the one that its `loss` computes: evaluated as LaTeX, it gives the same numbers.

Every number of the options is moved and every choice taken. What this cannot see: a stopped gradient (`sg`), which
does not change a value; how a symbol is worded that is given as a number here (a KL, a sum over the vocabulary); and,
of beta_dpo, which pairs are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

pytest.importorskip("mkdocs", reason="the documentation tools are in the extra `docs`")

from mkdocs.exceptions import PluginError

from align.core.options import declared
from align.core.registry import METHODS
from align.methods.base import Method
from align.methods.evaluate import terms
from align.testing.checks import variants
from docs.hooks import formulas
from tests.docs.answers import STATES, TOGETHER, Row, given_for, rows_for
from tests.docs.latex import definitions, evaluate, tokens

CORRECTIONS = {f"sampler_correction={level}_{kind}" for level in ("token", "sequence") for kind in ("truncate", "mask")}
IN_WORDS = {
    **dict.fromkeys(("grpo", "dr_grpo", "dapo", "gspo", "reinforce_pp", "reinforce_pp_baseline"), CORRECTIONS),
    "cpl": {"normalize=token", "bc_on=both"},
    "elr": {"update=after"},
}
"""Method -> choices that its page explains in words alone."""
ALL_KEPT = {"beta_dpo": ({"rho": 1.0}, {"rho": 1.0, "beta0": 0.3, "a": 0.2, "m": 0.5})}
"""Options in place of the usual variants: which pairs are kept is a draw."""


def instances(name: str) -> dict[str, Method]:
    cls = METHODS.get(name)
    if name in ALL_KEPT:
        return {str(options): cls(**options) for options in ALL_KEPT[name]}
    return {label: one for label, one in variants(cls).items() if label not in IN_WORDS.get(name, ())}


def by_formula(method: Method, rows: Sequence[Row]) -> float:
    if method.id in TOGETHER:
        return evaluate(method.formula, given_for(method, rows, rows[0]))
    counted = [row for row in rows if method.id != "d2o" or not row["label"]]
    return sum(evaluate(method.formula, given_for(method, rows, row)) for row in counted) / len(counted)


def by_loss(method: Method, rows: Sequence[Row]) -> float:
    found = terms(method, **{method.view: rows}, state=STATES.get(method.id))
    return float(found.total())


@pytest.mark.parametrize("name", METHODS.entries())
def test_the_formula_is_the_loss(name):
    for label, method in instances(name).items():
        for seed in range(3):
            rows = rows_for(method, seed)
            batches = [rows] if method.coupling == "batch" or name in TOGETHER else [[row] for row in rows]
            for batch in batches:
                if name == "d2o" and all(row["label"] for row in batch):
                    continue
                said, computed = by_formula(method, batch), by_loss(method, batch)
                assert said == pytest.approx(computed, rel=1e-9, abs=1e-12), (label, seed)


def test_choices_in_words_are_choices():
    for name, labels in IN_WORDS.items():
        assert labels <= set(variants(METHODS.get(name)))


def test_every_number_among_the_options_stands_in_the_formula():
    """Or is of a kind that changes no value here: a warm-up, a factor on a gradient, where an exponent stops, what
    rollouts and their shaping do before the loss."""
    shaped = {
        *("num_generations", "ddof", "std_eps", "overlong_cache", "whiten_ddof", "missing_eos_penalty"),
        *("reward_clip", "kl_target", "kl_horizon", "gamma", "sampler_cap"),
    }
    elsewhere = {
        *((name, "beta") for name in ("rloo", "reinforce_pp", "reinforce_pp_baseline")),
        ("chi_po", "max_exponent"),
        ("cpl", "bc_steps"),
        ("dro_v", "policy_grad_scale"),
        ("hypo", "live"),
        ("hypo", "max_new_tokens"),
        ("iqlearn_sft", "warmup_steps"),
        ("nash_md", "mix"),
        ("online_ipo", "mix"),
    }
    missing = set()
    for name in METHODS.entries():
        cls = METHODS.get(name)
        for option, field, *_ in declared(cls):
            latex = formulas.symbol(name, option)
            number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
            before = cls.view == "groups" and option in shaped
            stands = bool(latex) and formulas.stands_in(cls.formula, latex)
            if number and option != "variant" and not before and not stands:
                missing.add((name, option))
    assert missing == elsewhere


def names_in(latex: str) -> set[str]:
    """The letters of a formula, without their subscripts, words, functions and commands that are no letters."""
    plain = re.sub(r"\\(?:text|operatorname|mathrm)\{[^}]*\}", " ", latex)
    plain = re.sub(r"_(?:\{[^}]*\}|\\[a-z]+|\w)", " ", plain)
    return {word for word in tokens(plain) if re.fullmatch(r"[A-Za-z]|\\[a-z]+|\\Delta", word)} - _NO_LETTERS


_NO_LETTERS = {
    rf"\{word}"
    for word in (
        *("frac", "sum", "log", "ln", "exp", "max", "min", "quad", "qquad", "left", "right", "mid", "cdot", "in"),
        *("mathcal", "mathrm", "bar", "leftarrow", "propto", "le", "ne", "ldots"),
    )
}


def test_every_letter_is_explained():
    explained = set().union(*(names_in(latex) for latex in formulas.NOTATION))
    unknown = {}
    for name in METHODS.entries():
        cls = METHODS.get(name)
        options = set().union(*(names_in(formulas.symbol(name, option)) for option, *_ in declared(cls)), set())
        defined = definitions(cls.formula)
        own = {one.name.partition("_")[0].replace("'", "") for one in defined}
        own |= {word.partition("_")[0] for one in defined for word in (*one.indices, *one.arguments)}
        left = names_in(cls.formula) - explained - options - own
        if left:
            unknown[name] = left
    assert unknown == {}


@pytest.mark.parametrize(
    "latex",
    [r"\mathcal{L} &= \unknowncommand z", r"\frac{1", r"a^{2", r"a}", r"\begin{aligned} c \end{aligned}", r"\left( x"],
)
def test_what_would_be_shown_as_written_is_refused(latex):
    with pytest.raises(PluginError, match="method `dpo`"):
        formulas.display(latex, "method `dpo`")


def test_a_formula_is_mathml_with_its_rows_and_columns():
    shown = formulas.display(r"z &= \beta h_w \\ \mathcal{L} &= -\log\sigma(z)", "dpo")
    assert shown.count("<mtr>") == 2 and shown.count("<mtd>") == 4
    assert "<msub><mi>h</mi><mi>w</mi></msub>" in shown and "<mi>β</mi>" in shown
    assert "\n" not in shown and "\\" not in shown
    for name in METHODS.entries():
        assert "\\" not in formulas.display(METHODS.get(name).formula, name)
