"""The pairwise losses that look at the batch, saturate, or read soft labels; the others are in `test_pairs.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import AlignError, DataError
from align.core.seeds import uniforms
from align.methods import terms
from align.methods._pairs import matched
from align.methods.evaluate import make_bare_view, make_method
from align.scoring.assemble import make_view
from align.testing.rows import Row, random_rows
from align.testing.steps import random_groups
from tests.methods.loops import h, sigmoid, softplus
from tests.methods.test_identities import LOG2, PAIR, Z, at_h, one, slopes, values
from tests.methods.test_pairs import NEAR, pair_at, slope, value


def keyed(chosen: float, rejected: float = 0.0, key: int = 0, **more: Any) -> Row:
    return {"chosen": at_h(chosen, key=key), "rejected": at_h(rejected, key=key + 1), **more}


class TestBetaDPO:
    def test_without_dynamics_it_is_dpo(self) -> None:
        rows = [keyed(z, key=i) for i, z in enumerate((0.3, -2.0, 1.4))]
        found = values("beta_dpo", {"beta0": 0.3, "a": 0, "rho": 1}, pairs=rows)
        np.testing.assert_allclose(found, values("dpo", {"beta": 0.3}, pairs=rows), atol=1e-12)

    def test_state_takes_the_batch_in_before_it_is_read(self) -> None:
        rows = [keyed(z, key=i) for i, z in enumerate((1.0, 2.0, 6.0))]
        found = terms("beta_dpo", {"rho": 1}, pairs=rows, state={"M0": 5.0, "S": 2.0})
        assert {k: float(v) for k, v in found.state.items()} == pytest.approx(
            {"M0": 0.9 * 5 + 0.1 * 3, "S": 0.9 * 2 + 0.1 * math.sqrt(7)}, **NEAR
        )
        beta = 0.1 * (1 + 0.6 * (3.0 - 4.8))
        assert beta < 0  # below the floor
        np.testing.assert_allclose(np.asarray(found), [softplus(-1e-3 * z) for z in (1.0, 2.0, 6.0)], atol=1e-12)
        found = terms("beta_dpo", {"rho": 1}, pairs=rows, state={"M0": 1.0})
        beta = 0.1 * (1 + 0.6 * (3.0 - (0.9 + 0.3)))
        np.testing.assert_allclose(np.asarray(found), [softplus(-beta * z) for z in (1.0, 2.0, 6.0)], atol=1e-12)

    def test_equal_margins_differ_from_the_mean_by_its_lag_alone(self) -> None:
        rows = [keyed(2.0, key=i) for i in range(5)]
        found = terms("beta_dpo", {}, pairs=rows)
        beta = 0.1 * (1 + 0.6 * (2.0 - 0.2))
        assert float(found.total()) == pytest.approx(softplus(-beta * 2.0), **NEAR)
        settled = terms("beta_dpo", {}, pairs=rows, state={"M0": 2.0})
        assert float(settled.total()) == pytest.approx(softplus(-0.1 * 2.0), **NEAR)

    def test_one_pair_keeps_the_deviation_and_is_kept(self) -> None:
        found = terms("beta_dpo", {}, pairs=[keyed(2.0)], state={"S": 1.5})
        assert float(found.state["S"]) == 1.5
        assert found.counts == {"loss": 1}

    def test_no_gradient_through_beta(self) -> None:
        rows = [keyed(z, key=i) for i, z in enumerate((1.0, 2.0, 6.0))]
        beta = 0.1 * (1 + 0.6 * (3.0 - 0.3))
        found = slopes("beta_dpo", {"rho": 1}, rows)[::2]
        np.testing.assert_allclose(
            np.concatenate(found), [-beta * sigmoid(-beta * z) / 3 for z in (1.0, 2.0, 6.0)], atol=1e-13
        )

    def test_the_share_kept_is_counted_and_drawn_by_rows_not_places(self) -> None:
        rows = [keyed(0.1 * i, key=10 * i) for i in range(10)]
        found = terms("beta_dpo", {"rho": 0.79}, pairs=rows)
        kept = np.asarray(found) > 0
        assert kept.sum() == 7 == found.counts["loss"]
        turned = np.asarray(terms("beta_dpo", {"rho": 0.79}, pairs=rows[::-1]))
        np.testing.assert_allclose(turned[::-1], np.asarray(found), atol=1e-12)

    def test_draws_follow_the_weights_and_the_step(self) -> None:
        """One of three is kept, by weight exp(-x^2 / 2) of its standardised margin; another step draws anew."""
        options = {"rho": 0.34, "m": 0.9999999}
        rows = [keyed(2.0 + 0.5 * x, key=7 * x) for x in range(3)]
        kept = np.mean([self.kept(options, rows, {"M0": 2.0, "S": 0.5}, seed) for seed in range(2500)], 0)
        weights = np.exp(-0.5 * np.arange(3) ** 2)
        share = weights / weights.sum()
        assert (np.abs(kept - share) < 4 * np.sqrt(share * (1 - share) / 2500)).all()

    def kept(self, options: dict[str, Any], rows: list[Row], state: dict[str, float], seed: int = 0) -> list[bool]:
        given = {name: torch.tensor(x, dtype=torch.float64) for name, x in state.items()}
        method = make_method("beta_dpo", options)
        return method.loss(make_bare_view("pairs", rows, state=given, seed=seed))["loss"].kind.where.tolist()

    def test_equal_margins_are_drawn_alike_at_the_first_step(self) -> None:
        rows = [keyed(0.0, key=10 * i) for i in range(8)]
        found = self.kept({"rho": 0.5}, rows, {})
        assert sum(found) == 4
        assert found != [True] * 4 + [False] * 4
        assert self.kept({"rho": 0.5}, rows[::-1], {})[::-1] == found

    @pytest.mark.parametrize("shared", ["chosen", "rejected"])
    def test_pairs_that_share_an_answer_draw_apart(self, shared: str) -> None:
        other = "rejected" if shared == "chosen" else "chosen"
        rows = [{shared: at_h(0.0, key=1), other: at_h(0.0, key=i)} for i in (2, 3)]
        firsts = [self.kept({"rho": 0.5}, rows, {}, seed)[0] for seed in range(40)]
        assert 0 < sum(firsts) < 40

    def test_two_pairs_have_a_deviation(self) -> None:
        found = terms("beta_dpo", {}, pairs=[keyed(1.0), keyed(3.0, key=5)])
        assert float(found.state["S"]) == pytest.approx(0.1 * math.sqrt(2), **NEAR)


def test_uniforms_are_uniform_and_read_every_key() -> None:
    keys = np.arange(40_000)
    found = uniforms(3, keys, keys + 7)
    assert 0 < found.min() < found.max() < 1
    counts, _ = np.histogram(found, 50, (0, 1))
    assert ((counts - 800) ** 2 / 800).sum() < 90  # chi-square with 49 degrees of freedom: p of 3e-4
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02
    for other in (uniforms(4, keys, keys + 7), uniforms(3, keys + 1, keys + 7), uniforms(3, keys, keys + 8)):
        assert abs(np.corrcoef(found, other)[0, 1]) < 0.02


def test_keys_belong_to_completions_not_to_places() -> None:
    groups = random_groups("pairs", 5, seed=2)
    keys = {}
    for order in (groups, groups[::-1], groups[1:3]):
        outputs = {"logp": torch.zeros(2 * len(order), 12)}
        view = make_view("pairs", order, outputs)
        for group, chosen, rejected in zip(order, view.chosen.key.tolist(), view.rejected.key.tolist(), strict=True):
            assert keys.setdefault(group.row, (chosen, rejected)) == (chosen, rejected)
    assert len({key for pair in keys.values() for key in pair}) == 10


class TestAOT:
    def pairs(self) -> list[Row]:
        return random_rows(make_method("aot"), 6, seed=4)

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    def test_a_batch_of_one_is_dpo(self, name: str) -> None:
        assert value(name, {"beta": 0.4}, PAIR) == pytest.approx(value("dpo", {"beta": 0.4}, PAIR), **NEAR)
        smooth = {"beta": 0.4, "eps": 0.2}
        assert value(name, smooth, PAIR) == pytest.approx(value("cdpo", smooth, PAIR), **NEAR)

    def test_paired_reads_the_reference_through_its_sorted_margins_alone(self) -> None:
        def pair(policy: float, reference: float) -> Row:
            return {"chosen": one(policy - 9, ref=[reference - 9]), "rejected": one(-9.0)}

        first = [pair(p, r) for p, r in ((1.0, 0.2), (3.0, -1.0), (2.0, 0.7))]
        second = [pair(p, r) for p, r in ((1.0, 0.7), (3.0, 0.2), (2.0, -1.0))]
        found = values("aot", {"beta": 0.5}, pairs=first)
        np.testing.assert_allclose(found, values("aot", {"beta": 0.5}, pairs=second), atol=1e-13)
        expected = [softplus(-0.5 * (u - v)) for u, v in ((1.0, -1.0), (3.0, 0.7), (2.0, 0.2))]
        np.testing.assert_allclose(found, expected, atol=1e-13)

    def test_unpaired_does_not_know_which_came_with_which(self) -> None:
        rows = [pair_at(w, lose) for w, lose in ((1.0, 0.3), (-2.0, 0.9), (0.5, -0.4))]
        mixed = [
            {"chosen": a["chosen"], "rejected": b["rejected"]} for a, b in zip(rows, rows[1:] + rows[:1], strict=True)
        ]
        found, again = (float(terms("aot_unpaired", {"beta": 0.5}, pairs=r).total()) for r in (rows, mixed))
        assert found == pytest.approx(again, **NEAR)
        expected = sum(softplus(-0.5 * (u - v)) for u, v in ((-2.0, -0.4), (0.5, 0.3), (1.0, 0.9))) / 3
        assert found == pytest.approx(expected, **NEAR)

    def test_gradients_are_those_of_the_matched_elements(self) -> None:
        rows = [pair_at(w, lose) for w, lose in ((1.0, 0.3), (-2.0, 0.9), (0.5, -0.4))]
        found = slopes("aot_unpaired", {"beta": 0.5}, rows)
        matched = {0: (1.0, 0.9, 1), 1: (-2.0, -0.4, 2), 2: (0.5, 0.3, 0)}
        for i, (u, v, j) in matched.items():
            push = 0.5 * sigmoid(-0.5 * (u - v)) / 3
            assert float(found[2 * i][0]) == pytest.approx(-push, abs=1e-14)
            assert float(found[2 * j + 1][0]) == pytest.approx(push, abs=1e-14)

    def test_a_dominating_batch_beats_one_with_the_same_mean(self) -> None:
        even, spread = [pair_at(1.0, 0.0), pair_at(1.0, 0.0)], [pair_at(3.0, 0.0), pair_at(-1.0, 0.0)]
        assert float(terms("aot_unpaired", {"beta": 1.0}, pairs=even).total()) < float(
            terms("aot_unpaired", {"beta": 1.0}, pairs=spread).total()
        )

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    def test_a_weight_of_two_is_a_pair_twice(self, name: str) -> None:
        rows = [{**row, "weight": 1.0} for row in random_rows(make_method(name), 4, seed=4)]
        twice = [rows[0], *rows]
        heavy = [{**rows[0], "weight": 2.0}, *rows[1:]]
        found, expected = (float(terms(name, {"beta": 0.5}, pairs=r).total()) * len(r) for r in (heavy, twice))
        assert found == pytest.approx(expected, abs=1e-12)
        without = [{**rows[0], "weight": 0.0}, *rows[1:]]
        found, expected = (float(terms(name, {"beta": 0.5}, pairs=r).total()) * len(r) for r in (without, rows[1:]))
        assert found == pytest.approx(expected, abs=1e-12)

    def test_masses_that_round_apart_find_a_partner(self) -> None:
        """Sums of the same masses in two orders differ in their last digits."""
        rng = np.random.default_rng(0)
        for _ in range(20):
            first, second, mass = (torch.from_numpy(rng.random(40)) for _ in range(3))
            owner, partner, moved = matched(first, second, mass)
            assert float(moved.sum()) == pytest.approx(float(mass.sum()), rel=1e-12)
            for places in (owner, partner):
                sent = torch.zeros(40, dtype=torch.float64).index_add(0, places, moved)
                torch.testing.assert_close(sent, mass, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    def test_no_leap_where_ranks_change(self, name: str) -> None:
        """The loss is continuous whatever the weights."""
        others = [{**pair_at(0.4, -0.2), "weight": 3.0}, {**pair_at(-0.7, 0.8), "weight": 0.5}]
        sides = [
            float(terms(name, {"beta": 1.0}, pairs=[{**pair_at(0.4 + step, 0.1), "weight": 1.0}, *others]).total())
            for step in (-1e-9, 1e-9)
        ]
        assert sides[0] == pytest.approx(sides[1], abs=1e-7)


class TestAPO:
    def test_bounded(self) -> None:
        for name in ("apo_zero", "apo_down"):
            found = [value(name, {}, pair_at(w, lose)) for w in (-9e3, 0.0, 9e3) for lose in (-9e3, 0.0, 9e3)]
            assert min(found) >= 0
            assert max(found) <= 2
        assert value("apo_zero", {}, pair_at(9e3, -9e3)) == pytest.approx(0, abs=1e-12)
        assert value("apo_zero", {}, pair_at(-9e3, 9e3)) == pytest.approx(2, abs=1e-12)

    def test_zero_has_independent_saturating_gradients(self) -> None:
        for w, lose in ((0.7, -0.3), (0.7, 5.0), (-3.0, -0.3)):
            chosen, rejected = slope("apo_zero", {"beta": 0.5}, pair_at(w, lose))
            assert chosen == pytest.approx(-0.5 * sigmoid(0.5 * w) * sigmoid(-0.5 * w), abs=1e-14)
            assert rejected == pytest.approx(0.5 * sigmoid(0.5 * lose) * sigmoid(-0.5 * lose), abs=1e-14)
        assert slope("apo_zero", {}, pair_at(-900.0, 900.0)) == pytest.approx((0, 0), abs=1e-12)

    def test_zero_is_kto_on_a_pair_with_its_anchor_at_zero(self) -> None:
        rows = [at_h(0.7, label=True, mismatched=at_h(0.0)), at_h(-0.4, label=False, mismatched=at_h(0.0))]
        expected = values("kto", {"beta": 0.5}, singles=rows).sum()
        assert value("apo_zero", {"beta": 0.5}, pair_at(0.7, -0.4)) == pytest.approx(expected, **NEAR)

    def test_log_ratios_are_sums_over_tokens(self) -> None:
        w, lose = (0.5 * h(PAIR[name]) for name in ("chosen", "rejected"))
        assert value("apo_zero", {"beta": 0.5}, PAIR) == pytest.approx(sigmoid(-w) + sigmoid(lose), **NEAR)
        assert value("apo_down", {"beta": 0.5}, PAIR) == pytest.approx(sigmoid(w) + sigmoid(lose - w), **NEAR)

    def test_down_leaves_the_chosen_at_the_reference_and_then_pushes_it_down(self) -> None:
        chosen, rejected = slope("apo_down", {"beta": 0.5}, pair_at(0.0, 0.0))
        assert chosen == 0
        assert rejected == pytest.approx(0.5 / 4, abs=1e-14)
        for lose in (-0.2, -3.0):
            chosen, rejected = slope("apo_down", {"beta": 0.5}, pair_at(0.0, lose))
            s = sigmoid(0.5 * -lose)
            assert chosen == pytest.approx(0.5 * (0.25 - s * (1 - s)), abs=1e-14)
            assert chosen > 0
            assert rejected > 0


class TestDiscoPOP:
    Z = {"beta": 1.0}  # noqa: RUF012

    def test_limits(self) -> None:
        for z in (-3.0, -8.0):
            assert value("discopop", self.Z, pair_at(z)) == pytest.approx(softplus(-z), rel=1e-12)
        for z in (3.0, 8.0):
            assert value("discopop", self.Z, pair_at(z)) == pytest.approx(math.exp(-z), rel=1e-12)

    def test_first_steps_push_the_margin_down(self) -> None:
        expected = 5 * (1 - LOG2) - 0.75
        assert slope("discopop", self.Z, pair_at(0.0))[0] == pytest.approx(expected, abs=1e-12)
        assert expected == pytest.approx(0.784, abs=5e-4)

    @pytest.mark.parametrize(("at", "sign"), [(-0.1185699, 1), (0.0720061, -1)])
    def test_a_minimum_and_a_maximum(self, at: float, sign: int) -> None:
        found = [sign * slope("discopop", self.Z, pair_at(at + step))[0] for step in (-0.01, 0.0, 0.01)]
        assert found[0] < -1e-3 < 1e-3 < found[2]
        assert found[1] == pytest.approx(0, abs=1e-5)

    def test_the_blend_is_differentiated(self) -> None:
        z, tau = 0.04, 0.2
        m = sigmoid(z / tau)
        expected = (1 - m) * -sigmoid(-z) - m * math.exp(-z) + m * (1 - m) / tau * (math.exp(-z) - softplus(-z))
        assert slope("discopop", {"beta": 1.0, "tau": tau}, pair_at(z))[0] == pytest.approx(expected, abs=1e-13)

    def test_far_margins_do_not_overflow(self) -> None:
        for tau in (0.05, 0.99):
            assert value("discopop", {"beta": 1.0, "tau": tau}, pair_at(-9e3)) == pytest.approx(9e3, rel=1e-12)
            assert slope("discopop", {"beta": 1.0, "tau": tau}, pair_at(-9e3))[0] == pytest.approx(-1, abs=1e-12)


def listed(ratios: list[float], scores: list[float]) -> Row:
    return {"completions": [at_h(ratio) for ratio in ratios], "scores": scores}


class TestNCA:
    ONE_HOT = {"beta": 0.4, "alpha": 0.01}  # noqa: RUF012

    def test_infonca_of_a_pair_is_dpo(self) -> None:
        found = values("infonca", self.ONE_HOT, lists=[listed([0.3, 1.1], [1.0, 0.0]), listed([0.3, 1.1], [0.0, 1.0])])
        expected = values("dpo", {"beta": 0.4}, pairs=[pair_at(0.3, 1.1), pair_at(1.1, 0.3)])
        np.testing.assert_allclose(found, expected, atol=1e-13)

    def test_infonca_at_the_reference_is_log_k_whatever_the_scores(self) -> None:
        found = values("infonca", {}, lists=[listed([0.0] * k, [0.3 * i for i in range(k)]) for k in (2, 3, 5)])
        np.testing.assert_allclose(found, np.log([2, 3, 5]), atol=1e-13)

    def test_infonca_is_least_where_rewards_agree_with_the_policy(self) -> None:
        """beta h = r / alpha + c: no gradient, and the loss is the entropy of p."""
        scores = [0.2, 0.9, -0.5]
        row = listed([(r / 0.7 + 3.0) / 0.4 for r in scores], scores)
        options = {"beta": 0.4, "alpha": 0.7}
        for found in slopes("infonca", options, [row]):
            np.testing.assert_allclose(found, 0, atol=1e-13)
        p = np.exp(np.array(scores) / 0.7) / np.exp(np.array(scores) / 0.7).sum()
        assert values("infonca", options, lists=[row])[0] == pytest.approx(-(p * np.log(p)).sum(), **NEAR)

    def test_infonca_ignores_a_shift_and_nca_does_not(self) -> None:
        ratios, scores = [0.3, -1.1, 0.6], [0.1, 0.7, 0.2]
        lists = [listed(ratios, scores), listed([r + 3.3 for r in ratios], scores)]
        first, second = values("infonca", {}, lists=lists)
        assert first == pytest.approx(second, **NEAR)
        first, second = values("nca", {}, lists=lists)
        assert abs(first - second) > 1e-4

    def test_nca_of_a_pair(self) -> None:
        found = values("nca", self.ONE_HOT, lists=[listed([0.3, 1.1], [1.0, 0.0])])[0]
        w, lose = 0.4 * 0.3, 0.4 * 1.1
        assert found == pytest.approx(softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(lose), **NEAR)

    def test_log_ratios_are_sums_over_tokens(self) -> None:
        row = {"completions": [PAIR["chosen"], PAIR["rejected"]], "scores": [1.0, 0.0]}
        w, lose = (0.4 * h(PAIR[name]) for name in ("chosen", "rejected"))
        expected = softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(lose)
        assert values("nca", self.ONE_HOT, lists=[row])[0] == pytest.approx(expected, **NEAR)
        assert values("infonca", self.ONE_HOT, lists=[row])[0] == pytest.approx(softplus(lose - w), **NEAR)

    def test_nca_holds_the_chosen_reward_at_log_two(self) -> None:
        at, below, above = (
            slopes("nca", self.ONE_HOT, [listed([(LOG2 + extra) / 0.4, -5.0], [1.0, 0.0])])[0][0]
            for extra in (0.0, -0.1, 0.1)
        )
        assert at == pytest.approx(0, abs=1e-13)
        assert below < 0 < above

    def test_nca_optimum_of_each_response_is_its_share_times_k(self) -> None:
        """s_i = log(K p_i): derived from p / (1 + e^s) = e^s / (1 + e^s) / K."""
        scores = [0.2, 0.9, -0.5]
        p = np.exp(np.array(scores) / 0.7) / np.exp(np.array(scores) / 0.7).sum()
        row = listed((np.log(3 * p) / 0.4).tolist(), scores)
        for found in slopes("nca", {"beta": 0.4, "alpha": 0.7}, [row]):
            np.testing.assert_allclose(found, 0, atol=1e-13)

    def test_nca_responses_are_independent(self) -> None:
        first, second = (slopes("nca", self.ONE_HOT, [listed([0.7, other], [1.0, 0.0])])[0][0] for other in (-3.0, 8.0))
        assert first == pytest.approx(second, abs=1e-14)
        coupled = [slopes("infonca", self.ONE_HOT, [listed([0.7, x], [1.0, 0.0])])[0][0] for x in (-3.0, 8.0)]
        assert abs(coupled[0] - coupled[1]) > 1e-2


class TestSoftLabels:
    @pytest.mark.parametrize("name", ["soft_dpo", "smpo"])
    def test_certain_labels_are_dpo(self, name: str) -> None:
        for options in ({"beta": 0.6}, {"beta": 0.6, "T": 3.0}):
            pair = {**PAIR, "probability": 1.0}
            assert value(name, options, pair) == pytest.approx(value("dpo", {"beta": 0.6}, PAIR), **NEAR)

    def test_ties_pull_to_zero_or_leave_alone(self) -> None:
        for z in (-2.0, 1.3):
            tie = pair_at(z, probability=0.5)
            assert value("smpo", {"beta": 1.0}, tie) == pytest.approx(LOG2, **NEAR)
            assert slope("smpo", {"beta": 1.0}, tie) == (0.0, 0.0)
            assert slope("soft_dpo", {"beta": 1.0}, tie)[0] * z > 0
        assert slope("soft_dpo", {}, pair_at(0.0, probability=0.5))[0] == pytest.approx(0, abs=1e-14)

    @pytest.mark.parametrize("name", ["soft_dpo", "smpo"])
    @pytest.mark.parametrize("p", [0.0, 0.2, 0.85])
    def test_swapping_the_pair_and_the_label_changes_nothing(self, name: str, p: float) -> None:
        there, back = pair_at(0.8, -0.3, probability=p), pair_at(-0.3, 0.8, probability=1 - p)
        assert value(name, {"beta": 0.6}, there) == pytest.approx(value(name, {"beta": 0.6}, back), **NEAR)

    def test_soft_optimum_is_the_log_odds_and_smpo_has_none(self) -> None:
        best = math.log(0.8 / 0.2)
        assert slope("soft_dpo", {"beta": 0.5}, pair_at(best / 0.5, probability=0.8))[0] == pytest.approx(0, abs=1e-14)
        for z in (best, 3 * best, 20.0):
            assert slope("smpo", {"beta": 0.5}, pair_at(z / 0.5, probability=0.8))[0] < 0

    def test_soft_adds_the_doubt_times_the_margin(self) -> None:
        pair = {**PAIR, "probability": 0.7}
        found = value("soft_dpo", {"beta": 0.6}, pair) - value("dpo", {"beta": 0.6}, PAIR)
        assert found == pytest.approx(0.3 * 0.6 * Z, **NEAR)

    def test_smpo_scales_the_margin(self) -> None:
        pair = {**PAIR, "probability": 0.7}
        assert value("smpo", {"beta": 0.6, "c": 10.0}, pair) == pytest.approx(softplus(-10 * 0.4 * 0.6 * Z), **NEAR)

    @pytest.mark.parametrize("name", ["soft_dpo", "smpo"])
    def test_a_margin_is_a_label_at_temperature(self, name: str) -> None:
        scored = {**PAIR, "margin": 1.4}
        options = {"beta": 0.6, "T": 2.0, "label": "margin"}
        named = {**PAIR, "probability": sigmoid(0.7)}
        assert value(name, options, scored) == pytest.approx(value(name, {"beta": 0.6}, named), **NEAR)
        sharp = {**PAIR, "probability": sigmoid(1.4)}
        assert value(name, {"beta": 0.6, "T": 2.0}, sharp) == pytest.approx(value(name, {"beta": 0.6}, named), **NEAR)
        assert make_method(name, options).requires() == {"ref_logp", "ties", "margin"}
        with pytest.raises(AlignError, match="margin"):
            value(name, options, PAIR)


class TestRobustBT:
    @pytest.mark.parametrize("kind", ["mixture", "soft", "debias"])
    def test_certain_labels_are_dpo(self, kind: str) -> None:
        pair = {**PAIR, "probability": 1.0}
        found = value("robust_bt", {"beta": 0.6, "kind": kind}, pair)
        assert found == pytest.approx(value("dpo", {"beta": 0.6}, PAIR), **NEAR)

    @pytest.mark.parametrize("c", [0.55, 0.8, 0.95])
    def test_soft_is_cdpo_and_debias_rdpo(self, c: float) -> None:
        pair = {**PAIR, "probability": c}
        for kind, other in (("soft", "cdpo"), ("debias", "rdpo")):
            expected = value(other, {"beta": 0.6, "eps": 1 - c}, PAIR)
            assert value("robust_bt", {"beta": 0.6, "kind": kind}, pair) == pytest.approx(expected, abs=1e-11)

    def test_mixture_is_bounded_and_gives_outliers_up(self) -> None:
        found = [value("robust_bt", {"beta": 1.0}, pair_at(z, probability=0.8)) for z in (-5.0, -40.0, -9e3)]
        assert (np.diff(found) >= 0).all()
        assert found[-1] == pytest.approx(-math.log(0.2), abs=1e-12)
        pushes = [slope("robust_bt", {"beta": 1.0}, pair_at(z, probability=0.8))[0] for z in (0.0, -1.0, -5.0, -40.0)]
        assert pushes[0] == pytest.approx(-(2 * 0.8 - 1) * 0.25 / 0.5, abs=1e-14)
        assert abs(pushes[1]) > abs(pushes[0])
        assert abs(pushes[1]) > abs(pushes[2]) > abs(pushes[3])
        assert pushes[3] == pytest.approx(0, abs=1e-14)

    def test_mixture_says_nothing_of_a_toss_up(self) -> None:
        for z in (-3.0, 0.4):
            assert value("robust_bt", {}, pair_at(z, probability=0.5)) == pytest.approx(LOG2, **NEAR)
            assert slope("robust_bt", {}, pair_at(z, probability=0.5))[0] == pytest.approx(0, abs=1e-15)

    def test_confidence_is_held_between_floor_and_ceiling(self) -> None:
        options = {"beta": 1.0, "floor": 0.3, "ceiling": 0.9}
        for given, held in ((0.0, 0.3), (0.2, 0.3), (0.6, 0.6), (1.0, 0.9)):
            expected = -math.log(held * sigmoid(0.7) + (1 - held) * sigmoid(-0.7))
            assert value("robust_bt", options, pair_at(0.7, probability=given)) == pytest.approx(expected, **NEAR)
        assert value("robust_bt", {"beta": 1.0}, pair_at(0.7, probability=0.0)) == pytest.approx(
            -math.log(0.05 * sigmoid(0.7) + 0.95 * sigmoid(-0.7)), **NEAR
        )

    def test_debias_refuses_a_toss_up(self) -> None:
        with pytest.raises(DataError, match=r"0\.5 or less"):
            value("robust_bt", {"kind": "debias"}, pair_at(0.7, probability=0.5))
