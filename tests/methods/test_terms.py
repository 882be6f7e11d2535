"""`align.methods.terms`: fields, defaults, what it returns, and errors that name the field."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError
from align.methods import METHODS, Method, Term, Terms, Unit, method, option, terms
from align.methods.base import finish
from align.methods.evaluate import make_bare_view
from align.scoring.views import Groups, Pairs

C = {"logp": [-1.0, -2.0], "ref_logp": [-1.0, -1.5]}
D = {"logp": [-0.5], "ref_logp": [-0.7]}
PAIR = {"chosen": C, "rejected": D}
SINGLE = {**C, "label": True, "mismatched": D, "reward": 1.0, "value": [0.0, 0.1, 0.2]}


def test_importing_methods_imports_no_torch() -> None:
    code = "import align.methods, sys; align.methods.METHODS.entries(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_returns_float64_terms_that_numpy_reads() -> None:
    found = terms("dpo", {"beta": 0.5}, pairs=[PAIR])
    assert isinstance(found, Terms)
    assert np.asarray(found).dtype == np.float64
    np.testing.assert_allclose(np.asarray(found), [math.log1p(math.exp(0.5 * 0.7))], atol=1e-15)
    assert np.asarray(found, dtype=np.float32).dtype == np.float32


def test_an_id_a_class_and_an_instance_are_the_same() -> None:
    dpo = METHODS.get("dpo")
    found = [np.asarray(terms(*given, pairs=[PAIR])) for given in (("dpo", {"beta": 1}), (dpo, {"beta": 1}))]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], np.asarray(terms(dpo(beta=1), pairs=[PAIR])))
    with pytest.raises(ConfigError, match="instance"):
        terms(dpo(), {"beta": 1}, pairs=[PAIR])


def test_the_sum_of_terms_and_their_names() -> None:
    found = terms("rpo", {"beta": 0.5, "eta": 0.2}, pairs=[PAIR, PAIR])
    assert list(found) == ["preference", "sft"]
    expected = found["preference"].values + 0.2 * 0.5 * 3.0
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-15)
    assert float(found.total()) == pytest.approx(float(expected.mean()), abs=1e-15)


def test_masked_tokens_and_ragged_lengths() -> None:
    spoiled = {"logp": [-1.0, -9.0, -2.0], "ref_logp": [-1.0, 5.0, -1.5], "mask": [1, 0, 1]}
    there, here = (np.asarray(terms("ipo", {}, pairs=[{"chosen": c, "rejected": D}])) for c in (spoiled, C))
    np.testing.assert_array_equal(there, here)


def test_weights_are_in_the_values_and_not_in_the_count() -> None:
    found = terms("dpo", {}, pairs=[{**PAIR, "weight": 3.0}, PAIR])
    values = np.asarray(found)
    assert values[0] == pytest.approx(3 * values[1])
    assert found.counts == {"loss": 2}
    assert float(found.total()) == pytest.approx(values.sum() / 2)


def test_tensors_keep_their_gradient() -> None:
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    terms("dpo", {}, pairs=[{"chosen": {**C, "logp": logp}, "rejected": D}]).total().backward()
    assert logp.grad is not None
    assert (logp.grad < 0).all()


def test_state_in_and_out() -> None:
    found = terms("bco", {}, singles=[{**C, "label": True}], state={"undesirable_sum": 2.0, "undesirable_count": 4})
    assert {name: type(value) for name, value in found.state.items()} == dict.fromkeys(found.state, torch.Tensor)
    assert float(found.state["desirable_count"]) == 1
    assert float(found.state["undesirable_count"]) == 4
    assert terms("dpo", {}, pairs=[PAIR]).state == {}


@method("scratch", view="groups", needs={"reward", "anchor.guide"}, takes={"rewards", "step"})
class Scratch(Method):
    """Two terms of different units, anchors, aspects and roles, on the groups view."""

    scale: float = option(1.0, above=0, doc="of the second term")

    def loss(self, groups: Groups) -> dict[str, Term]:
        own = groups.completions
        assert own.role == ("sample", "", "")
        drift = own.sum(own.logp - own.anchor("guide")) + own.rewards["helpful"] + own.step.sum(-1)
        tokens = torch.where(own.mask, own.logp, 0.0)
        fixed = Term(drift.detach()[:1], Unit("constant", size=10))
        return {"a": Term(drift, "completion"), "b": Term(tokens, "token", self.scale), "c": fixed}


def test_other_fields_and_units() -> None:
    completions = [
        {**C, "anchor": {"guide": [0.0, -1.0]}, "rewards": {"helpful": 0.5}, "reward": 1, "role": "sample"},
        {**D, "anchor": {"guide": [-0.5]}, "rewards": {"helpful": 0.0}, "reward": 2, "step": [3]},
        {**D, "anchor": {"guide": [-0.25]}, "rewards": {"helpful": 1.0}, "reward": 3, "weight": 2.0},
    ]
    found = terms(Scratch, {}, groups=[{"completions": completions[:2]}, {"completions": completions[2:]}])
    np.testing.assert_allclose(found["a"].values, [-1.5, 3.0, 1.5])
    assert found.counts == {"a": 3, "b": 4, "c": 10}
    assert float(found.total()) == pytest.approx(3.0 / 3 + (-1 - 2 - 0.5 - 1) / 4 - 0.15)
    with pytest.raises(ConfigError, match=r"do not share a unit: a \(completion\), b \(token\), c \(constant\)"):
        np.asarray(found)


def test_groups_carry_scores_and_ranks() -> None:
    row = {"completions": [C, D], "scores": [0.5, 1.5], "ranks": [2, 1], "weight": 2.0}
    view = make_bare_view("groups", [row, {**row, "weight": 1.0}])
    assert isinstance(view, Groups)
    assert view.scores is not None
    assert view.scores.tolist() == [0.5, 1.5, 0.5, 1.5]
    assert view.ranks is not None
    assert view.ranks.tolist() == [2, 1, 2, 1]
    assert view.group.tolist() == [0, 0, 1, 1]
    assert view.weights()["completion"].tolist() == [2, 2, 1, 1]


def test_pairs_carry_probability_margin_and_samples() -> None:
    row = {**PAIR, "probability": 0.9, "margin": 2.0, "baseline": D, "samples": [C, D]}
    view = make_bare_view("pairs", [row, {**row, "probability": 0.6, "samples": [D]}])
    assert isinstance(view, Pairs)
    assert view.probability.tolist() == [0.9, 0.6]
    assert view.margin is not None
    assert view.margin.tolist() == [2, 2]
    assert view.sample_pair is not None
    assert view.sample_pair.tolist() == [0, 0, 1]
    assert view.baseline is not None
    assert len(view.baseline) == 2


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no such method": (lambda: terms("dpoo", {}, pairs=[PAIR]), "dpo"),
    "unknown option": (lambda: terms("dpo", {"bta": 1}, pairs=[PAIR]), "did you mean `beta`"),
    "another view": (lambda: terms("dpo", {}, singles=[SINGLE]), "`dpo` reads `pairs`, not `singles`"),
    "no rows": (lambda: terms("dpo", {}), "not nothing"),
    "empty": (lambda: terms("dpo", {}, pairs=[]), "`pairs` is empty"),
    "two views": (lambda: terms("dpo", {}, pairs=[PAIR], singles=[SINGLE]), "`pairs` and `singles`"),
    "missing member": (lambda: terms("dpo", {}, pairs=[PAIR, {"chosen": C}]), r"pairs\[1\]: missing field `rejected`"),
    "missing ref_logp": (
        lambda: terms("dpo", {}, pairs=[{"chosen": C, "rejected": without(D, "ref_logp")}]),
        r"pairs\[0\].rejected: missing field `ref_logp`",
    ),
    "missing logp": (lambda: terms("sft", {}, demonstrations=[{}]), r"demonstrations\[0\]: missing field `logp`"),
    "missing label": (lambda: terms("kto", {}, singles=[without(SINGLE, "label")]), "missing field `label`"),
    "label in one row only": (
        lambda: terms("dro_v", {}, singles=[SINGLE, without(SINGLE, "label")]),
        r"singles\[1\]: missing field `label`",
    ),
    "missing mismatched": (lambda: terms("kto", {}, singles=[without(SINGLE, "mismatched")]), "`mismatched`"),
    "mismatched without ref_logp": (
        lambda: terms("kto", {}, singles=[{**SINGLE, "mismatched": {"logp": [-1.0]}}]),
        r"singles\[0\].mismatched: missing field `ref_logp`",
    ),
    "missing reward": (lambda: terms("dro_v", {}, singles=[without(SINGLE, "reward")]), "missing field `reward`"),
    "missing value": (lambda: terms("dro_v", {}, singles=[without(SINGLE, "value")]), "missing field `value`"),
    "short value": (lambda: terms("dro_v", {}, singles=[{**SINGLE, "value": [0, 0]}]), "give 3"),
    "missing KL": (lambda: terms("tdpo", {}, pairs=[PAIR]), "missing field `kl_ref_policy`"),
    "missing scores": (lambda: terms("lipo", {}, lists=[{"completions": [C, D]}]), "missing field `scores`"),
    "too few scores": (lambda: terms("lipo", {}, lists=[{"completions": [C, D], "scores": [1]}]), "`scores`"),
    "missing baseline": (lambda: terms("rpo", {"baseline": "sft"}, pairs=[PAIR]), "missing field `baseline`"),
    "missing samples": (lambda: terms("rpo", {"baseline": "samples"}, pairs=[PAIR]), "missing field `samples`"),
    "no sample": (lambda: terms("rpo", {}, pairs=[{**PAIR, "samples": [C]}, {**PAIR, "samples": []}]), "samples"),
    "unknown pair field": (lambda: terms("dpo", {}, pairs=[{**PAIR, "wieght": 1}]), "did you mean `weight`"),
    "unknown completion field": (
        lambda: terms("dpo", {}, pairs=[{"chosen": {**C, "logps": [0]}, "rejected": D}]),
        r"pairs\[0\].chosen: unknown field `logps`",
    ),
    "unknown list field": (lambda: terms("lipo", {}, lists=[{"completions": [C], "score": [1]}]), "`scores`"),
    "mismatched in a pair": (
        lambda: terms("dpo", {}, pairs=[{"chosen": {**C, "mismatched": D}, "rejected": D}]),
        "unknown field `mismatched`",
    ),
    "ragged columns": (
        lambda: terms("dpo", {}, pairs=[{"chosen": {**C, "ref_logp": [-1.0]}, "rejected": D}]),
        "`ref_logp` has 1 numbers, `logp` 2",
    ),
    "not a dict": (lambda: terms("dpo", {}, pairs=[{"chosen": [-1.0], "rejected": D}]), "chosen is list"),
    "unknown state": (lambda: terms("bco", {}, singles=[SINGLE], state={"mean": 0}), "no state `mean`"),
    "state of a stateless method": (lambda: terms("dpo", {}, pairs=[PAIR], state={"x": 0}), "leave `state` out"),
    "anchor of one row only": (
        lambda: terms("sft", {}, demonstrations=[{**C, "anchor": {"a": [0, 0]}}, {**C, "anchor": {}}]),
        r"missing field `anchor.a`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_field(case: str) -> None:
    call, text = BAD[case]
    with pytest.raises(ConfigError, match=text):
        call()


def test_finish_refuses_reduced_values_and_unknown_units() -> None:
    view = make_bare_view("pairs", [PAIR, PAIR, PAIR])
    assert isinstance(view, Pairs)
    with pytest.raises(ConfigError, match="never calls mean"):
        finish(view.delta[:2], view)
    with pytest.raises(ConfigError, match="never calls mean"):
        finish(view.delta.mean(), view)
    with pytest.raises(ConfigError, match="2 weights"):
        finish({"a": Term(view.delta, "pair", weight=torch.ones(2))}, view)
    with pytest.raises(ConfigError, match="unit `group`"):
        finish({"a": Term(view.delta, "group")}, view)


@pytest.mark.parametrize(("baseline", "column"), [("sft", "baseline"), ("samples", "samples")])
def test_a_view_without_the_column_is_refused_by_the_loss_too(baseline: str, column: str) -> None:
    view = make_bare_view("pairs", [PAIR])
    with pytest.raises(ConfigError, match=f"have no `{column}`"):
        METHODS.get("rpo")(baseline=baseline).loss(view)


def test_kto_without_partners_is_anchored_at_zero() -> None:
    view = make_bare_view("singles", [without(SINGLE, "mismatched")])
    zero = make_bare_view("singles", [{**SINGLE, "mismatched": {"logp": [-1.0], "ref_logp": [-1.0]}}])
    kto = METHODS.get("kto")()
    torch.testing.assert_close(kto.loss(view), kto.loss(zero), rtol=0, atol=0)


def test_finish_masks_units_and_replaces_weights() -> None:
    view = make_bare_view("pairs", [{**PAIR, "weight": 2.0}, PAIR, PAIR])
    assert isinstance(view, Pairs)
    where = torch.tensor([True, False, True])
    found = finish({"a": Term(torch.ones(3), Unit("pair", where=where))}, view)
    assert found["a"].values.tolist() == [2, 0, 1]
    assert found.counts == {"a": 2}
    replaced = finish({"a": Term(torch.ones(3), "pair", weight=torch.tensor([1.0, 5.0, 1.0]))}, view)
    assert replaced["a"].values.tolist() == [1, 5, 1]
    nothing = finish({"a": Term(torch.ones(3), Unit("pair", where=torch.zeros(3, dtype=torch.bool)))}, view)
    assert float(nothing.total()) == 0
