"""What the papers (and a little algebra) say of each loss: constants at the reference, slopes, limits, equalities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from align.methods import METHODS, terms
from align.methods.evaluate import make_method
from align.methods.stages import log1mexp
from align.testing.reference_step import evaluate
from align.testing.rows import Row, random_rows, tracked
from tests.methods.loops import h, sigmoid, softplus

LOG2 = math.log(2)


def one(*logp: float, ref: list[float] | None = None, **more: Any) -> Row:
    """A completion; its reference is the policy itself unless given."""
    return {"logp": list(logp), "ref_logp": list(logp) if ref is None else ref, **more}


def shifted(row: Row, ref: float) -> Row:
    """The completion with `ref` added to its reference's log-probability (to its first token's)."""
    return {**row, "ref_logp": [row["ref_logp"][0] + ref, *row["ref_logp"][1:]]}


def at_h(ratio: float, /, **more: Any) -> Row:
    """A completion of one token with log-ratio `ratio`."""
    return one(-1.0, ref=[-1.0 - ratio], **more)


def values(name: str, options: dict[str, Any], **rows: Any) -> np.ndarray:
    return np.asarray(terms(name, options, **rows))


def slopes(name: str, options: dict[str, Any], rows: list[Row], state: Any = None) -> list[np.ndarray]:
    """Gradient of the total in each trained column, in the order of `outputs_in`; zeros where there is none."""
    made, leaves = tracked(rows)
    found = torch.autograd.grad(evaluate(make_method(name, options), made, state).total(), leaves, allow_unused=True)
    return [np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(leaves, found, strict=True)]


PAIR = {
    "chosen": one(-0.3, -1.2, -0.4, ref=[-0.5, -1.0, -0.9]),
    "rejected": one(-0.8, -0.2, ref=[-0.6, -0.5]),
}
Z = h(PAIR["chosen"]) - h(PAIR["rejected"])


def at_reference(name: str) -> list[Row]:
    """Random rows with policy = reference and no divergence."""
    rows = random_rows(METHODS.get(name)(), 5, seed=3)
    for row in rows:
        parts = row.get("completions") or [row[k] for k in ("chosen", "rejected", "mismatched") if k in row] or [row]
        for part in {id(part): part for part in [*parts, row]}.values():
            part["weight"] = 1.0
            if "logp" in part:
                part["ref_logp"] = list(part["logp"])
            if "kl_ref_policy" in part:
                part["kl_ref_policy"] = [0.0] * len(part["logp"])
    return rows


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dpo", {"beta": 0.37}, LOG2),
        ("ipo", {"tau": 0.2}, 1 / (4 * 0.2**2)),
        ("ipo", {"tau": 0.2, "normalize": "sum"}, 1 / (4 * 0.2**2)),
        ("tdpo", {"beta": 0.3, "alpha": 0.7}, LOG2),
        ("tdpo", {"variant": 1}, LOG2),
        ("bco", {"beta": 0.4}, LOG2),
        ("kto", {"desirable_weight": 1.4, "undesirable_weight": 1.4}, 0.7),
        ("rpo", {"eta": 0.0}, LOG2),
        ("lipo", {"reduction": "mean"}, LOG2),
    ],
)
def test_first_loss_is_a_known_constant(name: str, options: dict[str, Any], expected: float) -> None:
    rows = at_reference(name)
    if name == "lipo":
        rows = [row for row in rows if len(set(row["scores"])) > 1]
        assert rows
    found = values(name, options, **{METHODS.get(name).view: rows})
    np.testing.assert_allclose(found, expected, atol=1e-12)


class TestDPO:
    def test_slopes(self) -> None:
        chosen, rejected = slopes("dpo", {"beta": 0.6}, [PAIR])
        np.testing.assert_allclose(chosen, -0.6 * sigmoid(-0.6 * Z), atol=1e-14)
        np.testing.assert_allclose(rejected, 0.6 * sigmoid(-0.6 * Z), atol=1e-14)

    def test_swapping_adds_z(self) -> None:
        swapped = {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
        there, back = values("dpo", {"beta": 0.6}, pairs=[PAIR, swapped])
        assert there - back == pytest.approx(-0.6 * Z, abs=1e-14)

    @pytest.mark.parametrize(
        ("name", "options"),
        [("dpo", {}), ("ipo", {"normalize": "sum"}), ("tdpo", {"alpha": 0.0}), ("rpo", {"eta": 0.0})],
    )
    def test_difference_only_losses_ignore_a_function_of_the_prompt(self, name: str, options: dict[str, Any]) -> None:
        pair = {k: {**row, "kl_ref_policy": [0.2] * len(row["logp"])} for k, row in PAIR.items()}
        moved = {k: shifted(row, 2.5) for k, row in pair.items()}
        first, second = values(name, options, pairs=[pair, moved])
        assert first == pytest.approx(second, abs=1e-12)
        found = slopes(name, options, [pair])
        logps = [g for g in found if g.any()]
        assert logps[0][0] == pytest.approx(-logps[1][0], abs=1e-14)

    def test_minimiser_is_the_tilted_reference(self) -> None:
        """Tabular, infinite data: the population gradient is zero at pi_ref e^{r / beta} / Z, and not beside it."""
        beta, reward = 0.7, torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
        reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()

        def gradient(logits: torch.Tensor) -> float:
            logits = logits.clone().requires_grad_()
            logp = logits.log_softmax(0)
            both = [(i, j) for i in range(4) for j in range(4) if i != j]
            pairs = [
                {
                    "chosen": {"logp": logp[i : i + 1], "ref_logp": reference[i : i + 1]},
                    "rejected": {"logp": logp[j : j + 1], "ref_logp": reference[j : j + 1]},
                    "weight": sigmoid(float(reward[i] - reward[j])),
                }
                for i, j in both
            ]
            terms("dpo", {"beta": beta}, pairs=pairs).total().backward()
            assert logits.grad is not None
            return float(logits.grad.abs().max())

        best = reference + reward / beta
        assert gradient(best) < 1e-15
        assert gradient(best + torch.tensor([0.1, 0, 0, 0])) > 1e-3


class TestIPO:
    def test_zero_at_the_target_and_pulled_back_beyond_it(self) -> None:
        tau = 0.4
        target = 1 / (2 * tau)
        pairs = [{"chosen": at_h(target + extra), "rejected": at_h(0.0)} for extra in (0.0, -0.3, 0.3)]
        for normalize in ("sum", "token"):
            options = {"tau": tau, "normalize": normalize}
            found = values("ipo", options, pairs=pairs)
            np.testing.assert_allclose(found, [0, 0.09, 0.09], atol=1e-14)
            for pair, extra in zip(pairs, (0.0, -0.3, 0.3), strict=True):
                chosen, rejected = slopes("ipo", options, [pair])
                assert chosen[0] == pytest.approx(2 * extra, abs=1e-13)
                assert rejected[0] == pytest.approx(-2 * extra, abs=1e-13)

    def test_token_mode_weighs_by_length(self) -> None:
        chosen, rejected = slopes("ipo", {"normalize": "token"}, [PAIR])
        assert abs(chosen[0] / rejected[0]) == pytest.approx(2 / 3, abs=1e-13)
        summed = slopes("ipo", {"normalize": "sum"}, [PAIR])
        assert summed[0][0] == pytest.approx(-summed[1][0], abs=1e-13)


class TestSimPO:
    OPTIONS = {"beta": 2.5, "gamma_ratio": 0.4}  # noqa: RUF012

    def test_equal_averages(self) -> None:
        pair = {"chosen": one(-0.2, -0.6), "rejected": one(-0.4)}
        assert values("simpo", self.OPTIONS, pairs=[pair])[0] == pytest.approx(softplus(1.0), abs=1e-14)

    def test_doubling_sum_and_length_changes_nothing(self) -> None:
        double = {name: {"logp": row["logp"] * 2} for name, row in PAIR.items()}
        first, second = values("simpo", self.OPTIONS, pairs=[PAIR_BARE, double])
        assert first == pytest.approx(second, abs=1e-14)

    def test_slope(self) -> None:
        chosen, rejected = slopes("simpo", self.OPTIONS, [PAIR_BARE])
        m = 2.5 * (-1.9 / 3 + 1.0 / 2 - 0.4)
        np.testing.assert_allclose(chosen, -(2.5 / 3) * sigmoid(-m), atol=1e-14)
        np.testing.assert_allclose(rejected, (2.5 / 2) * sigmoid(-m), atol=1e-14)

    def test_without_margin_it_is_reference_free_dpo_of_equal_lengths(self) -> None:
        pair = {"chosen": one(-0.3, -1.2, ref=[0.0, 0.0]), "rejected": one(-0.8, -0.2, ref=[0.0, 0.0])}
        bare = {name: {"logp": row["logp"]} for name, row in pair.items()}
        ours = values("simpo", {"beta": 2.0, "gamma_ratio": 0.0}, pairs=[bare])
        assert ours[0] == pytest.approx(values("dpo", {"beta": 1.0}, pairs=[pair])[0], abs=1e-14)

    def test_smoothing_adds_its_share_of_the_margin(self) -> None:
        plain = values("simpo", self.OPTIONS, pairs=[PAIR_BARE])[0]
        smooth = values("simpo", {**self.OPTIONS, "label_smoothing": 0.2}, pairs=[PAIR_BARE])[0]
        assert smooth - plain == pytest.approx(0.2 * 2.5 * (-1.9 / 3 + 1.0 / 2 - 0.4), abs=1e-14)

    def test_sft_term_is_the_chosen_tokens_own_mean(self) -> None:
        plain = values("simpo", self.OPTIONS, pairs=[PAIR_BARE])[0]
        more = values("simpo", {**self.OPTIONS, "sft_weight": 0.3}, pairs=[PAIR_BARE])[0]
        assert more - plain == pytest.approx(0.3 * 1.9 / 3, abs=1e-14)


PAIR_BARE = {name: {"logp": row["logp"]} for name, row in PAIR.items()}


class TestORPO:
    def test_equal_probabilities(self) -> None:
        pair = {"chosen": {"logp": [-0.2, -0.6]}, "rejected": {"logp": [-0.4]}}
        assert values("orpo", {"lambda": 0.3}, pairs=[pair])[0] == pytest.approx(0.4 + 0.3 * LOG2, abs=1e-14)

    def test_lambda_zero_is_sft(self) -> None:
        ours = values("orpo", {"lambda": 0}, pairs=[PAIR_BARE])
        theirs = values("sft", {"reduction": "sequence"}, demonstrations=[PAIR_BARE["chosen"]])
        np.testing.assert_allclose(ours, theirs, atol=1e-14)

    @pytest.mark.parametrize("mean", [-1e-3, -0.5, -math.log(2), -0.8, -30.0])
    def test_slope_of_the_odds(self, mean: float) -> None:
        """d log odds / d log p = 1 / (1 - p), on both sides of the branch of log1mexp."""
        pair = {"chosen": {"logp": [mean]}, "rejected": {"logp": [-0.7]}}
        found = slopes("orpo", {"lambda": 1.0}, [pair])[0][0]
        p, q = math.exp(mean), math.exp(-0.7)
        margin = mean - math.log(-math.expm1(mean)) - math.log(q / (1 - q))
        assert found == pytest.approx(-1 - sigmoid(-margin) / -math.expm1(mean), rel=1e-12)
        assert p < 1

    @pytest.mark.parametrize("x", [-1e-12, -1e-4, -0.5, -5.0, -40.0])
    def test_log1mexp_keeps_its_digits(self, x: float) -> None:
        expected = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
        assert float(log1mexp(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, rel=1e-14, abs=0)

    def test_a_probability_that_rounds_to_one_is_finite(self) -> None:
        pair = {"chosen": {"logp": [0.0]}, "rejected": {"logp": [-1e4]}}
        assert np.isfinite(values("orpo", {}, pairs=[pair])).all()
        both = {"chosen": {"logp": [0.0]}, "rejected": {"logp": [0.0, 0.0]}}
        assert values("orpo", {"lambda": 1.0}, pairs=[both])[0] == pytest.approx(LOG2, abs=1e-14)


class TestRPO:
    def test_eta_zero_is_dpo(self) -> None:
        np.testing.assert_allclose(
            values("rpo", {"beta": 0.6, "eta": 0}, pairs=[PAIR]), values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14
        )

    def test_slope_never_vanishes(self) -> None:
        chosen, rejected = slopes("rpo", {"beta": 0.6, "eta": 0.05}, [PAIR])
        np.testing.assert_allclose(chosen, -0.6 * (sigmoid(-0.6 * Z) + 0.05), atol=1e-14)
        np.testing.assert_allclose(rejected, 0.6 * sigmoid(-0.6 * Z), atol=1e-14)
        solved = {"chosen": at_h(2000.0), "rejected": at_h(-2000.0)}
        assert slopes("rpo", {"beta": 0.6, "eta": 0.05}, [solved])[0][0] == pytest.approx(-0.03, abs=1e-14)

    @pytest.mark.parametrize(
        ("baseline", "reduction", "expected"),
        [
            ("chosen", "sum", 0.2 * 0.6 * 1.9),
            ("chosen", "token_mean", 0.2 * 1.9 / 3),
            ("sft", "sum", 0.2 * 0.6 * 5.0),
            ("sft", "token_mean", 0.2 * 2.5),
            ("samples", "sum", 0.2 * 0.6 * (1 + 4) / 2),
            ("samples", "token_mean", 0.2 * (1 + 2) / 2),
        ],
    )
    def test_extra_term(self, baseline: str, reduction: str, expected: float) -> None:
        pair = {**PAIR, "baseline": one(-2.0, -3.0), "samples": [one(-1.0), one(-1.0, -3.0)]}
        options = {"beta": 0.6, "eta": 0.2, "baseline": baseline, "sft_reduction": reduction}
        extra = values("rpo", options, pairs=[pair]) - values("dpo", {"beta": 0.6}, pairs=[PAIR])
        assert extra[0] == pytest.approx(expected, abs=1e-14)

    def test_the_column_of_the_baseline_is_required_only_where_it_is_read(self) -> None:
        rpo = METHODS.get("rpo")
        assert rpo().requires() == {"ref_logp"}
        assert rpo(baseline="sft").requires() == {"ref_logp", "baseline"}
        assert rpo(baseline="samples").requires() == {"ref_logp", "samples"}


def labelled(ratio: float, label: bool, other: float = 0.0, **more: Any) -> Row:
    return at_h(ratio, label=label, mismatched=at_h(other), **more)


class TestKTO:
    OPTIONS = {"beta": 0.5, "desirable_weight": 1.2, "undesirable_weight": 0.8}  # noqa: RUF012

    def test_bounded_by_the_weight(self) -> None:
        rows = [labelled(ratio, label) for ratio in (-900.0, 900.0) for label in (True, False)]
        np.testing.assert_allclose(values("kto", self.OPTIONS, singles=rows), [1.2, 0, 0, 0.8], atol=1e-12)

    def test_slope_is_largest_at_the_anchor_and_vanishes_on_both_sides(self) -> None:
        for label, weight, sign in ((True, 1.2, -1), (False, 0.8, 1)):
            found = {}
            for ratio in (-200.0, 0.5, 1.0, 1.5, 200.0):
                found[ratio] = slopes("kto", self.OPTIONS, [labelled(ratio, label, other=1.0)])[0][0]
                s = sigmoid(0.5 * (ratio - 1.0))
                assert found[ratio] == pytest.approx(sign * weight * 0.5 * s * (1 - s), abs=1e-14)
            assert max(found, key=lambda ratio: abs(found[ratio])) == 1.0
            assert abs(found[1.0]) == pytest.approx(weight * 0.5 / 4, abs=1e-14)

    def test_anchor_is_a_mean_over_the_batch_cut_at_zero_and_without_gradient(self) -> None:
        below = [labelled(0.7, True, other=-3.0), labelled(0.1, False, other=1.0)]
        zero = [labelled(0.7, True), labelled(0.1, False)]
        np.testing.assert_allclose(values("kto", {}, singles=below), values("kto", {}, singles=zero), atol=1e-14)
        above = [labelled(0.7, True, other=3.0), labelled(0.1, False, other=1.0)]
        same = [labelled(0.7, True, other=2.0), labelled(0.1, False, other=2.0)]
        np.testing.assert_allclose(values("kto", {}, singles=above), values("kto", {}, singles=same), atol=1e-14)
        found = slopes("kto", {}, above)
        assert [bool(g.any()) for g in found] == [True, False, True, False]

    def test_pairs_around_zero_are_apo_zero(self) -> None:
        rows = [labelled(0.7, True), labelled(-0.4, False)]
        expected = 1 - sigmoid(0.5 * 0.7) + sigmoid(0.5 * -0.4)
        assert values("kto", {"beta": 0.5}, singles=rows).sum() == pytest.approx(expected, abs=1e-14)


def classed(ratio: float, label: bool, **more: Any) -> Row:
    return at_h(ratio, label=label, **more)


class TestBCO:
    def test_centre_is_the_mean_of_class_means_whatever_their_sizes(self) -> None:
        rows = [classed(4.0, True), classed(1.0, False), classed(-1.0, False), classed(0.0, False)]
        found = values("bco", {"beta": 0.5}, singles=rows)
        delta = 0.5 * (4.0 + 0.0) / 2  # the pooled mean would be 0.5
        expected = [softplus(-(2.0 - delta)), *(softplus(0.5 * r - delta) for r in (1.0, -1.0, 0.0))]
        np.testing.assert_allclose(found, expected, atol=1e-14)

    def test_one_class_alone_is_its_own_centre(self) -> None:
        found = values("bco", {"beta": 0.5}, singles=[classed(3.0, True), classed(1.0, True)])
        np.testing.assert_allclose(found, [softplus(-0.5), softplus(0.5)], atol=1e-14)

    def test_means_run_over_steps_and_count_the_present_one(self) -> None:
        first = terms("bco", {"beta": 0.5}, singles=[classed(4.0, True), classed(2.0, True), classed(-1.0, False)])
        state = {name: float(value) for name, value in first.state.items()}
        assert state == {
            "desirable_sum": 3.0,
            "desirable_count": 2.0,
            "undesirable_sum": -0.5,
            "undesirable_count": 1.0,
        }
        second = terms("bco", {"beta": 0.5}, singles=[classed(-6.0, True), classed(3.0, False)], state=state)
        delta = ((3.0 - 3.0) / 3 + (-0.5 + 1.5) / 2) / 2
        np.testing.assert_allclose(np.asarray(second), [softplus(3.0 + delta), softplus(1.5 - delta)], atol=1e-14)
        assert float(second.state["desirable_count"]) == 3

    def test_centre_has_no_gradient(self) -> None:
        rows = [classed(2.0, True), classed(-1.0, False)]
        found = slopes("bco", {"beta": 0.5}, rows)
        delta = 0.5 * 0.5
        assert found[0][0] == pytest.approx(-0.5 * sigmoid(-(1.0 - delta)) / 2, abs=1e-14)
        assert found[1][0] == pytest.approx(0.5 * sigmoid(-0.5 - delta) / 2, abs=1e-14)

    @pytest.mark.parametrize("centre", [-4.0, -0.3, 0.0, 0.7, 5.0])
    def test_pair_form_bounds_dpo_from_above(self, centre: float) -> None:
        many = 1e9  # past batches that fix the centre
        state = {
            "desirable_sum": centre * many,
            "desirable_count": many,
            "undesirable_sum": centre * many,
            "undesirable_count": many,
        }
        for win, lose in ((0.4, -0.6), (-3.0, 2.0), (5.0, 1.0)):
            rows = [classed(win, True), classed(lose, False)]
            total = np.asarray(terms("bco", {"beta": 0.5}, singles=rows, state=state)).sum()
            assert total >= softplus(-0.5 * (win - lose)) - 1e-12
            best = np.asarray(terms("bco", {"beta": 0.5}, singles=rows)).sum()
            assert best <= total + 1e-12

    def test_hard_examples_keep_their_gradient(self) -> None:
        rows = [classed(-900.0, True), classed(900.0, True)]
        assert slopes("bco", {"beta": 0.5}, rows)[0][0] == pytest.approx(-0.5 / 2, abs=1e-12)

    def test_density_ratios_of_the_undesirable_are_clipped(self) -> None:
        rows = [classed(0.0, label, weight=w) for label in (True, False) for w in (0.1, 3.0, 50.0, 0.0)]
        found = values("bco", {"clip": [0.5, 10]}, singles=rows) / LOG2
        np.testing.assert_allclose(found, [0.1, 3, 50, 0, 0.5, 3, 10, 0], atol=1e-12)


class TestLiPO:
    def listed(self, ratios: list[float], scores: list[float]) -> Row:
        return {"completions": [at_h(ratio) for ratio in ratios], "scores": scores}

    def test_two_are_dpo(self) -> None:
        pair = {"chosen": at_h(0.3), "rejected": at_h(1.1)}
        lists = [self.listed([0.3, 1.1], [1.0, 0.0]), self.listed([1.1, 0.3], [0.2, 0.9])]
        expected = values("dpo", {"beta": 0.4}, pairs=[pair, pair])
        np.testing.assert_allclose(values("lipo", {"beta": 0.4}, lists=lists), expected, atol=1e-14)

    def test_ties_contribute_nothing_and_keep_their_group_in_the_count(self) -> None:
        lists = [self.listed([0.3, 1.1], [1.0, 1.0]), self.listed([0.3, 1.1, 0.3], [1.0, 1.0, 0.0])]
        found = terms("lipo", {"beta": 0.4}, lists=lists)
        np.testing.assert_allclose(np.asarray(found), [0, LOG2 + softplus(-0.4 * 0.8)], atol=1e-14)
        assert found.counts == {"loss": 2}

    def test_a_shift_of_the_whole_list_changes_nothing(self) -> None:
        ratios, scores = [0.3, -1.1, 0.6, 0.0], [0.1, 0.7, 0.7, 0.2]
        lists = [self.listed(ratios, scores), self.listed([r + 3.3 for r in ratios], scores)]
        first, second = values("lipo", {}, lists=lists)
        assert first == pytest.approx(second, abs=1e-13)

    def test_reference_value_counts_ordered_pairs(self) -> None:
        lists = [self.listed([0.0] * 4, [3, 2, 1, 0]), self.listed([0.0] * 3, [1, 1, 0])]
        np.testing.assert_allclose(values("lipo", {}, lists=lists), [6 * LOG2, 2 * LOG2], atol=1e-13)
        np.testing.assert_allclose(values("lipo", {"reduction": "mean"}, lists=lists), LOG2, atol=1e-13)

    def test_ranks_stand_for_scores(self) -> None:
        ratios = [0.3, -1.1, 0.6]
        scored = self.listed(ratios, [0.2, 0.9, 0.2])
        ranked = {"completions": scored["completions"], "ranks": [2, 1, 2]}
        np.testing.assert_allclose(values("lipo", {}, lists=[scored]), values("lipo", {}, lists=[ranked]), atol=1e-14)


class TestTDPO:
    def drifted(self, chosen: float, rejected: float) -> Row:
        return {
            "chosen": {**PAIR["chosen"], "kl_ref_policy": [chosen, 0.1, 0.0]},
            "rejected": {**PAIR["rejected"], "kl_ref_policy": [rejected, 0.2]},
        }

    def test_alpha_zero_is_dpo(self) -> None:
        ours = values("tdpo", {"beta": 0.6, "alpha": 0}, pairs=[self.drifted(0.4, 0.9)])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)

    def test_alpha_one_has_the_value_of_variant_1_and_another_gradient(self) -> None:
        row = self.drifted(0.4, 0.9)
        one_, two = {"beta": 0.6, "variant": 1}, {"beta": 0.6, "alpha": 1.0}
        assert values("tdpo", one_, pairs=[row])[0] == pytest.approx(values("tdpo", two, pairs=[row])[0], abs=1e-14)
        first, second = slopes("tdpo", one_, [row]), slopes("tdpo", two, [row])
        for i in (0, 2, 3):  # chosen logp, rejected logp, rejected KL
            np.testing.assert_allclose(first[i], second[i], atol=1e-14)
        assert (first[1] < 0).all(), "variant 1 pushes the chosen response's KL up"
        assert not second[1].any(), "variant 2 leaves it alone"

    def test_divergence_on_the_rejected_raises_the_loss(self) -> None:
        for options in ({}, {"variant": 1}):
            low, high = values("tdpo", options, pairs=[self.drifted(0.4, 0.9), self.drifted(0.4, 1.9)])
            assert high > low
            assert (slopes("tdpo", options, [self.drifted(0.4, 0.9)])[3] > 0).all()


class TestDROV:
    def single(self, reward: float, value: float, ratio: float) -> Row:
        return at_h(ratio, reward=reward, value=[value, 9.0])

    def test_zero_at_the_reference_where_the_value_is_the_reward(self) -> None:
        found = values("dro_v", {"tau": 0.3}, singles=[self.single(0.7, 0.7, 0.0), self.single(-2, -2, 0.0)])
        np.testing.assert_allclose(found, 0, atol=1e-14)

    def test_unique_zero_is_the_soft_value_and_the_tilted_policy(self) -> None:
        tau, rewards, reference = 0.6, np.array([0.3, -1.0, 0.8]), np.array([0.5, 0.2, 0.3])
        value = tau * math.log((reference * np.exp(rewards / tau)).sum())
        ratios = (rewards - value) / tau  # log of pi* / pi_ref
        assert (reference * np.exp(ratios)).sum() == pytest.approx(1)
        rows = [self.single(r, value, ratio) for r, ratio in zip(rewards, ratios, strict=True)]
        np.testing.assert_allclose(values("dro_v", {"tau": tau}, singles=rows), 0, atol=1e-14)
        wrong = [self.single(r, value + 0.1, ratio) for r, ratio in zip(rewards, ratios, strict=True)]
        assert (values("dro_v", {"tau": tau}, singles=wrong) > 1e-3).all()

    def test_eliminating_the_value_leaves_a_regression_of_differences(self) -> None:
        tau, rewards, ratios = 0.6, (1.4, -0.2), (0.3, 0.9)
        best = sum(r - tau * ratio for r, ratio in zip(rewards, ratios, strict=True)) / 2
        rows = [self.single(r, best, ratio) for r, ratio in zip(rewards, ratios, strict=True)]
        expected = 0.25 * (rewards[0] - rewards[1] - tau * (ratios[0] - ratios[1])) ** 2
        assert values("dro_v", {"tau": tau}, singles=rows).sum() == pytest.approx(expected, abs=1e-14)

    def test_a_function_of_the_prompt_is_absorbed_by_the_value(self) -> None:
        rows = [self.single(0.4, 0.1, 0.2), self.single(0.4 + 5.0, 0.1 + 5.0, 0.2)]
        first, second = values("dro_v", {}, singles=rows)
        assert first == pytest.approx(second, abs=1e-12)

    def test_slopes_and_the_scale_of_the_policys(self) -> None:
        tau, row = 0.5, self.single(0.9, 0.2, 0.5)
        residual = 0.9 - 0.2 - tau * 0.5
        logp, value = slopes("dro_v", {"tau": tau}, [row])
        assert logp[0] == pytest.approx(-tau * residual, abs=1e-14)
        np.testing.assert_allclose(value, [-residual, 0], atol=1e-14)
        scaled = {"tau": tau, "policy_grad_scale": 1 / tau}
        logp, value = slopes("dro_v", scaled, [row])
        assert logp[0] == pytest.approx(-(0.9 - 0.2) + tau * 0.5, abs=1e-14)  # -(r - V) + d(tau h^2 / 2) / dh
        np.testing.assert_allclose(value, [-residual, 0], atol=1e-14)
        assert values("dro_v", scaled, singles=[row])[0] == pytest.approx(0.5 * residual**2, abs=1e-14)


class TestSFT:
    ROWS = ({"logp": [-1.0, -2.0, -6.0]}, {"logp": [-4.0]})

    def test_reductions(self) -> None:
        assert float(terms("sft", {}, demonstrations=self.ROWS).total()) == pytest.approx(13 / 4)
        assert float(terms("sft", {"reduction": "sequence"}, demonstrations=self.ROWS).total()) == pytest.approx(3.5)

    def test_units(self) -> None:
        assert terms("sft", {}, demonstrations=self.ROWS).counts == {"loss": 4}
        assert terms("sft", {"reduction": "sequence"}, demonstrations=self.ROWS).counts == {"loss": 2}

    def test_equal_lengths_agree(self) -> None:
        rows = [{"logp": [-1.0, -2.0]}, {"logp": [-4.0, -0.5]}]
        totals = [float(terms("sft", {"reduction": r}, demonstrations=rows).total()) for r in ("token", "sequence")]
        assert totals[0] == pytest.approx(totals[1], abs=1e-14)

    def test_weights_multiply_tokens_and_not_the_count(self) -> None:
        rows = [{**row, "weight": weight} for row, weight in zip(self.ROWS, (2.0, 0.0), strict=True)]
        assert float(terms("sft", {}, demonstrations=rows).total()) == pytest.approx(18 / 4)
