"""SeRA's selection and bootstrapping: what it keeps, what it adds, and what it must not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError, DataError
from align.data.groups import Group, RowId
from align.evaluate.sides import as_side
from align.loops.sera import Drawn, Sera, best_and_worst, bootstrap, ensemble, largest, pair_margins, select_round
from align.methods import terms
from align.sampling.base import SamplingParams
from align.testing.tiny import random_pairs, tiny_model, tiny_tokenizer

ROWS = [{"prompt": "p", "chosen": "c" * (i + 1), "rejected": "r"} for i in range(10)]
MARGINS = {f"rows row {i}": float(m) for i, m in enumerate((3, -1, 4, 1, -5, 9, 2, 6, 5, 0))}
OWN = [Drawn({"prompt": "q", "chosen": str(m), "rejected": "x"}, m) for m in (0.5, 7.0, 2.0, 7.0)]


def test_keeping_all_and_adding_none_is_the_base_method() -> None:
    rows, report = select_round(ROWS, Sera(keep=1.0, bootstrap=0.0), MARGINS, own=OWN)
    assert rows == ROWS
    assert (report.offline, report.kept, report.own) == (10, 10, 0)
    assert report.before == report.after == (5.5, 1.0)


def test_the_first_round_trains_on_everything() -> None:
    rows, report = select_round(ROWS, Sera(keep=0.1))
    assert rows == ROWS
    assert report.kept == 10
    with pytest.raises(ConfigError, match="round 1"):
        select_round(ROWS, Sera(), own=OWN)


def test_the_largest_margins_stay_in_their_order_and_own_pairs_follow() -> None:
    rows, report = select_round(ROWS, Sera(keep=0.4, bootstrap=0.5), MARGINS, own=OWN)
    assert rows[:4] == [ROWS[i] for i in (2, 5, 7, 8)]
    assert [row["chosen"] for row in rows[4:]] == ["7.0", "7.0"]
    assert (report.kept, report.own) == (4, 2)
    assert report.after[0] == pytest.approx((3 + 6 + 8 + 9 + 3 + 3) / 6)


def test_equal_margins_are_taken_by_id() -> None:
    assert largest({"b": 1.0, "a": 1.0, "c": 2.0}, 2) == ["c", "a"]


def test_ensemble_weighs_the_round_before() -> None:
    mixed = ensemble({"a": 1.0, "b": -2.0}, {"a": 5.0}, 0.25)
    assert mixed == {"a": 0.75 * 1 + 0.25 * 5, "b": -2.0}
    assert ensemble({"a": 1.0}, None, 0.25) == {"a": 1.0}
    flipped = {row: -m for row, m in MARGINS.items()}
    rows, _ = select_round(ROWS, Sera(keep=0.1, bootstrap=0.0, ensemble=1.0), MARGINS, flipped)
    assert rows == [ROWS[4]]
    rows, _ = select_round(ROWS, Sera(keep=0.1, bootstrap=0.0, ensemble=0.0), MARGINS, flipped)
    assert rows == [ROWS[5]]


def test_margins_of_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="other row 3"):
        select_round(ROWS, Sera(), {"other row 3": 1.0})


def test_own_pairs_are_the_extremes_and_ignore_a_function_of_the_prompt() -> None:
    h = np.array([0.5, -1.0, 2.0, 2.0])
    assert best_and_worst(h.tolist()) == (2, 1, 3.0)
    assert best_and_worst((h + 17.25).tolist()) == (2, 1, 3.0)


@pytest.mark.parametrize("option", [{"keep": 0}, {"keep": 1.1}, {"bootstrap": -1}, {"samples": 1}, {"ensemble": 1.1}])
def test_options_outside_the_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        Sera(**option)


def test_flipped_labels_gather_among_the_small_margins() -> None:
    """A short round of dpo on 20 % flips, with a linear policy: fewer of them in the kept half than in the whole."""
    drawn = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=drawn, dtype=torch.float64)
    truth = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5], dtype=torch.float64)
    flipped = torch.rand(400, generator=drawn) < 0.2
    signs = torch.where((features @ truth > 0) ^ flipped, 1.0, -1.0)
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for _ in range(10):
        margin = signs * (features @ theta)
        zero = torch.zeros(1, dtype=torch.float64)
        pairs = [
            {"chosen": {"logp": m[None], "ref_logp": zero}, "rejected": {"logp": zero, "ref_logp": zero}}
            for m in margin
        ]
        (slope,) = torch.autograd.grad(terms("dpo", {"beta": 1.0}, pairs=pairs).total(), theta)
        theta = (theta - 0.5 * slope).detach().requires_grad_()
    margins = {f"rows row {i}": float(m) for i, m in enumerate((signs * (features @ theta)).tolist())}
    rows, _ = select_round([{"number": i} for i in range(400)], Sera(keep=0.5, bootstrap=0), margins)
    kept = flipped[[int(row["number"]) for row in rows]]
    assert len(kept) == 200
    assert float(kept.double().mean()) < float(flipped.double().mean())


def test_margins_and_own_pairs_of_models() -> None:
    """Margins equal plain forwards of single sequences; a drawn pair's margin is that of its own row."""
    tokenizer = tiny_tokenizer()
    models = [tiny_model("qwen3", seed=seed) for seed in (1, 2)]
    policy, reference = (as_side(str(i), model, tokenizer) for i, model in enumerate(models))
    rows = random_pairs(4, seed=5)
    found = pair_margins([*rows, {"prompt": "p", "chosen": "", "rejected": "r"}], policy, reference)
    assert list(found) == [f"rows row {i}" for i in range(4)]

    def h(prompt: str, answer: str, per_token: bool = False) -> float:
        start = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]])
        logs = [model(input_ids=ids).logits[0].double().log_softmax(-1) for model in models]
        taken = [log[:-1].gather(1, ids[0, 1:, None])[len(start) - 1 :, 0] for log in logs]
        ratio = taken[0] - taken[1]
        return float((ratio.mean() if per_token else ratio.sum()).detach())

    with torch.no_grad():
        for i, row in enumerate(rows):
            wanted = h(row["prompt"], row["chosen"]) - h(row["prompt"], row["rejected"])
            assert found[f"rows row {i}"] == pytest.approx(wanted, abs=1e-3)
        mean = pair_margins(rows[:1], policy, reference, per_token=True)["rows row 0"]
        wanted = h(rows[0]["prompt"], rows[0]["chosen"], True) - h(rows[0]["prompt"], rows[0]["rejected"], True)
        assert mean == pytest.approx(wanted, abs=1e-5)

    groups = [Group(RowId("rows", i), row["prompt"], ()) for i, row in enumerate(rows)]
    own = bootstrap(groups, policy, reference, Sera(samples=6), SamplingParams(max_new_tokens=60, seed=3))
    assert own, "no prompt of four has two finished samples of six"
    for one in own:
        assert one.margin >= 0
        assert set(one.row) == {"prompt", "chosen", "rejected"}
