"""Lists: what the papers (and a little algebra) say of ranking losses, EXO and BRAIn, as assertions."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest

from align.core.errors import ConfigError
from align.methods import METHODS
from align.methods.evaluate import make_bare_view, make_method
from align.testing.rows import Row, random_rows
from align.trainers.metrics import measure
from tests.methods.loops import h, sigmoid, softplus
from tests.methods.test_identities import LOG2, PAIR, Z, at_h, slopes, values

RANKING = ("lipo", "list_hinge", "lipo_lambda", "list_softmax", "pl_dpo")
ALL_LISTS = (*RANKING, "exo_rw", "brain")


def pair(chosen: float, rejected: float) -> Row:
    return {"chosen": at_h(chosen), "rejected": at_h(rejected)}


def listed(ratios: list[float], scores: list[float], **more: Any) -> Row:
    return {"completions": [at_h(ratio) for ratio in ratios], "scores": scores, **more}


def measured(name: str, options: dict[str, Any], view: str, rows: list[Row]) -> dict[str, float]:
    found = measure(make_method(name, options), make_bare_view(view, rows))
    return {key: float(total) / count for key, (total, count) in found.items()}


def log_softmax(numbers: list[float]) -> np.ndarray:
    array = np.array(numbers, float)
    return array - array.max() - math.log(np.exp(array - array.max()).sum())


class TestEXORW:
    OPTIONS = {"beta_pi": 0.6, "beta_r": 0.5}  # noqa: RUF012
    REWARDS = [0.3, -1.0, 0.8]  # noqa: RUF012

    def test_zero_at_the_tilted_reference_and_nowhere_else(self) -> None:
        best = [r / (0.6 * 0.5) + 1.7 for r in self.REWARDS]
        rows = [listed(best, self.REWARDS), listed([best[0] + 0.1, *best[1:]], self.REWARDS)]
        zero, other = values("exo_rw", self.OPTIONS, lists=rows)
        assert zero == pytest.approx(0, abs=1e-14)
        assert other > 1e-5
        assert max(abs(g[0]) for g in slopes("exo_rw", self.OPTIONS, rows[:1])) < 1e-14

    def test_never_negative(self) -> None:
        rows = random_rows(METHODS.get("exo_rw")(), 60, seed=5)
        assert values("exo_rw", {}, lists=rows).min() >= -1e-15

    def test_value_and_slope(self) -> None:
        ratios = [0.7, -0.4, 1.1]
        q, p = log_softmax([0.6 * x for x in ratios]), log_softmax([r / 0.5 for r in self.REWARDS])
        expected = float((np.exp(q) * (q - p)).sum())
        row = listed(ratios, self.REWARDS)
        assert values("exo_rw", self.OPTIONS, lists=[row])[0] == pytest.approx(expected, abs=1e-14)
        found = [g[0] for g in slopes("exo_rw", self.OPTIONS, [row])]
        np.testing.assert_allclose(found, 0.6 * np.exp(q) * (q - p - expected), atol=1e-14)

    def test_at_the_reference_it_is_the_kl_from_uniform(self) -> None:
        p = log_softmax([r / 0.5 for r in self.REWARDS])
        found = values("exo_rw", self.OPTIONS, lists=[listed([0.0] * 3, self.REWARDS)])[0]
        assert found == pytest.approx(-math.log(3) - p.mean(), abs=1e-14)

    def test_a_completion_the_policy_has_given_up_has_no_gradient(self) -> None:
        found = slopes("exo_rw", {}, [listed([0.0, -400.0], [0.0, 1.0])])
        assert abs(found[1][0]) < 1e-30

    def test_forward_kl_on_the_same_data_has_the_entropy_as_its_minimum(self) -> None:
        """`dpo_rw`: a cross-entropy to p, by `list_softmax` with p as its scores and by `infonca`."""
        p = log_softmax([r / 0.5 for r in self.REWARDS])
        best = [float(x) / 0.6 for x in p]
        entropy = -float((np.exp(p) * p).sum())
        rows = [listed(best, list(np.exp(p))), listed([best[0] + 0.2, *best[1:]], list(np.exp(p)))]
        least, more = values("list_softmax", {"beta": 0.6}, lists=rows)
        assert least == pytest.approx(entropy, abs=1e-14)
        assert more > least + 1e-4
        raw = [{**row, "scores": self.REWARDS} for row in rows]
        theirs = values("infonca", {"beta": 0.6, "alpha": 0.5}, lists=raw)
        np.testing.assert_allclose(theirs, [least, more], atol=1e-14)
        reverse = values("exo_rw", self.OPTIONS, lists=raw[1:])[0]
        assert reverse != pytest.approx(more - entropy, rel=1e-3), "reverse and forward KL differ off the optimum"


class TestLists:
    @pytest.mark.parametrize(
        ("name", "options", "factor"),
        [
            ("lipo", {}, 1.0),
            ("lipo", {"reduction": "mean"}, 1.0),
            ("list_softmax", {}, 1.0),
            ("pl_dpo", {}, 1.0),
            ("lipo_lambda", {}, 1 / math.log(2) - 1 / math.log(3)),
            ("lipo_lambda", {"reduction": "mean"}, 1 / math.log(2) - 1 / math.log(3)),
        ],
    )
    @pytest.mark.parametrize("flipped", [False, True])
    def test_a_list_of_two_is_dpo(self, name: str, options: dict[str, Any], factor: float, flipped: bool) -> None:
        answers, scores = [PAIR["chosen"], PAIR["rejected"]], [1.0, 0.0]
        row = {"completions": answers[::-1] if flipped else answers, "scores": scores[::-1] if flipped else scores}
        found = values(name, {"beta": 0.6, **options}, lists=[row])
        np.testing.assert_allclose(found, factor * values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)
        assert 1 / math.log(2) - 1 / math.log(3) == pytest.approx(0.5325, abs=1e-4)

    def test_a_list_of_two_under_the_hinge_is_dpo_hinge(self) -> None:
        rows = [PAIR, pair(4.0, 0.0), pair(-1.0, 2.0)]
        lists = [{"completions": [row["chosen"], row["rejected"]], "scores": [0.9, 0.1]} for row in rows]
        ours = values("list_hinge", {"beta": 0.6}, lists=lists)
        expected = [max(0.0, 1 - 0.6 * (h(row["chosen"]) - h(row["rejected"]))) for row in rows]
        np.testing.assert_allclose(ours, expected, atol=1e-14)
        np.testing.assert_allclose(ours, values("dpo_hinge", {"beta": 0.6}, pairs=rows), atol=1e-14)
        assert ours[0] == pytest.approx(1 - 0.6 * Z, abs=1e-14)

    @pytest.mark.parametrize("name", ALL_LISTS)
    def test_a_constant_in_all_log_ratios_changes_nothing(self, name: str) -> None:
        ratios, scores = [0.4, -0.8, 1.5, 0.1], [0.5, 0.0, 1.0, 0.25]
        first, second = values(name, {}, lists=[listed(ratios, scores), listed([x + 7 for x in ratios], scores)])
        assert first == pytest.approx(second, abs=1e-12)
        found = [g[0] for g in slopes(name, {}, [listed(ratios, scores)])]
        assert any(found)
        assert sum(found) == pytest.approx(0, abs=1e-14)

    @pytest.mark.parametrize("name", ["lipo", "list_hinge", "lipo_lambda", "pl_dpo"])
    def test_equal_scores_contribute_nothing(self, name: str) -> None:
        tied = listed([0.4, -0.8, 0.1], [0.5, 0.5, 0.5])
        assert values(name, {}, lists=[tied])[0] == 0
        assert not any(g.any() for g in slopes(name, {}, [tied]))
        two = [listed([0.4, -0.8, 0.1], [0.5, 0.5, 0.0]), listed([0.4, 0.1], [0.5, 0.0]), listed([-0.8, 0.1], [0.5, 0])]
        both, first, second = values(name, {}, lists=two)
        if name == "lipo_lambda":  # its weights read the places in the whole list
            assert both > 0
        else:
            assert both == pytest.approx(first + second, abs=1e-14)

    @pytest.mark.parametrize("name", ["lipo", "list_hinge", "lipo_lambda"])
    def test_mean_divides_by_the_number_of_ordered_pairs(self, name: str) -> None:
        row = listed([0.4, -0.8, 0.1, 0.0], [0.5, 0.5, 0.0, 1.0])
        summed, mean = (values(name, {"reduction": r}, lists=[row])[0] for r in ("sum", "mean"))
        assert summed == pytest.approx(5 * mean, abs=1e-14)

    @pytest.mark.parametrize(
        ("name", "expected"), [("lipo", 10 * LOG2), ("list_hinge", 10.0), ("pl_dpo", math.log(120))]
    )
    def test_values_of_five_at_the_reference(self, name: str, expected: float) -> None:
        scores = [0.5, 0.1, 0.9, 0.0, 0.3]
        assert values(name, {}, lists=[listed([0.2] * 5, scores)])[0] == pytest.approx(expected, abs=1e-13)

    @pytest.mark.parametrize("name", ALL_LISTS)
    def test_the_order_of_the_answers_does_not_matter(self, name: str) -> None:
        for ratios in ([0.0, 0.0, 0.0, 0.0], [0.3, -0.2, 0.3, 0.9]):
            scores = [0.5, 0.0, 1.0, 0.25]
            orders = list(itertools.permutations(range(4)))
            found = values(name, {}, lists=[listed([ratios[i] for i in o], [scores[i] for i in o]) for o in orders])
            np.testing.assert_allclose(found, found[0], atol=1e-14)

    @pytest.mark.parametrize("name", ["list_softmax", "lipo_lambda"])
    def test_raw_scores_are_warned_about(self, name: str) -> None:
        with pytest.warns(UserWarning, match="scores outside 0 to 1"):
            values(name, {}, lists=[listed([0.0, 0.1], [3.0, 1.0])])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values(name, {}, lists=[listed([0.0, 0.1], [1.0, 0.0])])
            values("lipo", {}, lists=[listed([0.0, 0.1], [3.0, 1.0])])

    @pytest.mark.parametrize("name", RANKING)
    def test_ranks_and_scores_say_the_same(self, name: str) -> None:
        by_rank = listed([0.4, -0.8, 0.1], [])
        by_rank = {"completions": by_rank["completions"], "ranks": [2, 3, 1]}
        found = values(name, {}, lists=[by_rank])
        np.testing.assert_allclose(
            found, values(name, {}, lists=[listed([0.4, -0.8, 0.1], [0.5, 0.0, 1.0])]), atol=1e-15
        )

    @pytest.mark.parametrize("name", ALL_LISTS)
    def test_a_list_without_scores_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match="scores"):
            values(name, {}, lists=[{"completions": [at_h(0.1), at_h(0.2)]}])


class TestListHinge:
    def test_a_pair_that_is_learnt_has_no_gradient(self) -> None:
        learnt, short = listed([1.1 / 0.5, 0.0], [1, 0]), listed([0.9 / 0.5, 0.0], [1, 0])
        assert not any(g.any() for g in slopes("list_hinge", {"beta": 0.5}, [learnt]))
        better, worse = slopes("list_hinge", {"beta": 0.5}, [short])
        assert (better[0], worse[0]) == (-0.5, 0.5)


class TestListSoftmax:
    def test_at_the_reference(self) -> None:
        found = values("list_softmax", {}, lists=[listed([0.3] * 3, [0.2, 0.7, 1.0])])[0]
        assert found == pytest.approx(1.9 * math.log(3), abs=1e-14)

    def test_slope(self) -> None:
        ratios, psi = [0.7, -0.4, 1.1], np.array([0.2, 0.7, 1.0])
        share = np.exp(log_softmax([0.6 * x for x in ratios]))
        found = [g[0] for g in slopes("list_softmax", {"beta": 0.6}, [listed(ratios, list(psi))])]
        np.testing.assert_allclose(found, 0.6 * (psi.sum() * share - psi), atol=1e-14)

    @pytest.mark.filterwarnings("ignore:scores outside")
    def test_scores_below_zero_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="no lower bound"):
            values("list_softmax", {}, lists=[listed([0.0, 0.1], [1.0, -0.1])])


class TestPLDPO:
    def test_it_is_the_likelihood_of_the_order(self) -> None:
        """Probabilities of all orders sum to 1."""
        ratios, total = [0.7, -0.4, 1.1], 0.0
        for order in itertools.permutations([0.0, 0.5, 1.0]):
            total += math.exp(-values("pl_dpo", {"beta": 0.6}, lists=[listed(ratios, list(order))])[0])
        assert total == pytest.approx(1, abs=1e-14)

    def test_one_winner_over_tied_others_is_the_chance_that_it_comes_first(self) -> None:
        """The order of the tied is unknown: the sum over their orders."""
        ratios = [0.7, -0.4, 1.1]
        found = values("pl_dpo", {"beta": 0.6}, lists=[listed(ratios, [0.0, 1.0, 0.0])])[0]
        assert found == pytest.approx(-log_softmax([0.6 * x for x in ratios])[1], abs=1e-14)
        both = [values("pl_dpo", {"beta": 0.6}, lists=[listed(ratios, s)])[0] for s in ([0.5, 1, 0], [0, 1, 0.5])]
        assert math.exp(-found) == pytest.approx(sum(math.exp(-x) for x in both), abs=1e-14)

    def test_slope_of_the_best_and_of_the_last(self) -> None:
        ratios = [0.7, -0.4, 1.1]  # best first
        found = [g[0] for g in slopes("pl_dpo", {"beta": 0.6}, [listed(ratios, [1.0, 0.5, 0.0])])]
        stages = [np.exp(log_softmax([0.6 * x for x in ratios[k:]])) for k in range(3)]
        assert found[0] == pytest.approx(0.6 * (stages[0][0] - 1), abs=1e-14)
        assert found[2] == pytest.approx(0.6 * (stages[0][2] + stages[1][1]), abs=1e-14)


class TestLiPOLambda:
    D = (1 / math.log(2), 1 / math.log(3), 1 / math.log(4))

    def test_weights_by_place_and_gain_without_gradient(self) -> None:
        ratios, psi = [0.2, 1.4, -0.5], [1.0, 0.5, 0.0]  # places 2, 1, 3
        place, gain = [1, 0, 2], [2**x - 1 for x in psi]
        expected, slope = 0.0, np.zeros(3)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            weight = (gain[i] - gain[j]) * abs(self.D[place[i]] - self.D[place[j]])
            m = 0.6 * (ratios[i] - ratios[j])
            expected += weight * softplus(-m)
            slope[i] -= 0.6 * weight * sigmoid(-m)
            slope[j] += 0.6 * weight * sigmoid(-m)
        row = listed(ratios, psi)
        assert values("lipo_lambda", {"beta": 0.6}, lists=[row])[0] == pytest.approx(expected, abs=1e-13)
        found = [g[0] for g in slopes("lipo_lambda", {"beta": 0.6}, [row])]
        np.testing.assert_allclose(found, slope, atol=1e-13)

    def test_the_first_step_weighs_by_all_orders(self) -> None:
        """All s are 0: the places of a pair are any two of the three."""
        gap = (self.D[0] - self.D[1] + self.D[0] - self.D[2] + self.D[1] - self.D[2]) / 3
        psi = [0.5, 0.0, 1.0]
        gains = sum(abs(2**a - 2**b) for a, b in itertools.combinations(psi, 2))
        row = listed([0.0] * 3, psi)
        assert values("lipo_lambda", {}, lists=[row])[0] == pytest.approx(gap * gains * LOG2, abs=1e-13)
        found = [g[0] for g in slopes("lipo_lambda", {}, [row])]
        assert found[2] < found[0] < found[1], "the best is pulled up and the worst pushed down, wherever they stand"

    def test_it_is_linear_in_the_gains(self) -> None:
        rows = [listed([0.2, 1.4], [psi, 0.0]) for psi in (1.0, 0.5)]
        one, half = values("lipo_lambda", {}, lists=rows)
        assert half / one == pytest.approx(2**0.5 - 1, abs=1e-14)

    def test_several_lists_do_not_mix(self) -> None:
        rows = [listed([0.2, 1.4, -0.5], [1.0, 0.5, 0.0]), listed([0.2, 0.2], [0.0, 1.0])]
        together = values("lipo_lambda", {}, lists=rows)
        alone = [values("lipo_lambda", {}, lists=[row])[0] for row in rows]
        np.testing.assert_allclose(together, alone, atol=1e-14)


class TestBRAIn:
    REWARDS = [0.3, -1.0, 0.8]  # noqa: RUF012

    def drawn(self, ratios: list[float], sampler: list[float], scores: list[float]) -> Row:
        """Completions with log p - log q' = sampler and log pi - log p = ratios."""
        own = [{**at_h(x), "anchor": {"guide": [-1.0 - x - s]}} for x, s in zip(ratios, sampler, strict=True)]
        return {"completions": own, "scores": scores}

    def test_never_negative(self) -> None:
        rows = random_rows(make_method("brain", {"proposal": "guide"}), 60, seed=5)
        for goodness in ("exponential", "sigmoid"):
            found = values("brain", {"proposal": "guide", "goodness": goodness}, lists=rows)
            assert found.min() >= -1e-15

    @pytest.mark.parametrize("proposal", ["reference", "guide"])
    def test_zero_where_the_policy_is_the_posterior_and_nowhere_else(self, proposal: str) -> None:
        best = [r / 0.5 + 3.0 for r in self.REWARDS]
        rows = [self.drawn(x, [0.4, -0.3, 0.9], self.REWARDS) for x in (best, [best[0] + 0.1, *best[1:]])]
        zero, other = values("brain", {"T": 0.5, "proposal": proposal}, lists=rows)
        assert zero == pytest.approx(0, abs=1e-14)
        assert other > 1e-5
        centre = sum(self.REWARDS) / 3
        best = [math.log(sigmoid((r - centre) / 0.5)) - 2.0 for r in self.REWARDS]
        rows = [self.drawn(x, [0.4, -0.3, 0.9], self.REWARDS) for x in (best, [best[0] + 0.1, *best[1:]])]
        zero, other = values("brain", {"T": 0.5, "proposal": proposal, "goodness": "sigmoid"}, lists=rows)
        assert zero == pytest.approx(0, abs=1e-14)
        assert other > 1e-5

    def test_coefficients_are_b_minus_a_and_sum_to_zero(self) -> None:
        ratios, sampler = [0.7, -0.4, 1.1], [0.4, -0.3, 0.9]
        a = np.exp(log_softmax([s + r / 0.5 for s, r in zip(sampler, self.REWARDS, strict=True)]))
        b = np.exp(log_softmax([x + s for x, s in zip(ratios, sampler, strict=True)]))
        options = {"T": 0.5, "proposal": "guide"}
        found = [g[0] for g in slopes("brain", options, [self.drawn(ratios, sampler, self.REWARDS)])]
        np.testing.assert_allclose(found, b - a, atol=1e-14)
        assert sum(found) == pytest.approx(0, abs=1e-14)
        expected = float((a * np.log(a / b)).sum())
        ours = values("brain", options, lists=[self.drawn(ratios, sampler, self.REWARDS)])[0]
        assert ours == pytest.approx(expected, abs=1e-14)

    def test_a_guide_that_is_the_reference(self) -> None:
        row = self.drawn([0.7, -0.4, 1.1], [0.0] * 3, self.REWARDS)
        first, second = (values("brain", {"proposal": p}, lists=[row])[0] for p in ("reference", "guide"))
        assert first == pytest.approx(second, abs=1e-14)

    def test_two_samples_and_one_hot_goodness_are_dpo_with_beta_1(self) -> None:
        row = {"completions": [PAIR["chosen"], PAIR["rejected"]], "scores": [1.0, 0.0]}
        found = values("brain", {"T": 1e-3}, lists=[row])
        np.testing.assert_allclose(found, values("dpo", {"beta": 1.0}, pairs=[PAIR]), atol=1e-14)

    @pytest.mark.parametrize("goodness", ["exponential", "sigmoid"])
    def test_uniform_goodness_pulls_to_the_prior(self, goodness: str) -> None:
        options = {"goodness": goodness}
        even = listed([0.0] * 4, [0.7] * 4)
        assert values("brain", options, lists=[even])[0] == pytest.approx(0, abs=1e-15)
        assert measured("brain", options, "lists", [even])["effective_samples"] == pytest.approx(4)
        moved = listed([1.0, 0, 0, 0], [0.7] * 4)
        expected = -math.log(4) - log_softmax([1.0, 0, 0, 0]).mean()
        assert values("brain", options, lists=[moved])[0] == pytest.approx(expected, abs=1e-14)
        hot = listed([1.0, 0, 0, 0], [1.0, 0.0, 3.0, 2.0])
        far = values("brain", {**options, "T": 1e9}, lists=[hot])[0]
        assert far == pytest.approx(expected, abs=1e-8), "a large T forgets the rewards"

    def test_a_list_of_one_teaches_nothing(self) -> None:
        assert values("brain", {}, lists=[listed([3.0], [1.0])])[0] == 0
        assert not slopes("brain", {}, [listed([3.0], [1.0])])[0].any()

    def test_effective_samples(self) -> None:
        a = np.exp(log_softmax([r / 0.5 for r in self.REWARDS]))
        rows = [listed([9.0, 0.0, -3.0], self.REWARDS), listed([0.0, 0.0], [0.0, 1e4])]
        found = measured("brain", {"T": 0.5}, "lists", rows)["effective_samples"]
        assert found == pytest.approx((1 / (a**2).sum() + 1) / 2, rel=1e-12)

    def test_the_sigmoid_is_centred_and_saturates(self) -> None:
        ratios = [0.7, -0.4, 1.1]
        rows = [listed(ratios, [r + c for r in self.REWARDS]) for c in (0.0, 5.0)]
        first, second = values("brain", {"goodness": "sigmoid"}, lists=rows)
        assert first == pytest.approx(second, abs=1e-13), "a constant in the reward is centred away"
        wide = values(
            "brain", {"goodness": "sigmoid", "T": 1e5}, lists=[listed(ratios, [1e4 * r for r in self.REWARDS])]
        )
        once, twice = (
            values("brain", {"T": t}, lists=[listed(ratios, [1e4 * r for r in self.REWARDS])]) for t in (1e5, 2e5)
        )
        np.testing.assert_allclose(wide, twice, atol=1e-3)
        assert abs(once - twice)[0] > 1e-2, "a sigmoid of a small number has half the slope of an exponential"
        low, good, better = (math.log(sigmoid(x)) for x in (-20, 9.9, 10.1))
        shares = np.exp(log_softmax([low, good, better]))
        assert shares[1] == pytest.approx(shares[2], rel=1e-4)
        found = values("brain", {"goodness": "sigmoid"}, lists=[listed([-20.0, 0.0, 0.0], [-20.0, 9.9, 10.1])])[0]
        b = log_softmax([-20.0, 0.0, 0.0])
        assert found == pytest.approx(float((shares * (np.log(shares) - b)).sum()), abs=1e-12)

    def test_the_guide_is_required_only_where_it_is_read(self) -> None:
        brain = METHODS.get("brain")
        assert brain().requires() == {"ref_logp", "scores"}
        assert brain(proposal="guide").requires() == {"ref_logp", "scores", "anchor.guide"}
