"""What the papers (and a little algebra) say of each pairwise loss beyond `test_identities.py`."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from align.methods import METHODS, terms
from align.methods.evaluate import make_method
from align.reference.columns import Ema
from align.scoring.backends import prepare
from align.scoring.layout import Tree
from align.testing.rows import Row
from align.testing.tiny import tiny_model
from tests.methods.loops import h, sigmoid, softplus
from tests.methods.test_identities import LOG2, PAIR, PAIR_BARE, Z, at_h, at_reference, one, shifted, slopes, values

NEAR = {"abs": 1e-12}


def pair_at(chosen: float, rejected: float = 0.0, **more: Any) -> Row:
    """A pair of one token each with these log-ratios."""
    return {"chosen": at_h(chosen), "rejected": at_h(rejected), **more}


def value(name: str, options: dict[str, Any], pair: Row) -> float:
    return float(values(name, options, pairs=[pair])[0])


def slope(name: str, options: dict[str, Any], pair: Row) -> tuple[float, float]:
    """dL / dlp_w and dL / dlp_l of the first token of each."""
    chosen, rejected = slopes(name, options, [pair])[:2]
    return float(chosen[0]), float(rejected[0])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cdpo", {"beta": 0.37, "eps": 0.2}, LOG2),
        ("rdpo", {"beta": 0.37, "eps": 0.2}, LOG2),
        ("dpo_hinge", {"beta": 0.37}, 1.0),
        ("dpo_norm", {}, LOG2),
        ("r_dpo", {"alpha": 0}, LOG2),
        ("dpop", {}, LOG2),
        ("beta_dpo", {"rho": 1}, LOG2),
        ("aot", {"eps": 0.2}, LOG2),
        ("aot_unpaired", {"eps": 0.2}, LOG2),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("discopop", {}, 0.5 * LOG2 + 0.5),
        ("nca", {"alpha": 0.3}, 2 * LOG2),
        ("soft_dpo", {}, LOG2),
        ("smpo", {}, LOG2),
        ("robust_bt", {}, LOG2),
        ("robust_bt", {"kind": "soft"}, LOG2),
        ("robust_bt", {"kind": "debias"}, LOG2),
        ("cal_dpo", {"beta": 0.2, "c": 0.7}, LOG2 + 0.7 / (2 * 0.2**2)),
    ],
)
def test_first_loss_is_a_known_constant(name: str, options: dict[str, Any], expected: float) -> None:
    rows = [{**row, "weight": 1.0} for row in at_reference(name)]
    found = values(name, options, **{METHODS.get(name).view: rows})
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpo", {}),
        ("rdpo", {}),
        ("dpo_hinge", {}),
        ("r_dpo", {}),
        ("discopop", {}),
        ("soft_dpo", {}),
        ("smpo", {}),
        ("robust_bt", {}),
        ("robust_bt", {"kind": "soft"}),
        ("robust_bt", {"kind": "debias"}),
        ("beta_dpo", {"rho": 1}),
    ],
)
def test_difference_only_losses_ignore_a_function_of_the_prompt(name: str, options: dict[str, Any]) -> None:
    pair = {k: {**row, "key": 7} for k, row in PAIR.items()} | {"probability": 0.8}
    moved = {k: shifted(pair[k], 2.5) for k in ("chosen", "rejected")} | {"probability": 0.8}
    first, second = values(name, options, pairs=[pair, moved])
    assert first == pytest.approx(second, **NEAR)
    chosen, rejected = slope(name, options, pair)
    assert chosen == pytest.approx(-rejected, abs=1e-14)
    assert chosen


@pytest.mark.parametrize("name", ["dpo_norm", "dpop", "cal_dpo", "apo_zero", "apo_down"])
def test_the_others_break_the_symmetry(name: str) -> None:
    pair = {**PAIR, "chosen": shifted(PAIR["chosen"], 1.5)}  # h_w < 0
    chosen, rejected = slope(name, {}, pair)
    assert abs(chosen + rejected) > 1e-6


class TestCDPO:
    def test_eps_zero_is_dpo_and_eps_adds_its_share_of_z(self) -> None:
        dpo = value("dpo", {"beta": 0.6}, PAIR)
        assert value("cdpo", {"beta": 0.6, "eps": 0}, PAIR) == pytest.approx(dpo, **NEAR)
        assert value("cdpo", {"beta": 0.6, "eps": 0.2}, PAIR) - dpo == pytest.approx(0.2 * 0.6 * Z, **NEAR)

    def test_least_at_the_log_odds_and_pulled_back_beyond(self) -> None:
        options, best = {"beta": 0.5, "eps": 0.2}, math.log(0.8 / 0.2)
        assert slope("cdpo", options, pair_at(best / 0.5))[0] == pytest.approx(0, abs=1e-14)
        assert (
            slope("cdpo", options, pair_at(best / 0.5 - 0.1))[0]
            < 0
            < slope("cdpo", options, pair_at(best / 0.5 + 0.1))[0]
        )
        assert slope("cdpo", options, pair_at(2000.0))[0] == pytest.approx(0.5 * 0.2, abs=1e-14)

    def test_convex(self) -> None:
        found = [slope("cdpo", {}, pair_at(z))[0] for z in np.linspace(-60, 60, 41)]
        assert (np.diff(found) > 0).all()


class TestRDPO:
    OPTIONS = {"beta": 0.6, "eps": 0.2}  # noqa: RUF012

    def test_eps_zero_is_dpo_and_the_correction_has_the_other_sign_than_cdpos(self) -> None:
        dpo = value("dpo", {"beta": 0.6}, PAIR)
        assert value("rdpo", {"beta": 0.6, "eps": 0}, PAIR) == pytest.approx(dpo, **NEAR)
        assert value("rdpo", self.OPTIONS, PAIR) - dpo == pytest.approx(-0.2 / 0.6 * 0.6 * Z, **NEAR)
        assert (value("rdpo", self.OPTIONS, PAIR) - dpo) * (value("cdpo", self.OPTIONS, PAIR) - dpo) < 0

    @pytest.mark.parametrize("z", [-30.0, -1.3, 0.0, 0.4, 25.0])
    def test_unbiased_pair_by_pair(self, z: float) -> None:
        there, back = (value("rdpo", self.OPTIONS, pair_at(sign * z / 0.6)) for sign in (1, -1))
        assert 0.8 * there + 0.2 * back == pytest.approx(softplus(-z), abs=1e-12)

    def test_curvature_is_dpos(self) -> None:
        step = 1e-4
        for z in (-2.0, 0.3, 3.0):
            sides = [slope("rdpo", {**self.OPTIONS, "beta": 1.0}, pair_at(z + s))[0] for s in (step, -step)]
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(sigmoid(z) * sigmoid(-z), abs=1e-8)

    def test_slope_never_vanishes_and_the_loss_has_no_floor(self) -> None:
        assert slope("rdpo", self.OPTIONS, pair_at(4000.0))[0] == pytest.approx(-0.6 * 0.2 / 0.6, abs=1e-12)
        assert value("rdpo", self.OPTIONS, pair_at(4000.0)) < -700


class TestHinge:
    def test_one_at_the_reference_and_nothing_beyond_the_margin(self) -> None:
        options = {"beta": 0.4}
        np.testing.assert_allclose(
            [value("dpo_hinge", options, pair_at(z / 0.4)) for z in (-2.0, 0.0, 0.99, 1.0, 7.0)],
            [3.0, 1.0, 0.01, 0.0, 0.0],
            atol=1e-12,
        )
        for z in (-5.0, 0.0, 0.99):
            assert slope("dpo_hinge", options, pair_at(z / 0.4)) == pytest.approx((-0.4, 0.4), abs=1e-14)
        assert slope("dpo_hinge", options, pair_at(1.01 / 0.4)) == (0.0, 0.0)

    def test_slic_without_margin_and_sft_is_the_plain_difference(self) -> None:
        """PAIR: log pi(y_w) = -1.9, log pi(y_l) = -1."""
        options = {"delta": 0, "lambda": 0}
        assert value("slic", options, PAIR_BARE) == pytest.approx(0.9, **NEAR)
        swapped = {"chosen": PAIR_BARE["rejected"], "rejected": PAIR_BARE["chosen"]}
        assert value("slic", options, swapped) == 0
        assert value("slic", {"delta": 1.0, "lambda": 0}, swapped) == pytest.approx(0.1, **NEAR)

    def test_slic_reads_no_reference(self) -> None:
        assert make_method("slic").requires() == frozenset()
        assert value("slic", {}, PAIR) == value("slic", {}, PAIR_BARE)

    @pytest.mark.parametrize(("baseline", "nll"), [("chosen", 1.9), ("sft", 5.0)])
    def test_slic_imitates_a_sum_of_tokens(self, baseline: str, nll: float) -> None:
        pair = {**PAIR_BARE, "baseline": one(-2.0, -3.0)}
        found = value("slic", {"lambda": 0.3, "baseline": baseline}, pair)
        assert found == pytest.approx(1 + 0.9 + 0.3 * nll, **NEAR)

    def test_slic_beyond_its_margin_only_imitates(self) -> None:
        pair = {"chosen": one(-1.0, -0.5), "rejected": one(-9.0)}
        found = slopes("slic", {"delta": 2.0, "lambda": 0.3}, [pair])
        np.testing.assert_allclose(found[0], -0.3, atol=1e-14)
        assert not found[1].any()


class TestCPO:
    def test_lambda_zero_is_dpo_with_a_uniform_reference(self) -> None:
        uniform = {k: {**row, "ref_logp": [0.0] * len(row["logp"])} for k, row in PAIR.items()}
        found = float(terms("cpo", {"beta": 0.6, "lambda": 0}, pairs=[PAIR_BARE]).total())
        assert found == pytest.approx(value("dpo", {"beta": 0.6}, uniform), **NEAR)

    def test_equal_likelihoods_leave_log_two_and_the_nll(self) -> None:
        pair = {"chosen": one(-0.5, -0.7), "rejected": one(-1.2)}
        found = terms("cpo", {"beta": 0.6, "lambda": 0.25}, pairs=[pair])
        assert float(found.total()) == pytest.approx(LOG2 + 0.25 * 0.6, **NEAR)

    def test_nll_is_a_mean_over_the_chosen_tokens_of_the_batch(self) -> None:
        short = {"chosen": one(-3.0), "rejected": one(-3.0)}
        long = {"chosen": one(-1.0, -1.0, -1.0), "rejected": one(-3.0)}
        found = terms("cpo", {"lambda": 1.0}, pairs=[short, long])
        assert found.counts == {"preference": 2, "sft": 4}
        assert float(found.total()) == pytest.approx(LOG2 + 6 / 4, **NEAR)

    def test_slope(self) -> None:
        chosen, rejected = slopes("cpo", {"beta": 0.6, "lambda": 0.3}, [PAIR_BARE])
        push = 0.6 * sigmoid(0.6 * 0.9)
        np.testing.assert_allclose(chosen, -push - 0.3 / 3, atol=1e-14)
        np.testing.assert_allclose(rejected, push, atol=1e-14)


class TestLengths:
    def test_dpo_norm_of_single_tokens_is_dpo(self) -> None:
        pair = pair_at(0.8, -0.4)
        assert value("dpo_norm", {"beta": 2.0}, pair) == pytest.approx(value("dpo", {"beta": 2.0}, pair), **NEAR)

    def test_dpo_norm_weighs_by_length(self) -> None:
        chosen, rejected = slope("dpo_norm", {"beta": 2.0}, PAIR)
        z = 2.0 * (h(PAIR["chosen"]) / 3 - h(PAIR["rejected"]) / 2)
        assert value("dpo_norm", {"beta": 2.0}, PAIR) == pytest.approx(softplus(-z), **NEAR)
        assert (chosen, rejected) == pytest.approx((-2 / 3 * sigmoid(-z), 2 / 2 * sigmoid(-z)), abs=1e-14)

    def test_dpo_norm_ignores_a_repetition(self) -> None:
        double = {k: {name: x * 2 for name, x in row.items()} for k, row in PAIR.items()}
        assert value("dpo_norm", {}, double) == pytest.approx(value("dpo_norm", {}, PAIR), **NEAR)

    def test_r_dpo_without_alpha_is_dpo(self) -> None:
        assert value("r_dpo", {"alpha": 0}, PAIR) == pytest.approx(value("dpo", {}, PAIR), **NEAR)

    def test_a_longer_winner_is_pushed_less_and_a_longer_loser_more(self) -> None:
        swapped = {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
        options = {"beta": 0.1, "alpha": 0.05}
        assert abs(slope("r_dpo", options, PAIR)[0]) < abs(slope("dpo", {}, PAIR)[0])
        assert abs(slope("r_dpo", options, swapped)[0]) > abs(slope("dpo", {}, swapped)[0])
        z = 0.1 * Z + 0.05 * (3 - 2)
        assert slope("r_dpo", options, PAIR)[0] == pytest.approx(-0.1 * sigmoid(-z), abs=1e-14)

    def test_r_dpo_recovers_the_policy_of_a_reward_less_length(self) -> None:
        """Preferences by r, and pi proportional to pi_ref exp((r - alpha |y|) / beta): the sign of alpha is plus."""
        beta, alpha = 0.7, 0.3
        reward, length = torch.tensor([0.3, -1.0, 0.8]), torch.tensor([1.0, 3.0, 2.0])
        reward, length = reward.double(), length.double()
        reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()

        def completion(logp: torch.Tensor, i: int) -> Row:
            n = int(length[i])
            return {"logp": logp[i].repeat(n) / n, "ref_logp": reference[i].repeat(n) / n}

        def gradient(logits: torch.Tensor) -> float:
            logits = logits.clone().requires_grad_()
            logp = logits.log_softmax(0)
            pairs = [
                {
                    "chosen": completion(logp, i),
                    "rejected": completion(logp, j),
                    "weight": sigmoid(float(reward[i] - reward[j])),
                }
                for i in range(3)
                for j in range(3)
                if i != j
            ]
            terms("r_dpo", {"beta": beta, "alpha": alpha}, pairs=pairs).total().backward()
            assert logits.grad is not None
            return float(logits.grad.abs().max())

        assert gradient(reference + (reward - alpha * length) / beta) < 1e-12
        assert gradient(reference + (reward + alpha * length) / beta) > 1e-2


def test_tr_dpo_with_a_full_refresh_every_step_has_no_log_ratio() -> None:
    """TR-DPO is `dpo` with an EMA reference; a = 1, tau = 1 make the reference the policy itself."""
    policy = tiny_model("qwen3", seed=1)
    backend = prepare(policy, "tree", probe=False)
    reference = Ema(copy.deepcopy(policy), 1.0, every=1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    whole = [rng.integers(3, 300, 5), rng.integers(3, 300, 4), rng.integers(3, 300, 6)]
    trees = [Tree(whole[0], tuple(whole[1:]), tuple(np.ones(len(ids), bool) for ids in whole[1:]))]

    def ratio() -> float:
        ours, theirs = (
            Ema(copy.deepcopy(model), 1.0).column(backend.pack(trees, torch.device("cpu")), trees, {"ref_logp"})
            for model in (policy, reference.model)
        )
        return float((ours["ref_logp"] - theirs["ref_logp"]).abs().max())

    assert ratio() > 1e-3
    reference.after_step(policy)
    assert ratio() == 0


class TestDPOP:
    OPTIONS = {"beta": 0.2, "lambda": 5.0}  # noqa: RUF012

    def test_is_dpo_where_the_chosen_has_not_fallen_or_lambda_is_zero(self) -> None:
        for pair in (pair_at(0.7, 0.2), pair_at(0.0, 0.4)):
            assert value("dpop", self.OPTIONS, pair) == pytest.approx(value("dpo", {"beta": 0.2}, pair), **NEAR)
        fallen = pair_at(-0.7, -1.2)
        assert value("dpop", {"beta": 0.2, "lambda": 0}, fallen) == pytest.approx(
            value("dpo", {"beta": 0.2}, fallen), **NEAR
        )
        assert value("dpop", self.OPTIONS, fallen) > value("dpo", {"beta": 0.2}, fallen)

    def test_only_the_chosen_gradient_is_multiplied(self) -> None:
        chosen, rejected = slope("dpop", self.OPTIONS, pair_at(-0.7, -1.2))
        z = 0.2 * (0.5 - 5.0 * 0.7)
        assert rejected == pytest.approx(0.2 * sigmoid(-z), abs=1e-14)
        assert chosen / -rejected == pytest.approx(1 + 5.0, abs=1e-12)
        default = slope("dpop", {}, pair_at(-0.01, -0.02))
        assert default[0] / -default[1] == pytest.approx(51, abs=1e-9)

    def test_the_fall_is_a_sum_over_tokens(self) -> None:
        pair = {**PAIR, "chosen": shifted(PAIR["chosen"], 1.5)}
        fall = -h(pair["chosen"])
        assert fall > 0
        expected = softplus(-0.2 * (Z - 1.5 - 5.0 * fall))
        assert value("dpop", self.OPTIONS, pair) == pytest.approx(expected, **NEAR)

    def test_continuous_with_a_kink(self) -> None:
        below, above = (pair_at(side * 1e-9, 0.3) for side in (-1, 1))
        assert value("dpop", self.OPTIONS, below) == pytest.approx(value("dpop", self.OPTIONS, above), abs=1e-7)
        assert slope("dpop", self.OPTIONS, below)[0] == pytest.approx(
            6 * slope("dpop", self.OPTIONS, above)[0], rel=1e-6
        )


class TestCalDPO:
    def test_without_squares_it_is_dpo_with_beta_one(self) -> None:
        assert value("cal_dpo", {"c": 0}, PAIR) == pytest.approx(value("dpo", {"beta": 1.0}, PAIR), **NEAR)

    def test_squares_vanish_at_the_two_targets_alone(self) -> None:
        options = {"beta": 0.25, "c": 0.7}

        def squares(chosen: float, rejected: float) -> float:
            return float(terms("cal_dpo", options, pairs=[pair_at(chosen, rejected)])["calibration"].values)

        assert squares(2.0, -2.0) == pytest.approx(0, abs=1e-14)
        assert squares(2.5, -2.0) == pytest.approx(0.25, **NEAR)
        assert squares(2.0, -2.5) == pytest.approx(0.25, **NEAR)
        assert squares(-2.0, 2.0) == pytest.approx(32, **NEAR)

    def test_log_ratios_are_sums_over_tokens(self) -> None:
        found = terms("cal_dpo", {"beta": 0.25}, pairs=[PAIR])["calibration"].values
        assert float(found) == pytest.approx((h(PAIR["chosen"]) - 2) ** 2 + (h(PAIR["rejected"]) + 2) ** 2, **NEAR)

    def test_the_chosen_is_pushed_up_from_the_reference(self) -> None:
        chosen, rejected = slope("cal_dpo", {"beta": 0.25, "c": 0.7}, pair_at(0.0, 0.0))
        assert (chosen, rejected) == pytest.approx((-0.5 - 0.7 / 0.25, 0.5 + 0.7 / 0.25), **NEAR)
