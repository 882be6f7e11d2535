"""What the papers (and a little algebra) say of the one-sided and regularised losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError
from align.methods import METHODS, terms
from align.methods.base import finish
from align.methods.evaluate import make_bare_view, make_method
from align.testing.rows import Row
from align.testing.token_tree import TokenTree, gradient, norm, objective, random_policy
from tests.methods.loops import h, sigmoid, softplus
from tests.methods.test_identities import LOG2, PAIR, Z, at_h, one, shifted, slopes, values

SAMPLES = [one(-0.4, -0.7, ref=[-0.3, -1.1]), one(-2.0, ref=[-1.2]), one(-0.1, -0.2, ref=[-0.5, -0.4])]
WITH_SAMPLES = {**PAIR, "samples": SAMPLES}
W, L = h(PAIR["chosen"]), h(PAIR["rejected"])


def at_start(row: Row) -> Row:
    """The pair with policy = reference everywhere."""

    def same(part: Any) -> Any:
        return [same(own) for own in part] if isinstance(part, list) else {**part, "ref_logp": list(part["logp"])}

    return {name: same(part) for name, part in row.items()}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("spin", {"lambda": 0.7}, LOG2),
        ("seppo", {"beta": 0.7}, LOG2),
        ("vpo", {"alpha": 0.3}, LOG2),
        ("vpo", {"alpha": 0.3, "sign": 1, "baseline": "samples"}, LOG2),
        ("flex_dpo", {"beta_w": 0.7, "beta_l": 0.2}, LOG2),
        ("hypo", {"lambda": 0.3}, LOG2),
        ("spac", {"rho": 0.3}, 1.3 * LOG2),
        ("spac", {"rho": 0.3, "kind": "linear"}, LOG2),
        ("demo_reg", {}, LOG2),
    ],
)
def test_first_loss_is_a_known_constant(name: str, options: dict[str, Any], expected: float) -> None:
    row = at_start({**WITH_SAMPLES, "baseline": one(-2.0)})
    assert values(name, options, pairs=[row])[0] == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "beta"),
    [
        ("spin", {"lambda": 0.6}, 0.6),
        ("vpo", {"alpha": 0, "beta": 0.6}, 0.6),
        ("flex_dpo", {"beta_w": 0.6, "beta_l": 0.6}, 0.6),
        ("hypo", {"lambda": 0, "beta": 0.6}, 0.6),
        ("spac", {"rho": 0, "eta": 4.0}, 0.25),
        ("demo_reg", {"beta": 0.6}, 0.6),
    ],
)
def test_dpo_is_a_special_case(name: str, options: dict[str, Any], beta: float) -> None:
    for pair in (WITH_SAMPLES, {**WITH_SAMPLES, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}):
        theirs = values("dpo", {"beta": beta}, pairs=[pair])
        np.testing.assert_allclose(values(name, options, pairs=[pair]), theirs, rtol=0, atol=1e-14)
    ours, theirs = (slopes(*method, [WITH_SAMPLES])[:2] for method in ((name, options), ("dpo", {"beta": beta})))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-14)


class TestD2O:
    OPTIONS = {"alpha": 0.7, "beta": 0.4}  # noqa: RUF012
    ROW = {**PAIR["rejected"], "label": False, "samples": SAMPLES}  # noqa: RUF012

    def test_log_2_at_the_reference(self) -> None:
        row = {**at_start({"rejected": PAIR["rejected"], "samples": SAMPLES}), "label": False}
        row = {**row.pop("rejected"), **row}
        assert values("d2o", self.OPTIONS, singles=[row])[0] == pytest.approx(LOG2, abs=1e-14)

    def test_one_sample_that_is_the_chosen_response_is_dpo(self) -> None:
        row = {**PAIR["rejected"], "label": False, "samples": [PAIR["chosen"]]}
        ours = values("d2o", {"alpha": 0.6, "beta": 0.6}, singles=[row])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), rtol=0, atol=1e-14)

    def test_slopes(self) -> None:
        m = 0.4 * sum(map(h, SAMPLES)) / 3 - 0.7 * L
        negative, *samples = slopes("d2o", self.OPTIONS, [self.ROW])
        np.testing.assert_allclose(negative, 0.7 * sigmoid(-m), rtol=0, atol=1e-14)
        for sample in samples:
            np.testing.assert_allclose(sample, -0.4 / 3 * sigmoid(-m), rtol=0, atol=1e-14)

    def test_many_samples_are_a_kl_to_their_policy(self) -> None:
        """With the whole distribution as samples the positive part is -beta KL(reference || policy)."""
        reference, policy = (torch.tensor(p, dtype=torch.float64) for p in ([0.25] * 4, [0.1, 0.2, 0.3, 0.4]))
        samples = [one(float(p.log()), ref=[float(q.log())]) for p, q in zip(policy, reference, strict=True)]
        kl = float((reference * (reference / policy).log()).sum())
        row = {**at_h(0.0), "label": False, "samples": samples}
        assert kl > 0.1
        assert values("d2o", self.OPTIONS, singles=[row])[0] == pytest.approx(softplus(0.4 * kl), abs=1e-14)

    def test_the_mean_is_over_the_negatives(self) -> None:
        good = {**PAIR["chosen"], "label": True, "samples": SAMPLES[:1]}
        alone = terms("d2o", self.OPTIONS, singles=[self.ROW]).total()
        found = terms("d2o", self.OPTIONS, singles=[good, self.ROW, self.ROW, good])
        assert float(found.total()) == pytest.approx(float(alone), abs=1e-14)
        assert not slopes("d2o", self.OPTIONS, [good, self.ROW])[0].any()
        assert float(terms("d2o", self.OPTIONS, singles=[good]).total()) == 0

    def test_samples_are_required(self) -> None:
        bare = {**PAIR["rejected"], "label": False}
        with pytest.raises(ConfigError, match="`samples`"):
            terms("d2o", singles=[bare])
        with pytest.raises(ConfigError, match="have no `samples`"):
            METHODS.get("d2o")().loss(make_bare_view("singles", [bare]))


def toy(name: str, options: dict[str, Any], policy: list[float], p: list[float], ref: list[float]) -> torch.Tensor:
    """Gradient in logits of a self-play loss on all pairs (y ~ p, y' ~ ref) of a few one-token answers."""
    logits = torch.tensor(policy, dtype=torch.float64).log().requires_grad_()
    logp, reference = logits.log_softmax(0), torch.tensor(ref, dtype=torch.float64).log()
    answers = [{"logp": logp[i : i + 1], "ref_logp": reference[i : i + 1]} for i in range(len(p))]
    rows = [
        {"chosen": a, "rejected": b, "weight": x * y}
        for a, x in zip(answers, p, strict=True)
        for b, y in zip(answers, ref, strict=True)
    ]
    (found,) = torch.autograd.grad(terms(name, options, pairs=rows).total() * len(rows), logits)
    return found


class TestSPIN:
    def test_the_data_s_own_policy_is_a_fixed_point(self) -> None:
        p = [0.1, 0.2, 0.7]
        assert toy("spin", {"lambda": 0.8}, p, p, p).abs().max() < 1e-15
        assert toy("spin", {"lambda": 0.8}, [0.2, 0.2, 0.6], p, p).abs().max() > 1e-3
        assert toy("spin", {"lambda": 0.8}, [0.2, 0.2, 0.6], p, [0.2, 0.2, 0.6]).abs().max() > 1e-3

    def test_beside_the_fixed_point_the_gradient_leads_back(self) -> None:
        p = [0.1, 0.2, 0.7]
        found = toy("spin", {"lambda": 0.8}, [0.15, 0.2, 0.65], p, p)
        assert found[0] > 0 > found[2]


class TestSePPO:
    def test_ahead_it_is_spin(self) -> None:
        pair = {"chosen": at_h(0.4), "rejected": at_h(0.9)}
        theirs = values("spin", {"lambda": 0.7}, pairs=[pair])
        np.testing.assert_allclose(values("seppo", {"beta": 0.7}, pairs=[pair]), theirs, rtol=0, atol=1e-14)
        chosen, rejected = slopes("seppo", {"beta": 0.7}, [pair])
        assert chosen[0] < 0 < rejected[0]

    def test_behind_it_raises_both(self) -> None:
        pair = {"chosen": at_h(-0.4), "rejected": at_h(0.9)}
        m = 0.7 * (-0.4 + 0.9)
        assert values("seppo", {"beta": 0.7}, pairs=[pair])[0] == pytest.approx(softplus(-m), abs=1e-14)
        chosen, rejected = slopes("seppo", {"beta": 0.7}, [pair])
        np.testing.assert_allclose([chosen[0], rejected[0]], -0.7 * sigmoid(-m), rtol=0, atol=1e-14)

    def test_at_the_start_the_sample_is_a_loser(self) -> None:
        chosen, rejected = slopes("seppo", {"beta": 0.7}, [{"chosen": at_h(0.0), "rejected": at_h(0.0)}])
        assert chosen[0] == pytest.approx(-0.35, abs=1e-14)
        assert rejected[0] == pytest.approx(0.35, abs=1e-14)

    def test_the_sign_has_no_gradient_and_does_not_see_the_length(self) -> None:
        """A sum and a mean over tokens have one sign; both sides of the step differ by the sample's part alone."""
        for chosen in (one(-1.0, -1.0, -1.0, ref=[-1.5, -0.9, -0.9]), at_h(0.3)):
            pair = {"chosen": chosen, "rejected": at_h(0.9)}
            first, _ = slopes("seppo", {"beta": 0.7}, [pair])
            np.testing.assert_allclose(first, -0.7 * sigmoid(-0.7 * (0.3 - 0.9)), rtol=0, atol=1e-14)


class TestVPO:
    OPTIONS = {"alpha": 0.2, "beta": 0.6}  # noqa: RUF012

    def test_offline_on_the_chosen_it_is_rpo_up_to_a_constant(self) -> None:
        rpo = values("rpo", {"eta": 0.2, "beta": 0.6}, pairs=[PAIR])
        constant = 0.2 * 0.6 * sum(PAIR["chosen"]["ref_logp"])
        np.testing.assert_allclose(values("vpo", self.OPTIONS, pairs=[PAIR]), rpo + constant, rtol=0, atol=1e-14)
        ours, theirs = slopes("vpo", self.OPTIONS, [PAIR]), slopes("rpo", {"eta": 0.2, "beta": 0.6}, [PAIR])
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("baseline", ["chosen", "sft", "samples"])
    def test_the_two_signs_average_to_dpo(self, baseline: str) -> None:
        pair = {**WITH_SAMPLES, "baseline": one(-2.0, ref=[-1.0])}
        both = [values("vpo", {**self.OPTIONS, "baseline": baseline, "sign": s}, pairs=[pair]) for s in (-1, 1)]
        calibration = {"chosen": W, "sft": -1.0, "samples": sum(map(h, SAMPLES)) / 3}[baseline]
        np.testing.assert_allclose((both[1] - both[0]) / 2, 0.2 * 0.6 * calibration, rtol=0, atol=1e-14)
        dpo = values("dpo", {"beta": 0.6}, pairs=[PAIR])
        np.testing.assert_allclose((both[0] + both[1]) / 2, dpo, rtol=0, atol=1e-14)

    def test_signs_of_the_push_on_the_calibration_responses(self) -> None:
        for sign, way in ((-1, -1), (1, 1)):
            options = {**self.OPTIONS, "sign": sign, "baseline": "samples"}
            for found in slopes("vpo", options, [WITH_SAMPLES])[2:]:
                np.testing.assert_allclose(found, way * 0.2 * 0.6 / 3, rtol=0, atol=1e-14)

    def test_slope_of_the_chosen_and_where_optimism_turns_it(self) -> None:
        for sign in (-1, 1):
            chosen, _ = slopes("vpo", {**self.OPTIONS, "sign": sign}, [PAIR])
            np.testing.assert_allclose(chosen, -0.6 * (sigmoid(-0.6 * Z) - sign * 0.2), rtol=0, atol=1e-14)
        turn = math.log(0.8 / 0.2) / 0.6
        below, above = (
            slopes("vpo", {**self.OPTIONS, "sign": 1}, [{"chosen": at_h(turn + extra), "rejected": at_h(0.0)}])[0][0]
            for extra in (-0.01, 0.01)
        )
        assert below < 0 < above

    def test_cautions(self) -> None:
        assert not make_method("vpo").cautions()
        assert make_method("vpo", {"alpha": 0.11}).cautions()
        assert "without bound" in make_method("vpo", {"sign": 1}).cautions()[0]

    def test_columns(self) -> None:
        assert make_method("vpo").requires() == {"ref_logp"}
        assert make_method("vpo", {"baseline": "sft"}).requires() == {"ref_logp", "baseline"}
        assert make_method("vpo", {"baseline": "samples"}).requires() == {"ref_logp", "samples"}


class TestFlexDPO:
    OPTIONS = {"beta_w": 0.6, "beta_l": 0.2}  # noqa: RUF012

    def test_slopes_and_their_ratio(self) -> None:
        m = 0.6 * W - 0.2 * L
        chosen, rejected = slopes("flex_dpo", self.OPTIONS, [PAIR])
        np.testing.assert_allclose(chosen, -0.6 * sigmoid(-m), rtol=0, atol=1e-14)
        np.testing.assert_allclose(rejected, 0.2 * sigmoid(-m), rtol=0, atol=1e-14)

    def test_without_beta_l_the_rejected_one_is_ignored(self) -> None:
        options = {"beta_w": 0.6, "beta_l": 0.0}
        assert values("flex_dpo", options, pairs=[PAIR])[0] == pytest.approx(softplus(-0.6 * W), abs=1e-14)
        assert not slopes("flex_dpo", options, [PAIR])[1].any()

    def test_a_function_of_the_prompt_counts_by_the_difference_of_the_betas(self) -> None:
        moved = {name: shifted(row, 1.5) for name, row in PAIR.items()}
        found = values("flex_dpo", self.OPTIONS, pairs=[moved])[0]
        assert found == pytest.approx(softplus(-(0.6 * W - 0.2 * L - 0.4 * 1.5)), abs=1e-14)
        equal = {"beta_w": 0.6, "beta_l": 0.6}
        first, second = values("flex_dpo", equal, pairs=[PAIR, moved])
        assert first == pytest.approx(second, abs=1e-14)

    @pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 0.3 * 1.9 / 3), ("sum", 0.3 * 1.9)])
    def test_sft_term(self, reduction: str, expected: float) -> None:
        options = {**self.OPTIONS, "gamma": 0.3, "sft_reduction": reduction}
        extra = values("flex_dpo", options, pairs=[PAIR]) - values("flex_dpo", self.OPTIONS, pairs=[PAIR])
        assert extra[0] == pytest.approx(expected, abs=1e-14)

    @pytest.mark.parametrize("beta", [0.1, 0.6])
    def test_in_probabilities_dpo_drops_the_rejected_and_starves_the_chosen(self, beta: float) -> None:
        """dl/dpi = (dl/dlog pi) / pi: ratio -pi_w / pi_l; powers pi_l^(beta - 1) and pi_l^beta as pi_l goes to 0."""
        found = []
        for pi_l in (1e-30, 1e-40):
            pair = {"chosen": one(math.log(0.3), ref=[-1.0]), "rejected": one(math.log(pi_l), ref=[-1.0])}
            chosen, rejected = slopes("flex_dpo", {"beta_w": beta, "beta_l": beta}, [pair])
            by_w, by_l = chosen[0] / 0.3, rejected[0] / pi_l
            assert by_w / by_l == pytest.approx(-pi_l / 0.3, rel=1e-12)
            m = beta * (math.log(0.3) - math.log(pi_l))
            assert by_w == pytest.approx(-beta * sigmoid(-m) / 0.3, rel=1e-12)
            found.append((abs(by_w), by_l))
        small, smaller = found
        # sigmoid(-m) is e^{-m} up to a share of e^{-m} itself.
        assert math.log10(smaller[0] / small[0]) == pytest.approx(-10 * beta, abs=1e-3)
        assert math.log10(smaller[1] / small[1]) == pytest.approx(-10 * (beta - 1), abs=1e-3)

    def test_cautions(self) -> None:
        assert make_method("flex_dpo", {"beta_l": 0.11}).cautions()
        assert not make_method("flex_dpo", {"beta_l": 0.1}).cautions()


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.tensor([0.3, -0.8, 0.5, 0.1], dtype=torch.float64).requires_grad_()
    return logits, torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()


class TestHyPO:
    @pytest.mark.parametrize("baseline", ["rloo", "zero"])
    def test_expected_gradient_is_that_of_the_reverse_kl(self, baseline: str) -> None:
        """All pairs of samples of a policy over four answers, each with its probability."""
        logits, reference = policies()
        logp = logits.log_softmax(0)
        (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
        answers = [{"logp": logp[i : i + 1], "ref_logp": reference[i : i + 1]} for i in range(4)]
        p = logp.detach().exp().tolist()
        pair = {"chosen": at_h(0.0), "rejected": at_h(0.0)}
        rows = [
            {**pair, "samples": [answers[i], answers[j]], "weight": p[i] * p[j]} for i in range(4) for j in range(4)
        ]
        found = terms("hypo", {"lambda": 1.0, "baseline": baseline}, pairs=rows).total() * len(rows)
        (estimate,) = torch.autograd.grad(found, logits, retain_graph=True)
        torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-14)
        assert exact.abs().max() > 0.05
        # Not so the plain mean of l: its expected gradient is that of a sum of probabilities.
        plain = sum(weight * (logp[i] - reference[i]) for i, weight in enumerate(p))
        (nothing,) = torch.autograd.grad(plain, logits)
        assert nothing.abs().max() < 1e-15

    def test_coefficients_of_a_prompt_sum_to_zero(self) -> None:
        others = {**WITH_SAMPLES, "samples": SAMPLES[:2]}
        found = slopes("hypo", {"lambda": 0.3}, [WITH_SAMPLES, others])
        for samples in (found[2:5], found[7:9]):
            assert all(np.ptp(own) == 0 for own in samples)
            assert sum(own[0] for own in samples) == pytest.approx(0, abs=1e-15)
            assert max(abs(own[0]) for own in samples) > 1e-2

    def test_slopes(self) -> None:
        """lambda / k times l less the mean of the others; half of it again for the mean over two pairs."""
        ratios = [h(row) for row in SAMPLES]
        found = slopes("hypo", {"lambda": 0.3}, [WITH_SAMPLES, {**WITH_SAMPLES, "samples": SAMPLES[:1]}])
        for i, own in enumerate(found[2:5]):
            others = (sum(ratios) - ratios[i]) / 2
            np.testing.assert_allclose(own, 0.3 / 3 * (ratios[i] - others) / 2, rtol=0, atol=1e-15)
        np.testing.assert_allclose(found[7], 0.3 * ratios[0] / 2, rtol=0, atol=1e-15)  # one sample: no baseline
        zero = slopes("hypo", {"lambda": 0.3, "baseline": "zero"}, [WITH_SAMPLES])
        for ratio, own in zip(ratios, zero[2:], strict=True):
            np.testing.assert_allclose(own, 0.3 / 3 * ratio, rtol=0, atol=1e-15)

    def test_pairs_are_those_of_dpo(self) -> None:
        ours, theirs = slopes("hypo", {"beta": 0.6}, [WITH_SAMPLES]), slopes("dpo", {"beta": 0.6}, [PAIR])
        for mine, other in zip(ours[:2], theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-14)


class TestSPAC:
    def test_logistic_pessimism_is_spin_against_the_sample(self) -> None:
        ours = terms("spac", {"eta": 4.0, "rho": 0.3}, pairs=[{**PAIR, "samples": SAMPLES[:1]}])
        spin = values("spin", {"lambda": 0.25}, pairs=[{"chosen": PAIR["chosen"], "rejected": SAMPLES[0]}])
        np.testing.assert_allclose(ours["pessimism"].values, spin, rtol=0, atol=1e-14)
        assert ours["pessimism"].scale == 0.3

    def test_slopes(self) -> None:
        chosen, rejected, *samples = slopes("spac", {"eta": 4.0, "rho": 0.3, "kind": "linear"}, [WITH_SAMPLES])
        s = sigmoid(-(W - L) / 4)
        np.testing.assert_allclose(chosen, -s / 4 - 0.15 / 4, rtol=0, atol=1e-14)
        np.testing.assert_allclose(rejected, s / 4 - 0.15 / 4, rtol=0, atol=1e-14)
        for own in samples:
            np.testing.assert_allclose(own, 0.3 / 4 / 3, rtol=0, atol=1e-14)
        chosen, rejected, *samples = slopes("spac", {"eta": 4.0, "rho": 0.3}, [WITH_SAMPLES])
        against = [sigmoid(-(W - h(row)) / 4) for row in SAMPLES]
        np.testing.assert_allclose(chosen, -s / 4 - 0.3 / 4 * sum(against) / 3, rtol=0, atol=1e-14)
        np.testing.assert_allclose(rejected, s / 4, rtol=0, atol=1e-14)
        for own, each in zip(samples, against, strict=True):
            np.testing.assert_allclose(own, 0.3 / 4 / 3 * each, rtol=0, atol=1e-14)

    def test_own_samples_have_no_expected_gradient_and_a_mean_of_minus_the_kl(self) -> None:
        reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
        for policy, kl in ((reference, 0.0), (torch.tensor([0.3, 0.1, 0.2, 0.4], dtype=torch.float64), None)):
            logits = policy.log().requires_grad_()
            logp = logits.log_softmax(0)
            rows = [
                {
                    "chosen": at_h(0.0),
                    "rejected": at_h(0.0),
                    "samples": [{"logp": logp[i : i + 1], "ref_logp": reference[i : i + 1].log()}],
                    "weight": float(reference[i]),
                }
                for i in range(4)
            ]
            found = terms("spac", {"kind": "linear", "eta": 2.0, "rho": 1.0}, pairs=rows)
            expected = float((reference * (reference / policy).log()).sum()) if kl is None else kl
            assert float(found["pessimism"].values.detach().sum()) == pytest.approx(-expected / 2, abs=1e-14)
            (slope,) = torch.autograd.grad(found.total(), logits)
            assert (float(slope.abs().max()) < 1e-15) == (kl == 0.0)

    def test_only_the_linear_form_is_unbounded_below(self) -> None:
        rows = [{**PAIR, "samples": [at_h(-far)]} for far in (0.0, 1e3, 1e4)]
        linear = values("spac", {"kind": "linear"}, pairs=rows)
        np.testing.assert_allclose(np.diff(linear), [-0.1 * 1e3 / 10, -0.1 * 9e3 / 10], rtol=0, atol=1e-9)
        assert values("spac", {}, pairs=rows).min() > 0
        assert make_method("spac", {"kind": "linear"}).cautions()
        assert not make_method("spac").cautions()


class TestDemoReg:
    def test_the_optimum_is_the_clone_tilted_by_the_reward(self) -> None:
        """And its implicit reward has the reward's differences; a large beta leaves the clone as it is."""
        for beta in (0.5, 2.0):
            tree = TokenTree.random(2, beta=beta)
            best, method = tree.solve(), make_method("demo_reg", {"beta": beta})
            assert norm(gradient(method, tree, best)) < 1e-10
            assert norm(gradient(method, tree, tree.reference)) > 1e-3
            reward = beta * (tree.leaf_logp(best) - tree.leaf_logp(tree.reference))
            torch.testing.assert_close(reward - reward[0], tree.rewards - tree.rewards[0], rtol=0, atol=1e-12)
        stiff = TokenTree.random(2, beta=1e6)
        torch.testing.assert_close(stiff.solve().logp, stiff.reference.logp, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(("reduction", "nll"), [("sum", 5.0), ("token_mean", 2.5)])
    def test_the_joint_form_is_rpo_on_the_demonstration(self, reduction: str, nll: float) -> None:
        pair = {**PAIR, "baseline": one(-2.0, -3.0)}
        ours = {"beta": 0.6, "mu": 0.3, "sft_reduction": reduction}
        eta = 0.3 / 0.6 if reduction == "sum" else 0.3
        rpo = {"beta": 0.6, "eta": eta, "baseline": "sft", "sft_reduction": reduction}
        np.testing.assert_allclose(
            values("demo_reg", ours, pairs=[pair]), values("rpo", rpo, pairs=[pair]), rtol=0, atol=1e-14
        )
        extra = values("demo_reg", ours, pairs=[pair]) - values("dpo", {"beta": 0.6}, pairs=[PAIR])
        assert extra[0] == pytest.approx(0.3 * nll, abs=1e-14)

    def test_demonstrations_are_required_only_where_they_are_read(self) -> None:
        assert make_method("demo_reg").requires() == {"ref_logp"}
        assert make_method("demo_reg", {"mu": 0.1}).requires() == {"ref_logp", "baseline"}
        with pytest.raises(ConfigError, match="`baseline`"):
            terms("demo_reg", {"mu": 0.1}, pairs=[PAIR])


def contrast(kind: str, *ratios: float, number: int = 0) -> list[Row]:
    signs = {"intra": "+-", "inter": "+--+"}[kind]
    return [at_h(r, role=f"{kind}:{number}:{sign}") for r, sign in zip(ratios, signs, strict=True)]


class TestMAPL:
    OPTIONS = {"beta": 0.6, "lambda_1": 0.3, "lambda_2": 0.7}  # noqa: RUF012

    def found(self, contrasts: list[Row], pair: Row = PAIR) -> Any:
        return terms("mapl", self.OPTIONS, pairs=[{**pair, "contrasts": contrasts}])

    def test_log_2_for_each_term_where_the_prompts_coincide(self) -> None:
        row = at_start({"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]})
        same = [*contrast("intra", 0.8, 0.8), *contrast("inter", 0.8, -0.1, 0.8, -0.1)]
        found = self.found(same, row)
        assert {name: float(term.values) for name, term in found.items()} == pytest.approx(
            dict.fromkeys(("preference", "intra", "inter"), LOG2), abs=1e-14
        )
        assert float(found.total()) == pytest.approx(2.0 * LOG2, abs=1e-14)

    def test_margins(self) -> None:
        found = self.found([*contrast("intra", 0.8, -0.5), *contrast("inter", 1.0, -0.3, 0.4, 0.2)])
        assert float(found["preference"].values) == pytest.approx(softplus(-0.6 * Z), abs=1e-14)
        assert float(found["intra"].values) == pytest.approx(softplus(-0.6 * 1.3), abs=1e-14)
        # (1.0 - -0.3) - (0.4 - 0.2)
        assert float(found["inter"].values) == pytest.approx(softplus(-0.6 * 1.1), abs=1e-14)
        assert (found["intra"].scale, found["inter"].scale) == (0.3, 0.7)

    def test_a_function_of_a_prompt_changes_intra_and_not_inter(self) -> None:
        intra, inter = contrast("intra", 0.8, -0.5), contrast("inter", 1.0, -0.3, 0.4, 0.2)
        plain = self.found([*intra, *inter])
        better = [shifted(intra[0], 2.0), intra[1], *(shifted(row, 2.0) for row in inter[:2]), *inter[2:]]
        worse = [intra[0], shifted(intra[1], 2.0), *inter[:2], *(shifted(row, 2.0) for row in inter[2:])]
        for moved, expected in ((better, -0.7), (worse, 3.3)):
            found = self.found(moved)
            assert float(found["inter"].values) == pytest.approx(float(plain["inter"].values), abs=1e-14)
            assert float(found["intra"].values) == pytest.approx(softplus(-0.6 * expected), abs=1e-14)

    def test_slopes(self) -> None:
        rows = [{**PAIR, "contrasts": [*contrast("intra", 0.8, -0.5), *contrast("inter", 1.0, -0.3, 0.4, 0.2)]}]
        chosen, rejected, *others = slopes("mapl", self.OPTIONS, rows)
        np.testing.assert_allclose(chosen, -0.6 * sigmoid(-0.6 * Z), rtol=0, atol=1e-14)
        np.testing.assert_allclose(rejected, 0.6 * sigmoid(-0.6 * Z), rtol=0, atol=1e-14)
        intra, inter = 0.3 * 0.6 * sigmoid(-0.6 * 1.3), 0.7 * 0.6 * sigmoid(-0.6 * 1.1)
        expected = [-intra, intra, -inter, inter, inter, -inter]
        np.testing.assert_allclose([own[0] for own in others], expected, rtol=0, atol=1e-14)

    def test_a_pair_s_contrasts_share_its_weight_and_pairs_without_any_do_not_count(self) -> None:
        two = [*contrast("intra", 0.8, -0.5), *contrast("intra", 0.1, 0.9, number=1)]
        rows = [{**PAIR, "contrasts": two}, {**PAIR, "contrasts": []}]
        found = terms("mapl", self.OPTIONS, pairs=rows)
        mean = (softplus(-0.6 * 1.3) + softplus(0.6 * 0.8)) / 2
        np.testing.assert_allclose(found["intra"].values, [mean, 0], rtol=0, atol=1e-14)
        assert dict(found.counts) == {"preference": 2, "intra": 1, "inter": 0}
        assert float(found.total()) == pytest.approx(softplus(-0.6 * Z) + 0.3 * mean, abs=1e-14)

    def test_without_weights_it_is_dpo(self) -> None:
        off = {"beta": 0.6, "lambda_1": 0, "lambda_2": 0}
        np.testing.assert_allclose(
            values("mapl", off, pairs=[PAIR]), values("dpo", {"beta": 0.6}, pairs=[PAIR]), rtol=0, atol=1e-14
        )
        assert make_method("mapl", off).requires() == {"ref_logp"}
        for option in ("lambda_1", "lambda_2"):
            assert make_method("mapl", {**off, option: 0.1}).requires() == {"ref_logp", "contrasts"}


@pytest.mark.parametrize("name", ["hypo", "spac"])
def test_pairs_without_samples_are_refused(name: str) -> None:
    view = make_bare_view("pairs", [PAIR])
    with pytest.raises(ConfigError, match="have no `samples`"):
        finish(METHODS.get(name)().loss(view), view)


def test_spin_s_objective_grows_with_any_policy_but_the_fixed_point() -> None:
    """On the tree, with both answers of the data's policy: the loss is log 2 there and more elsewhere."""
    tree = TokenTree.random(4)
    tree = TokenTree(tree.reference, torch.zeros_like(tree.rewards), tree.beta, tree.depth)
    method = make_method("spin")
    assert float(objective(method, tree, tree.reference)) == pytest.approx(LOG2, abs=1e-12)
    assert float(objective(method, tree, random_policy(tree, 4))) > LOG2 + 1e-4
