"""Divergences on pairs: what their papers (and a little algebra) say of f-DPO, chi-PO and EXO, as assertions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError
from align.methods import terms
from align.methods.evaluate import make_method
from tests.methods.loops import sigmoid, softplus
from tests.methods.test_identities import LOG2, PAIR, shifted, slopes, values
from tests.methods.test_lists import measured, pair

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha", "chi2_kl")


def tilted(link: Callable[[float], float], beta: float, reward: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The ratios u with beta link(u) = r - lambda and sum_y pi_ref u = 1, by bisection."""

    def solve(target: float, function: Callable[[float], float], low: float, high: float) -> float:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if function(middle) < target else (low, middle)
        return (low + high) / 2

    def ratios(offset: float) -> np.ndarray:
        return np.array([math.exp(solve((r - offset) / beta, lambda x: link(math.exp(x)), -60, 60)) for r in reward])

    offset = solve(-1.0, lambda x: -float((reference * ratios(x)).sum()), -50.0, 50.0)
    return ratios(offset)


def population_slope(name: str, options: dict[str, Any], ratios: np.ndarray, reward: np.ndarray) -> float:
    """The largest slope of the loss in a log-ratio, over all pairs, weighted by Bradley-Terry odds."""
    h_ = torch.tensor(np.log(ratios), requires_grad=True)
    pairs = [
        {
            "chosen": {"logp": h_[i : i + 1] - 5, "ref_logp": [-5.0]},
            "rejected": {"logp": h_[j : j + 1] - 5, "ref_logp": [-5.0]},
            "weight": sigmoid(float(reward[i] - reward[j])),
        }
        for i, j in itertools.permutations(range(len(ratios)), 2)
    ]
    terms(name, options, pairs=pairs).total().backward()
    assert h_.grad is not None
    return float(h_.grad.abs().max())


class TestFDPO:
    F = {  # noqa: RUF012
        "reverse_kl": lambda u, a: u * math.log(u),
        "forward_kl": lambda u, a: -math.log(u),
        "js": lambda u, a: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        "alpha": lambda u, a: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
        "chi2_kl": lambda u, a: (u - 1) ** 2 / 2 + u * math.log(u),
    }
    CURVATURE = {"reverse_kl": 1, "forward_kl": 1, "js": 0.5, "alpha": 1, "chi2_kl": 2}  # noqa: RUF012

    def margin(self, divergence: str, first: float, second: float, alpha: float = 0.5) -> float:
        """phi(first) - phi(second), from the loss with beta 1."""
        options = {"beta": 1.0, "divergence": divergence, "alpha": alpha}
        return -math.log(math.expm1(float(values("f_dpo", options, pairs=[pair(first, second)])[0])))

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    @pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7])
    def test_the_link_is_the_derivative_of_f(self, divergence: str, alpha: float) -> None:
        f, step = self.F[divergence], 1e-5
        assert f(1.0, alpha) == pytest.approx(0, abs=1e-12)

        def derivative(u: float) -> float:
            return (f(u + step, alpha) - f(u - step, alpha)) / (2 * step)

        for u, v in ((0.4, 1.0), (2.5, 0.7), (1.3, 3.0)):
            found = self.margin(divergence, math.log(u), math.log(v), alpha)
            assert found == pytest.approx(derivative(u) - derivative(v), rel=1e-6)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_log_2_at_the_reference_and_a_slope_of_the_curvature(self, divergence: str) -> None:
        options = {"beta": 0.3, "divergence": divergence}
        assert values("f_dpo", options, pairs=[pair(0, 0)])[0] == pytest.approx(LOG2, abs=1e-14)
        chosen, rejected = slopes("f_dpo", options, [pair(0, 0)])
        assert chosen[0] == pytest.approx(-0.3 * self.CURVATURE[divergence] / 2, abs=1e-14)
        assert rejected[0] == -chosen[0]

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_near_the_reference_it_is_dpo_with_another_beta(self, divergence: str) -> None:
        near = pair(1e-5, -2e-5)
        found = values("f_dpo", {"beta": 0.3, "divergence": divergence}, pairs=[near])[0]
        dpo = values("dpo", {"beta": 0.3 * self.CURVATURE[divergence]}, pairs=[near])[0]
        assert found - LOG2 == pytest.approx(dpo - LOG2, abs=1e-9)
        assert abs(dpo - LOG2) > 1e-6

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_the_link_increases(self, divergence: str) -> None:
        for ratio in (-3.0, -0.5, 0.5, 3.0):
            chosen, rejected = slopes("f_dpo", {"divergence": divergence}, [pair(ratio, ratio)])
            assert chosen[0] < 0 < rejected[0]

    def test_reverse_kl_is_dpo(self) -> None:
        found = values("f_dpo", {"beta": 0.6, "divergence": "reverse_kl"}, pairs=[PAIR])
        np.testing.assert_array_equal(found, values("dpo", {"beta": 0.6}, pairs=[PAIR]))

    @pytest.mark.parametrize(("alpha", "limit"), [(1e-8, "reverse_kl"), (1 - 1e-8, "forward_kl")])
    def test_limits_of_alpha(self, alpha: float, limit: str) -> None:
        rows = [PAIR, pair(1.5, -2.0), pair(-1.0, 3.0)]
        found = values("f_dpo", {"divergence": "alpha", "alpha": alpha}, pairs=rows)
        np.testing.assert_allclose(found, values("f_dpo", {"divergence": limit}, pairs=rows), atol=1e-6)
        assert np.abs(found - values("f_dpo", {"divergence": "alpha"}, pairs=rows)).min() > 1e-4

    @pytest.mark.parametrize(("alpha", "limit"), [(0, "reverse_kl"), (1, "forward_kl")])
    def test_the_limits_are_named(self, alpha: float, limit: str) -> None:
        with pytest.raises(ConfigError, match=r"> 0 and < 1") as caught:
            make_method("f_dpo", {"divergence": "alpha", "alpha": alpha})
        assert f"divergence: {limit}" in str(caught.value)

    def test_trls_coefficient_is_one_minus_alpha(self) -> None:
        """TRL 1.16: f'(t) = (t^(c - 1) - 1) / (c - 1)."""
        c, (first, second) = 0.7, (0.8, -1.3)
        theirs = [(math.exp((c - 1) * ratio) - 1) / (c - 1) for ratio in (first, second)]
        assert self.margin("alpha", first, second, alpha=0.3) == pytest.approx(theirs[0] - theirs[1], abs=1e-12)

    def test_js_saturates_above_and_is_linear_below(self) -> None:
        assert self.margin("js", 50.0, 0.0) == pytest.approx(LOG2, abs=1e-12)
        chosen, rejected = slopes("f_dpo", {"beta": 0.3, "divergence": "js"}, [pair(50.0, -50.0)])
        assert chosen[0] == pytest.approx(0, abs=1e-15), "the chosen has stopped pulling"
        assert rejected[0] == pytest.approx(0.3 * sigmoid(-0.3 * (50 + LOG2 - LOG2)), rel=1e-9), "the slope of h itself"
        assert self.margin("js", -40.0, -41.0) == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_reward_differences_are_recovered_at_the_tabular_optimum(self, divergence: str) -> None:
        reward, reference, beta = np.array([0.3, -1.0, 0.8, 0.1]), np.array([0.1, 0.4, 0.3, 0.2]), 0.7

        def derivative(u: float) -> float:
            exact = {"chi2_kl": u + math.log(u), "alpha": 2 * (1 - u**-0.5), "forward_kl": -1 / u}
            exact |= {"reverse_kl": math.log(u), "js": math.log(2 * u / (1 + u))}
            return exact[divergence]

        if divergence == "js":  # beta log 2 bounds what it can express
            reward = reward / 10
        ratios = tilted(derivative, beta, reward, reference)
        assert (reference * ratios).sum() == pytest.approx(1, abs=1e-9)
        options = {"beta": beta, "divergence": divergence}
        for i, j in itertools.combinations(range(4), 2):
            found = beta * self.margin(divergence, math.log(ratios[i]), math.log(ratios[j]))
            assert found == pytest.approx(reward[i] - reward[j], abs=1e-9)
        assert population_slope("f_dpo", options, ratios, reward) < 1e-9
        assert population_slope("f_dpo", options, ratios * np.array([1.2, 1, 1, 1]), reward) > 1e-3

    @pytest.mark.parametrize(("divergence", "sign"), [("forward_kl", -1), ("alpha", -1), ("chi2_kl", 1)])
    def test_the_exponent_is_clamped_and_counted(self, divergence: str, sign: int) -> None:
        far = pair(sign * 500.0, 0.0)
        options = {"beta": 1e-3, "divergence": divergence}
        assert np.isfinite(values("f_dpo", options, pairs=[far])).all()
        beyond, within = (slopes("f_dpo", options, [pair(sign * ratio, 0.0)])[0][0] for ratio in (500.0, 30.0))
        linear = -1e-3 * sigmoid(-1e-3 * math.exp(80)) if divergence == "chi2_kl" else 0.0
        assert beyond == linear
        assert within != 0 or divergence == "chi2_kl"
        assert measured("f_dpo", options, "pairs", [far, pair(0, 0)])["clamped"] == 0.25
        assert measured("f_dpo", options, "pairs", [pair(sign * 70.0, 0.0)])["clamped"] == 0

    def test_logged_rewards_are_those_of_the_link(self) -> None:
        found = measured("f_dpo", {"beta": 0.3, "divergence": "forward_kl"}, "pairs", [pair(0.5, -0.5)])
        assert found["rewards/chosen"] == pytest.approx(-0.3 * math.exp(-0.5))
        assert "clamped" not in measured("f_dpo", {"divergence": "js"}, "pairs", [pair(0.5, -0.5)])


class TestChiPO:
    FREE = {"beta": 0.4, "R_max": 1e6}  # noqa: RUF012

    def test_log_2_at_the_reference(self) -> None:
        assert values("chi_po", {}, pairs=[pair(0, 0)])[0] == pytest.approx(LOG2, abs=1e-15)

    def test_without_clip_it_is_f_dpo(self) -> None:
        rows = [PAIR, pair(2.0, -1.0), pair(-3.0, 1.5)]
        theirs = values("f_dpo", {"beta": 0.4, "divergence": "chi2_kl"}, pairs=rows)
        np.testing.assert_allclose(values("chi_po", self.FREE, pairs=rows), theirs, atol=1e-14)

    @pytest.mark.parametrize(("ratio", "sign"), [(3.0, 1), (-3.0, -1)])
    def test_a_clipped_pair_has_no_gradient_and_is_counted(self, ratio: float, sign: int) -> None:
        options, row = {"beta": 0.4, "R_max": 1.3}, pair(ratio, -ratio)
        assert values("chi_po", options, pairs=[row])[0] == pytest.approx(softplus(-sign * 2.6), abs=1e-14)
        assert not any(g.any() for g in slopes("chi_po", options, [row]))
        assert all(g.any() for g in slopes("chi_po", options, [pair(0.1, -0.1)]))
        assert measured("chi_po", options, "pairs", [row, pair(1.2, -1.2)])["clipped"] == 0.5

    @pytest.mark.parametrize("gamma", [1.0, 0.25])
    def test_slopes_are_exponential_above_and_linear_below(self, gamma: float) -> None:
        for up, down in ((0.0, 0.0), (2.0, -9.0), (-9.0, 2.0)):
            options = {**self.FREE, "gamma": gamma}
            chosen, rejected = slopes("chi_po", options, [pair(up, down)])
            m = 0.4 * (math.exp(up) - math.exp(down) + gamma * (up - down))
            assert chosen[0] == pytest.approx(-0.4 * sigmoid(-m) * (math.exp(up) + gamma), rel=1e-12)
            assert rejected[0] == pytest.approx(0.4 * sigmoid(-m) * (math.exp(down) + gamma), rel=1e-12)

    def test_the_exponent_stops(self) -> None:
        options = {"beta": 1e-12, "R_max": 1e6, "max_exponent": 3.0}
        beyond, below = (slopes("chi_po", options, [pair(ratio, 0.0)])[0][0] for ratio in (3.5, 2.5))
        assert beyond == pytest.approx(-1e-12 / 2, rel=1e-9)
        assert below == pytest.approx(-1e-12 / 2 * (math.exp(2.5) + 1), rel=1e-9)
        assert measured("chi_po", options, "pairs", [pair(3.5, 0.0)])["clamped"] == 0.5

    @pytest.mark.parametrize(("beta", "gamma"), [(0.5, 1.0), (0.1, 1.0), (0.3, 0.4)])
    def test_the_optimum_is_tilted_and_its_ratios_are_bounded_on_both_sides(self, beta: float, gamma: float) -> None:
        """Derived: lambda is in [-beta, R - beta], hence e^{-R / (gamma beta)} <= u <= 1 + R / beta."""
        reward, reference = np.array([0.0, 1.0, 0.9, 0.2]), np.array([0.6, 0.001, 0.2, 0.199])
        ratios = tilted(lambda u: u + gamma * math.log(u), beta, reward, reference)
        assert (reference * ratios).sum() == pytest.approx(1, abs=1e-9)
        options = {"beta": beta, "gamma": gamma, "R_max": 1.0}
        assert population_slope("chi_po", options, ratios, reward) < 1e-9
        assert population_slope("chi_po", options, ratios * np.array([1.2, 1, 1, 1]), reward) > 1e-4
        assert math.exp(-1 / (gamma * beta)) <= ratios.min() < 1 < ratios.max() <= 1 + 1 / beta
        tempting = np.exp(reward / beta) / (reference * np.exp(reward / beta)).sum()  # KL's optimum
        assert tempting.max() > ratios.max()


class TestEXOPref:
    @pytest.mark.parametrize("eps", [1e-3, 0.2])
    def test_value_at_the_reference(self, eps: float) -> None:
        found = values("exo_pref", {"eps": eps}, pairs=[pair(0.4, 0.4)])[0]
        assert found == pytest.approx(-LOG2 - 0.5 * math.log(eps * (1 - eps)), abs=1e-13)

    def test_zero_at_the_labels_log_odds_and_nowhere_else(self) -> None:
        eps, beta = 0.02, 0.4
        best = math.log((1 - eps) / eps) / beta
        options = {"eps": eps, "beta_pi": beta}
        zero, *others = values("exo_pref", options, pairs=[pair(best + x, 0.0) for x in (0.0, -0.5, 0.5, -9.0, 30.0)])
        assert zero == pytest.approx(0, abs=1e-15)
        assert (np.array(others) > 1e-4).all()
        assert abs(slopes("exo_pref", options, [pair(best, 0.0)])[0][0]) < 1e-14

    def test_slope(self) -> None:
        for z in (-6.0, -1.0, 0.0, 4.0, 12.0):
            chosen, rejected = slopes("exo_pref", {"beta_pi": 0.5}, [pair(2 * z, 0.0)])
            expected = 0.5 * sigmoid(z) * sigmoid(-z) * (z - math.log(999))
            assert chosen[0] == pytest.approx(expected, rel=1e-10)
            assert rejected[0] == pytest.approx(-expected, rel=1e-10)

    def test_against_dpo_at_the_reference(self) -> None:
        ours = slopes("exo_pref", {"beta_pi": 1.0}, [pair(0, 0)])[0][0]
        assert ours == pytest.approx(-1.7267, abs=1e-4)
        assert ours / slopes("dpo", {"beta": 1.0}, [pair(0, 0)])[0][0] == pytest.approx(3.4534, abs=1e-4)

    def test_a_strongly_mis_ordered_pair_has_no_gradient(self) -> None:
        found = [slopes("exo_pref", {"beta_pi": 1.0}, [pair(-x, x)])[0][0] for x in (0.0, 5.0, 20.0, 500.0)]
        assert abs(found[1]) < 1e-2
        assert abs(found[2]) < 1e-14
        assert found[3] == 0
        assert slopes("dpo", {"beta": 1.0}, [pair(-20.0, 20.0)])[0][0] == pytest.approx(-1)

    def test_it_is_exo_rw_with_the_labels_logarithms(self) -> None:
        eps, beta = 0.05, 0.7
        row = {"completions": [PAIR["chosen"], PAIR["rejected"]], "scores": [math.log(1 - eps), math.log(eps)]}
        ours = values("exo_pref", {"eps": eps, "beta_pi": beta}, pairs=[PAIR])
        theirs = values("exo_rw", {"beta_r": 1.0, "beta_pi": beta}, lists=[row])
        np.testing.assert_allclose(ours, theirs, atol=1e-14)

    def test_difference_only(self) -> None:
        moved = {name: shifted(row, 2.5) for name, row in PAIR.items()}
        first, second = values("exo_pref", {}, pairs=[PAIR, moved])
        assert first == pytest.approx(second, abs=1e-12)
        chosen, rejected = slopes("exo_pref", {}, [PAIR])
        assert chosen[0] == pytest.approx(-rejected[0], abs=1e-15)
        assert chosen[0] != 0
