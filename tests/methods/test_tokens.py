"""Identities of the token-level family and of the SFT side."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError
from align.methods import METHODS, terms
from align.methods.evaluate import make_bare_view, make_method
from align.scoring.vocab import Tile, cross_entropy, logp
from align.testing import battery
from align.testing.bare import state_of
from align.testing.on_model import Bench
from align.testing.reference_step import evaluate
from align.testing.rows import Row, random_rows, tracked
from align.testing.steps import engine_for, golden_step, packed_step, relative_difference
from tests.methods.loops_tokens import LOOPS
from tests.methods.test_identities import LOG2, one, slopes, values

PAIR: Row = {
    "chosen": one(-0.3, -1.2, -0.4, ref=[-0.5, -1.0, -0.9]),
    "rejected": one(-0.8, -0.2, ref=[-0.6, -0.5]),
}
H = {"chosen": [0.2, -0.2, 0.5], "rejected": [-0.2, 0.3]}
Z = sum(H["chosen"]) - sum(H["rejected"])


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def anchored(pair: Row, **anchors: tuple[list[float], list[float]]) -> Row:
    """The pair with anchors given as differences to the reference, (of the chosen, of the rejected)."""
    made = {}
    for place, part in enumerate(("chosen", "rejected")):
        ref = pair[part]["ref_logp"]
        own = {name: [r + d for r, d in zip(ref, both[place], strict=True)] for name, both in anchors.items()}
        made[part] = {**pair[part], "anchor": own}
    return {**pair, **made}


def gradients_of_anchors(name: str, row: Row) -> list[str]:
    """Anchors and references that a gradient reaches when they ask for one."""
    made, leaves = {**row}, {}
    for part in ("chosen", "rejected"):
        anchors = {key: torch.tensor(x, requires_grad=True) for key, x in row[part]["anchor"].items()}
        leaves |= {f"{part} {key}": leaf for key, leaf in anchors.items()}
        logp = torch.tensor(row[part]["logp"], requires_grad=True)
        made[part] = {**row[part], "logp": logp, "anchor": anchors}
    terms(name, pairs=[made]).total().backward()
    return [key for key, leaf in leaves.items() if leaf.grad is not None]


class TestTGDPO:
    GUIDE = ([0.7, -0.4, 1.1], [0.9, -0.6])
    ROW = anchored(PAIR, guide=GUIDE)

    @pytest.mark.parametrize("options", [{"alpha": 0.0}, {}])
    def test_without_guidance_it_is_dpo(self, options: dict[str, Any]) -> None:
        row = self.ROW if options else anchored(PAIR, guide=([0, 0, 0], [0, 0]))
        ours = values("tgdpo", {"beta": 0.6, **options}, pairs=[row])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)
        assert values("tgdpo", {"beta": 0.6}, pairs=[self.ROW])[0] != pytest.approx(ours[0], abs=1e-3)

    def test_value_at_the_reference_whatever_the_guide(self) -> None:
        still = {part: {**PAIR[part], "logp": PAIR[part]["ref_logp"]} for part in PAIR}
        assert values("tgdpo", {}, pairs=[anchored(still, guide=self.GUIDE)])[0] == pytest.approx(LOG2, abs=1e-14)

    @pytest.mark.parametrize("beta_guide", [None, 0.9])
    def test_tokens_gradients_are_in_the_ratio_of_their_factors(self, beta_guide: float | None) -> None:
        beta, alpha = 0.6, 0.5
        scale = beta_guide or beta
        options = {"beta": beta, "alpha": alpha, "beta_guide": beta_guide}
        found = slopes("tgdpo", options, [self.ROW])
        factors = [[1 + sign * alpha * scale * d for d in own] for sign, own in zip((1, -1), self.GUIDE, strict=True)]
        margin = beta * (np.dot(factors[0], H["chosen"]) - np.dot(factors[1], H["rejected"]))
        np.testing.assert_allclose(found[0], -beta * s(-margin) * np.array(factors[0]), atol=1e-14)
        np.testing.assert_allclose(found[1], beta * s(-margin) * np.array(factors[1]), atol=1e-14)

    def test_the_floor_keeps_a_token_from_turning(self) -> None:
        far = anchored(PAIR, guide=([-9.0, 0.0, 0.0], [9.0, 0.0]))
        stopped = slopes("tgdpo", {"beta": 0.6, "alpha": 0.5}, [far])
        assert stopped[0][0] == stopped[1][0] == 0
        assert stopped[0][1] < 0 < stopped[1][1]
        held = slopes("tgdpo", {"beta": 0.6, "alpha": 0.5, "floor": 0.25}, [far])
        assert held[0][0] / held[0][1] == pytest.approx(0.25, abs=1e-14)
        assert held[1][0] / held[1][1] == pytest.approx(0.25, abs=1e-14)

    def test_tokens_at_the_floor_are_counted(self) -> None:
        far = anchored(PAIR, guide=([-9.0, 0.0, 0.0], [9.0, 0.0]))
        measured = make_method("tgdpo", {"beta": 0.6}).measure(make_bare_view("pairs", [far, self.ROW]))
        assert [(float(a), b) for a, b in measured.values()] == [(2.0, 10.0)]

    def test_the_guides_rewards_have_no_gradient(self) -> None:
        assert not gradients_of_anchors("tgdpo", self.ROW)

    def test_the_guide_is_not_optional(self) -> None:
        with pytest.raises(ConfigError, match=r"anchor\.guide"):
            values("tgdpo", {}, pairs=[PAIR])


class TestTREG:
    BETTER, WORSE = ([0.7, -0.4, 3.0], [0.9, -0.6]), ([0.1, 0.6, -2.0], [0.2, 0.8])
    ROW = anchored(PAIR, better=BETTER, worse=WORSE)
    R = tuple([s(b - w) - 0.5 for b, w in zip(*own, strict=True)] for own in zip(BETTER, WORSE, strict=True))

    @pytest.mark.parametrize("equal", [True, False])
    def test_without_token_rewards_it_is_dpo(self, equal: bool) -> None:
        row = anchored(PAIR, better=self.BETTER, worse=self.BETTER) if equal else self.ROW
        ours = values("t_reg", {"beta": 0.6, **({} if equal else {"alpha": 0.0})}, pairs=[row])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)
        assert values("t_reg", {"beta": 0.6}, pairs=[self.ROW])[0] != pytest.approx(ours[0], abs=1e-4)

    def test_every_token_has_dpos_gradient_times_a_factor(self) -> None:
        """So the weight of the token term has no gradient of its own."""
        alpha, beta = 0.5, 0.6
        found = slopes("t_reg", {"beta": beta, "alpha": alpha}, [self.ROW])
        plain = slopes("dpo", {"beta": beta}, [PAIR])
        np.testing.assert_allclose(found[0] / plain[0], 1 + alpha * np.array(self.R[0]), atol=1e-13)
        np.testing.assert_allclose(found[1] / plain[1], 1 - alpha * np.array(self.R[1]), atol=1e-13)

    def test_up_to_alpha_2_no_sign_turns(self) -> None:
        sure = anchored(PAIR, better=([-50.0, 0, 0], [50.0, 0]), worse=([0.0, 0, 0], [0.0, 0]))
        for alpha, sign in ((1.99, -1), (2.01, 1)):
            chosen, rejected = slopes("t_reg", {"beta": 0.6, "alpha": alpha}, [sure])
            assert np.sign(chosen[0]) == sign
            assert np.sign(rejected[0]) == -sign

    def test_the_token_term_vanishes_on_solved_pairs(self) -> None:
        solved = {"chosen": one(-1.0, ref=[-900.0]), "rejected": one(-900.0, ref=[-1.0])}
        row = anchored(solved, better=([3.0], [3.0]), worse=([0.0], [0.0]))
        found = terms("t_reg", {"beta": 0.6, "alpha": 0.5}, pairs=[row])
        assert abs(float(found["token_reward"].values)) < 1e-12
        wrong = terms("t_reg", {"beta": 0.6}, pairs=[{**row, "chosen": row["rejected"], "rejected": row["chosen"]}])
        assert abs(float(wrong["token_reward"].values)) > 1

    def test_the_term_is_a_sum_with_beta_inside(self) -> None:
        found = terms("t_reg", {"beta": 0.6, "alpha": 0.5}, pairs=[self.ROW])
        reg = sum(np.dot(r, PAIR[part]["logp"]) for r, part in zip(self.R, ("chosen", "rejected"), strict=True))
        assert float(found["token_reward"].values) == pytest.approx(-0.6 * s(-0.6 * Z) * reg, abs=1e-14)
        assert found["token_reward"].scale == 0.5

    def test_token_rewards_have_no_gradient(self) -> None:
        assert not gradients_of_anchors("t_reg", self.ROW)

    def test_its_prompts_are_what_the_tokeniser_asks_with(self) -> None:
        assert make_method("t_reg", {"better_prompt": "+{prompt}", "worse_prompt": "-{prompt}"}).contexts() == {
            "better": "+{prompt}",
            "worse": "-{prompt}",
        }


def marked(pair: Row, chosen: str, rejected: str, kl: float = 0.0) -> Row:
    """The pair with marks written as `x` and `.`."""
    made = {}
    for part, marks in (("chosen", chosen), ("rejected", rejected)):
        drift = [kl * (i + 1) for i in range(len(marks))]
        made[part] = {**pair[part], "marked": [mark == "x" for mark in marks], "kl_ref_policy": drift}
    return made


class TestRRPO:
    def test_all_tokens_marked_and_alpha_zero_is_dpo(self) -> None:
        ours = values("rrpo", {"beta": 0.6, "alpha": 0}, pairs=[marked(PAIR, "xxx", "xx", kl=0.3)])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)

    def test_only_marked_tokens_have_a_gradient_from_the_margin(self) -> None:
        found = slopes("rrpo", {"beta": 0.6, "alpha": 0.5}, [marked(PAIR, "x.x", ".x", kl=0.3)])
        u = 0.6 * (H["chosen"][0] + H["chosen"][2] - H["rejected"][1])
        np.testing.assert_allclose(found[0], np.array([-1, 0, -1]) * 0.6 * s(-u), atol=1e-14)
        chosen_kl, rejected, rejected_kl = found[1:]
        np.testing.assert_allclose(chosen_kl, 0.5, atol=1e-14)  # every token of the chosen one, marked or not
        np.testing.assert_allclose(rejected, np.array([0, 1]) * 0.6 * s(-u), atol=1e-14)
        assert not rejected_kl.any()

    def test_value_at_the_reference(self) -> None:
        still = {part: {**PAIR[part], "logp": PAIR[part]["ref_logp"]} for part in PAIR}
        assert values("rrpo", {}, pairs=[marked(still, "x..", ".x")])[0] == pytest.approx(LOG2, abs=1e-14)

    def test_the_kl_is_a_sum_over_the_chosen_response(self) -> None:
        row = marked(PAIR, "x..", "..", kl=0.3)
        more = values("rrpo", {"alpha": 0.5}, pairs=[row]) - values("rrpo", {"alpha": 0}, pairs=[row])
        assert more[0] == pytest.approx(0.5 * 0.3 * (1 + 2 + 3), abs=1e-14)

    def test_numbers_of_segments_need_not_match(self) -> None:
        u = 0.6 * (H["chosen"][0] + H["chosen"][2])
        found = values("rrpo", {"beta": 0.6}, pairs=[marked(PAIR, "x.x", "..")])
        assert found[0] == pytest.approx(-math.log(s(u)), abs=1e-14)

    def test_a_pair_without_marks_is_dropped_and_counted(self) -> None:
        rows = [marked(PAIR, "...", "..", kl=0.3), marked(PAIR, "x..", "..", kl=0.3)]
        found = terms("rrpo", {"alpha": 0.5}, pairs=rows)
        alone = terms("rrpo", {"alpha": 0.5}, pairs=rows[1:])
        assert found.counts == alone.counts == {"preference": 1, "kl": 1}
        assert float(found.total()) == pytest.approx(float(alone.total()), abs=1e-14)
        measured = make_method("rrpo").measure(make_bare_view("pairs", rows))
        assert [(float(a), b) for a, b in measured.values()] == [(1.0, 2.0)]


class TestLDDPO:
    LONG = {"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}  # noqa: RUF012

    def test_alpha_one_is_dpo(self) -> None:
        ours = values("ld_dpo", {"beta": 0.6, "alpha": 1}, pairs=[PAIR])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)

    def test_alpha_zero_ignores_the_tail(self) -> None:
        found = slopes("ld_dpo", {"beta": 0.6, "alpha": 0}, [PAIR])
        assert found[0][2] == 0
        assert found[0][:2].all() and found[1].all()
        cut = {**PAIR, "chosen": one(-0.3, -1.2, ref=[-0.5, -1.0])}
        ours = values("ld_dpo", {"beta": 0.6, "alpha": 0}, pairs=[PAIR])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[cut]), atol=1e-14)

    def test_only_the_longer_responses_tail_is_weighed(self) -> None:
        for swap in (False, True):
            pair = {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]} if swap else PAIR
            longer, shorter = slopes("ld_dpo", {"beta": 0.6, "alpha": 0.25}, [pair])[:: -1 if swap else 1]
            np.testing.assert_allclose(longer / longer[0], [1, 1, 0.25], atol=1e-14)
            np.testing.assert_allclose(shorter / shorter[0], [1, 1], atol=1e-14)

    def test_equal_lengths_are_dpo_and_unscored_tokens_have_no_length(self) -> None:
        unscored = {**PAIR["chosen"], "mask": [True, False, True]}
        row = {**PAIR, "chosen": unscored}
        for alpha in (0.0, 0.4):
            ours = values("ld_dpo", {"beta": 0.6, "alpha": alpha}, pairs=[row])
            np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[row]), atol=1e-14)

    def test_value_at_the_reference(self) -> None:
        """The tail is weighed in the reference too."""
        still = {part: {**PAIR[part], "logp": PAIR[part]["ref_logp"]} for part in PAIR}
        assert values("ld_dpo", {"alpha": 0.3}, pairs=[still])[0] == pytest.approx(LOG2, abs=1e-14)


def peaked(pair: Row, name: str, chosen: float, rejected: float) -> Row:
    """The pair with log-probabilities above `name` (log sum pi^2 or log max pi) by a number per token."""
    made = {}
    for part, above in (("chosen", chosen), ("rejected", rejected)):
        made[part] = {**pair[part], name: [p - above for p in pair[part]["logp"]]}
    return made


class TestWPO:
    @pytest.mark.parametrize("alignment", ["sampled", "greedy"])
    def test_weight(self, alignment: str) -> None:
        name = {"sampled": "log_sum_sq", "greedy": "log_max"}[alignment]
        options = {"beta": 0.6, "alignment": alignment}
        base = values("dpo", {"beta": 0.6}, pairs=[PAIR])
        uniform = values("wpo", options, pairs=[peaked(PAIR, name, 0.0, 0.0)])
        np.testing.assert_allclose(uniform, base, atol=1e-14)
        found = values("wpo", options, pairs=[peaked(PAIR, name, -0.7, -0.2)])
        np.testing.assert_allclose(found, math.exp(-0.9) * base, atol=1e-14)  # means over tokens, not sums

    def test_a_uniform_distribution_of_any_size_weighs_one(self) -> None:
        for vocabulary in (2, 50_000):
            logp = -math.log(vocabulary)
            row = {part: {**one(logp, logp), "log_sum_sq": [logp, logp]} for part in PAIR}
            assert values("wpo", {}, pairs=[row])[0] == pytest.approx(LOG2, abs=1e-12)

    def test_the_weight_is_cut_at_the_clamp(self) -> None:
        base = values("dpo", {"beta": 0.6}, pairs=[PAIR])
        row = peaked(PAIR, "log_sum_sq", 0.5, 0.4)
        for clamp, weight in ((1.0, 1.0), (1.5, 1.5), (None, math.exp(0.9))):
            found = values("wpo", {"beta": 0.6, "clamp": clamp}, pairs=[row])
            np.testing.assert_allclose(found, weight * base, atol=1e-13)

    def test_without_alignment_it_is_the_geometric_mean_of_the_tokens(self) -> None:
        found = values("wpo", {"beta": 0.6, "alignment": "none"}, pairs=[PAIR])
        weight = math.exp(-1.9 / 3 - 1.0 / 2)
        np.testing.assert_allclose(found, weight * values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)

    def test_the_weight_has_no_gradient(self) -> None:
        found = slopes("wpo", {"beta": 0.6}, [peaked(PAIR, "log_sum_sq", -0.7, -0.2)])
        plain = slopes("dpo", {"beta": 0.6}, [PAIR])
        np.testing.assert_allclose(found[0], math.exp(-0.9) * plain[0], atol=1e-14)
        np.testing.assert_allclose(found[2], math.exp(-0.9) * plain[1], atol=1e-14)
        assert not found[1].any() and not found[3].any()

    def test_off_policy_pairs_weigh_less(self) -> None:
        near, far = (peaked(PAIR, "log_sum_sq", -d, -d) for d in (0.1, 2.0))
        first, second = values("wpo", {}, pairs=[near, far])
        assert second < 0.1 * first

    def test_the_weights_mean_is_logged(self) -> None:
        rows = [peaked(PAIR, "log_sum_sq", -0.7, -0.2), peaked(PAIR, "log_sum_sq", 0.0, -0.4)]
        total, count = make_method("wpo").measure(make_bare_view("pairs", rows))["wpo/weight"]
        assert (float(total), count) == (pytest.approx(math.exp(-0.9) + math.exp(-0.4), abs=1e-12), 2)

    def test_columns_by_alignment(self) -> None:
        wpo = METHODS.get("wpo")
        assert wpo().requires() == {"ref_logp", "log_sum_sq"}
        assert wpo(alignment="greedy").requires() == {"ref_logp", "log_max"}
        assert wpo(alignment="none").requires() == {"ref_logp"}


class TestCPL:
    S = {"plain": (-1.9, -1.0), "kl": (0.5, 0.1)}  # noqa: RUF012

    @pytest.mark.parametrize("form", ["plain", "kl"])
    def test_two_sums_and_a_softmax(self, form: str) -> None:
        """-log e^{a S_w} / (e^{a S_w} + e^{lambda a S_l})"""
        win, lose = (0.7 * total for total in self.S[form])
        found = values("cpl", {"alpha": 0.7, "lambda": 0.4, "form": form}, pairs=[PAIR])
        expected = -math.log(math.exp(win) / (math.exp(win) + math.exp(0.4 * lose)))
        assert found[0] == pytest.approx(expected, abs=1e-14)

    def test_lambda_one_with_a_reference_is_dpo(self) -> None:
        ours = values("cpl", {"alpha": 0.6, "lambda": 1, "form": "kl"}, pairs=[PAIR])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)

    def test_lambda_one_without_reference_is_dpo_of_a_uniform_one(self) -> None:
        """That is cpo's preference term."""
        bare = {part: {**PAIR[part], "ref_logp": [0.0] * len(PAIR[part]["logp"])} for part in PAIR}
        ours = values("cpl", {"alpha": 0.6, "lambda": 1}, pairs=[PAIR])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[bare]), atol=1e-14)

    def test_value_at_the_reference(self) -> None:
        still = {part: {**PAIR[part], "logp": PAIR[part]["ref_logp"]} for part in PAIR}
        assert values("cpl", {"form": "kl"}, pairs=[still])[0] == pytest.approx(LOG2, abs=1e-14)

    def test_lowering_both_sums_is_free_only_at_lambda_one(self) -> None:
        lowered = {
            part: {**PAIR[part], "logp": [PAIR[part]["logp"][0] - 2.0, *PAIR[part]["logp"][1:]]} for part in PAIR
        }
        first, second = values("cpl", {"lambda": 1}, pairs=[PAIR, lowered])
        assert first == pytest.approx(second, abs=1e-14)
        first, second = values("cpl", {"lambda": 0.5}, pairs=[PAIR, lowered])
        assert second > first + 0.01

    def test_slopes(self) -> None:
        found = slopes("cpl", {"alpha": 0.7, "lambda": 0.4}, [PAIR])
        margin = 0.7 * (-1.9 + 0.4 * 1.0)
        np.testing.assert_allclose(found[0], -0.7 * s(-margin), atol=1e-14)
        np.testing.assert_allclose(found[1], 0.7 * 0.4 * s(-margin), atol=1e-14)

    def test_an_even_label_is_the_average_of_both_directions(self) -> None:
        swapped = {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
        even = values("cpl", {}, pairs=[{**PAIR, "probability": 0.5}, {**swapped, "probability": 0.5}])
        both = values("cpl", {}, pairs=[PAIR, swapped])
        np.testing.assert_allclose(even, both.mean(), atol=1e-14)
        assert both[0] != pytest.approx(both[1], abs=1e-3)

    def test_discount_counts_turns_from_the_segments_first(self) -> None:
        steps = {"chosen": {**PAIR["chosen"], "step": [2, 2, 3]}, "rejected": {**PAIR["rejected"], "step": [0, 1]}}
        ours = values("cpl", {"lambda": 1, "alpha": 1, "gamma": 0.5}, pairs=[steps])
        assert ours[0] == pytest.approx(-math.log(s(-0.3 - 1.2 - 0.2 + 0.8 + 0.1)), abs=1e-14)
        tokens = values("cpl", {"lambda": 1, "alpha": 1, "gamma": 0.5, "discount": "token"}, pairs=[steps])
        assert tokens[0] == pytest.approx(-math.log(s(-0.3 - 0.6 - 0.1 + 0.8 + 0.1)), abs=1e-14)
        flat = values("cpl", {"gamma": 0.5}, pairs=[PAIR])  # one turn
        np.testing.assert_allclose(flat, values("cpl", {}, pairs=[PAIR]), atol=1e-14)

    def test_turns_and_tokens_count_from_the_first_that_is_scored(self) -> None:
        late = {"step": [0, 2, 2, 3], "mask": [False, True, True, True]}
        row = {
            "chosen": {**one(-9.0, -0.3, -1.2, -0.4), **late},
            "rejected": {**PAIR["rejected"], "step": [5, 6]},
        }
        for discount, exponents in (("turn", (0, 0, 1)), ("token", (0, 1, 2))):
            options = {"lambda": 1, "alpha": 1, "gamma": 0.5, "discount": discount}
            total = np.dot([-0.3, -1.2, -0.4], [0.5**k for k in exponents])
            found = values("cpl", options, pairs=[row])
            assert found[0] == pytest.approx(-math.log(s(total + 0.8 + 0.1)), abs=1e-14)

    def test_per_token_alpha(self) -> None:
        found = values("cpl", {"normalize": "token", "lambda": 1, "alpha": 0.9}, pairs=[PAIR])
        assert found[0] == pytest.approx(-math.log(s(0.9 * (-1.9 / 3 + 1.0 / 2))), abs=1e-14)

    def test_imitation(self) -> None:
        base = values("cpl", {}, pairs=[PAIR])
        chosen = values("cpl", {"bc_weight": 0.3}, pairs=[PAIR])
        both = values("cpl", {"bc_weight": 0.3, "bc_on": "both"}, pairs=[PAIR])
        assert chosen[0] - base[0] == pytest.approx(0.3 * 1.9 / 3, abs=1e-14)
        assert both[0] - base[0] == pytest.approx(0.3 * (1.9 / 3 + 0.5) / 2, abs=1e-14)

    def test_the_first_steps_only_imitate(self) -> None:
        options = {"bc_steps": 2, "bc_weight": 0.3}
        late = values("cpl", {"bc_weight": 0.3}, pairs=[PAIR])[0]
        state: dict[str, Any] = {}
        found = []
        for _ in range(4):
            made = terms("cpl", options, pairs=[PAIR], state=state)
            state = dict(made.state)
            found.append(float(made.total()))
        np.testing.assert_allclose(found, [1.9 / 3, 1.9 / 3, late, late], atol=1e-14)
        assert not METHODS.get("cpl")().initial_state()


def valued(value: list[float], reward: list[float], **more: Any) -> Row:
    return {"logp": [-1.0] * len(reward), "value": value, "token_reward": reward, **more}


class TestRegretPref:
    OPTIONS = {"form": "value", "kappa": 0.7, "value_weight": 0.0}  # noqa: RUF012

    def margin(self, chosen: Row, rejected: Row) -> float:
        """The difference of the sums of advantages, out of the loss."""
        found = values("regret_pref", self.OPTIONS, pairs=[{"chosen": chosen, "rejected": rejected}])[0]
        return -math.log(math.expm1(found)) / 0.7

    def test_policy_form_is_dpo_with_kappa_times_beta(self) -> None:
        ours = values("regret_pref", {"kappa": 2.0, "beta": 0.3}, pairs=[PAIR])
        np.testing.assert_allclose(ours, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)

    def test_finished_answers_to_one_prompt_are_the_partial_return_model(self) -> None:
        """Only V(s_0) is left of the values, and it is the same number."""
        chosen, rejected = valued([0.4, 2.0, -1.0], [0.1, 0.9]), valued([0.4, 3.0, 8.0, 5.0], [0.0, 0.0, -0.7])
        assert self.margin(chosen, rejected) == pytest.approx(1.0 + 0.7, abs=1e-12)

    def test_cut_segments_count_the_state_they_end_in(self) -> None:
        chosen = valued([0.4, 2.0, -1.0], [0.1, 0.9], finished=False)
        rejected = valued([0.4, 3.0, 8.0, 5.0], [0.0, 0.0, -0.7], finished=False)
        assert self.margin(chosen, rejected) == pytest.approx(1.0 - 1.0 + 0.7 - 5.0, abs=1e-12)

    def test_it_is_minus_the_regret(self) -> None:
        """regret = V(s_0) - (sum r + V(s_T)), also where the segments start in different states."""
        chosen, rejected = valued([0.4, 2.0], [0.1], finished=False), valued([1.9, 3.0, 8.0], [0.5, 0.2])
        regrets = 0.4 - (0.1 + 2.0), 1.9 - 0.7
        assert self.margin(chosen, rejected) == pytest.approx(regrets[1] - regrets[0], abs=1e-12)

    def test_potential_shaping_changes_nothing(self) -> None:
        """r + Phi(s') - Phi(s), V - Phi, Phi(end) = 0; partial returns of cut segments change."""
        phi = [0.3, -1.2, 0.8]
        chosen, rejected = valued([0.4, 2.0, -1.0], [0.1, 0.9], finished=False), valued([0.4, 1.5], [0.6])
        moved = valued(
            [v - p for v, p in zip(chosen["value"], phi, strict=True)],
            [0.1 + phi[1] - phi[0], 0.9 + phi[2] - phi[1]],
            finished=False,
        )
        also = valued([0.4 - phi[0], 1.5], [0.6 - phi[0]])
        assert self.margin(moved, also) == pytest.approx(self.margin(chosen, rejected), abs=1e-12)
        assert sum(moved["token_reward"]) - sum(also["token_reward"]) != pytest.approx(1.0 - 0.6, abs=0.1)

    def test_values_learn_from_their_successors_alone(self) -> None:
        row = {"chosen": valued([0.4, 2.0, -1.0], [0.1, 0.9], finished=False), "rejected": valued([0.4, 1.5], [0.6])}
        found = terms("regret_pref", {"form": "value"}, pairs=[row])["value"]
        errors = [0.4 - 2.1, 2.0 - (0.9 - 1.0)]
        expected = (errors[0] ** 2 + errors[1] ** 2) / 4 + (0.4 - 0.6) ** 2 / 2
        assert float(found.values) == pytest.approx(expected, abs=1e-14)
        chosen, rejected = (
            a - b
            for a, b in zip(
                slopes("regret_pref", {"form": "value", "value_weight": 1.0}, [row])[1::2],
                slopes("regret_pref", {"form": "value", "value_weight": 0.0}, [row])[1::2],
                strict=True,
            )
        )
        np.testing.assert_allclose(chosen, [errors[0] / 2, errors[1] / 2, 0], atol=1e-14)
        np.testing.assert_allclose(rejected, [0.4 - 0.6, 0], atol=1e-14)

    def test_columns_by_form(self) -> None:
        cls = METHODS.get("regret_pref")
        assert cls().requires() == {"ref_logp"}
        assert cls(form="value").requires() == {"token_reward", "value", "finished"}


DEMONSTRATION = PAIR["chosen"]
KINDS = ("tv", "chi2", "rkl", "hellinger", "js")


class TestSFTFDiv:
    @pytest.mark.parametrize("level", ["token", "sequence"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_value_and_slope_at_the_reference(self, kind: str, level: str) -> None:
        options = {"kind": kind, "level": level, "beta": 0.7}
        still = {**DEMONSTRATION, "logp": DEMONSTRATION["ref_logp"]}
        assert float(terms("sft_fdiv", options, demonstrations=[still]).total()) == 0
        (found,) = slopes("sft_fdiv", options, [still])
        np.testing.assert_allclose(found, -0.7 / (3 if level == "token" else 1), atol=1e-14)

    def test_tv_is_sft_for_every_beta_up_to_scale(self) -> None:
        (plain,) = slopes("sft", {}, [DEMONSTRATION])
        for beta in (0.3, 2.0):
            (found,) = slopes("sft_fdiv", {"kind": "tv", "beta": beta}, [DEMONSTRATION])
            np.testing.assert_allclose(found, beta * plain, atol=1e-14)

    def test_chi2_stops_at_2_and_pulls_back(self) -> None:
        for ratio, sign in ((3.9, -1), (4.0, 0), (4.1, 1)):
            (found,) = slopes("sft_fdiv", {"kind": "chi2", "beta": 0.5}, [one(-0.1, ref=[-0.1 - ratio])])
            assert found[0] == pytest.approx(0.5 * (0.5 * ratio - 2) / 2, abs=1e-14)
            assert np.sign(round(found[0], 12)) == sign

    def test_the_weight_of_rkl_is_exponential(self) -> None:
        for ratio in (-3.0, 0.4, 2.0):
            (found,) = slopes("sft_fdiv", {"kind": "rkl", "beta": 0.5}, [one(-0.1, ref=[-0.1 - ratio])])
            assert found[0] == pytest.approx(-0.5 * math.exp(-0.5 * ratio), abs=1e-14)

    @pytest.mark.parametrize(("kind", "floor"), [("rkl", -20.0), ("hellinger", -0.9), ("js", -0.6)])
    def test_what_is_held_has_no_gradient_and_is_counted(self, kind: str, floor: float) -> None:
        row = one(-0.1, -0.1, ref=[-0.1 - floor + 0.01, -0.1 - floor - 0.01])
        (found,) = slopes("sft_fdiv", {"kind": kind}, [row])
        assert found[0] == 0 and found[1] < 0
        row = one(-0.1, -0.1, -0.5, ref=[-0.1 - floor + 0.01, -0.1 - floor - 0.01, 0.0])
        measured = make_method("sft_fdiv", {"kind": kind}).measure(make_bare_view("demonstrations", [row]))
        assert [(float(a), b) for a, b in measured.values()] == [(1.0, 3.0)]

    def test_a_reward_at_the_bound_is_not_held(self) -> None:
        row = one(-20.5, -1.0, ref=[-0.5, -0.5])
        (found,) = slopes("sft_fdiv", {"kind": "rkl"}, [row])
        assert found[0] == pytest.approx(-math.exp(20) / 2, rel=1e-12)
        measured = make_method("sft_fdiv", {"kind": "rkl"}).measure(make_bare_view("demonstrations", [row]))
        assert [(float(a), b) for a, b in measured.values()] == [(0.0, 2.0)]

    def test_a_constant_in_the_reward_cancels_for_tv_only(self) -> None:
        """L(V) = V - phi(beta h + V): V enters as a shift of the reference's log-probability."""
        found = {}
        for kind in KINDS:
            shifts = [one(-0.4, ref=[-0.7 - v]) for v in (0.0, 0.25)]
            first, second = np.asarray(terms("sft_fdiv", {"kind": kind}, demonstrations=shifts))[:, 0]
            found[kind] = abs(second + 0.25 - first) < 1e-12
        assert found == {kind: kind == "tv" for kind in KINDS}

    def test_sequence_level_takes_the_sum(self) -> None:
        found = np.asarray(terms("sft_fdiv", {"level": "sequence", "beta": 0.4}, demonstrations=[DEMONSTRATION]))
        assert found[0] == pytest.approx(-0.2 + 0.04 / 4, abs=1e-14)


def logits(q: list[float], v: list[float], **more: Any) -> Row:
    return {"logp": [a - b for a, b in zip(q, v, strict=True)], "logit": q, "logsumexp": v, **more}


class TestIQLearnSFT:
    Q, V = [1.2, -0.3, 2.0], [1.5, 0.9, 2.2]

    def total(self, row: Row, **options: Any) -> float:
        named = {name.rstrip("_"): value for name, value in options.items()}
        return float(terms("iqlearn_sft", named, demonstrations=[row]).total())

    def test_lambda_zero_is_sft(self) -> None:
        row = logits(self.Q, self.V)
        ours = self.total(row, lambda_=0)
        assert ours == pytest.approx(float(terms("sft", demonstrations=[row]).total()), abs=1e-14)

    @pytest.mark.parametrize("gamma", [1.0, 0.8])
    def test_the_second_term_is_the_mean_squared_reward(self, gamma: float) -> None:
        rewards = [1.2 - gamma * 0.9, -0.3 - gamma * 2.2, 2.0]
        row = logits(self.Q, self.V)
        more = self.total(row, lambda_=0.7, gamma=gamma) - self.total(row, lambda_=0)
        assert more == pytest.approx(0.7 * np.square(rewards).mean(), abs=1e-14)
        if gamma == 1:
            assert sum(rewards) == pytest.approx(sum(row["logp"]) + self.V[0], abs=1e-14)

    def test_a_shift_of_a_positions_logits_is_seen_by_the_square_alone(self) -> None:
        row, shifted = logits(self.Q, self.V), logits([1.2, 4.7, 2.0], [1.5, 5.9, 2.2])
        assert self.total(row, lambda_=0) == pytest.approx(self.total(shifted, lambda_=0), abs=1e-14)
        assert abs(self.total(row) - self.total(shifted)) > 0.1

    @pytest.mark.parametrize("alpha", [0.5, 2.0])
    def test_it_is_iqlearn_with_chi2_and_the_experts_values(self, alpha: float) -> None:
        """mean of -(q - v') + (v - v') + (q - v')^2 / (4 alpha), as its code adds it."""
        after = [*self.V[1:], 0.0]
        parts = [-(q - w) + (v - w) + (q - w) ** 2 / (4 * alpha) for q, v, w in zip(self.Q, self.V, after, strict=True)]
        ours = self.total(logits(self.Q, self.V), lambda_=1 / (4 * alpha))
        assert ours == pytest.approx(float(np.mean(parts)), abs=1e-14)

    def test_a_cut_response_has_no_last_square(self) -> None:
        whole, cut = (logits(self.Q, self.V, finished=end) for end in (True, False))
        assert self.total(whole) - self.total(cut) == pytest.approx(0.1 * 2.0**2 / 3, abs=1e-14)

    def test_turns_in_between_are_stepped_over(self) -> None:
        gap = logits([1.2, 9.0, -0.3, 2.0, 9.0], [1.5, 9.0, 0.9, 2.2, 9.0], mask=[True, False, True, True, False])
        assert self.total(gap) == pytest.approx(self.total(logits(self.Q, self.V)), abs=1e-14)

    def test_gradient_through_the_next_value_can_be_stopped(self) -> None:
        for detach in (False, True):
            q, v = slopes("iqlearn_sft", {"lambda": 0.5, "detach_next": detach}, [logits(self.Q, self.V)])[1:]
            rewards = np.array([1.2 - 0.9, -0.3 - 2.2, 2.0])
            np.testing.assert_allclose(q, (-1 + rewards) / 3, atol=1e-14)
            through = np.array([0.0, *rewards[:2]])
            np.testing.assert_allclose(v, (1 - (0 if detach else 1) * through) / 3, atol=1e-14)

    def test_lambda_rises_over_the_warm_up(self) -> None:
        row, state, found = logits(self.Q, self.V), {}, []
        for _ in range(4):
            made = terms("iqlearn_sft", {"warmup_steps": 3, "lambda": 0.6}, demonstrations=[row], state=state)
            state = dict(made.state)
            found.append(float(made.total()))
        expected = [self.total(row, lambda_=weight) for weight in (0.2, 0.4, 0.6, 0.6)]
        np.testing.assert_allclose(found, expected, atol=1e-14)


def later(epoch: int, epochs: int) -> dict[str, torch.Tensor]:
    told = {"epoch": epoch, "epochs": epochs}
    return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in told.items()}


class TestPSKD:
    ROWS = random_rows(METHODS.get("ps_kd")(), 6, seed=4)

    @pytest.mark.parametrize(("epoch", "share"), [(0, 0.0), (1, 0.3), (2, 0.45), (3, 0.6)])
    def test_the_share_rises_by_epoch_from_none(self, epoch: int, share: float) -> None:
        found = terms("ps_kd", {"alpha_T": 0.6}, demonstrations=self.ROWS, state=later(epoch, 4))
        expected, count = LOOPS["ps_kd"](self.ROWS, {"epoch": epoch, "epochs": 4}, alpha_T=0.6)
        assert float(found.total()) == pytest.approx(sum(expected) / count, abs=1e-12)
        soft = sum(w * row["cross_entropy"][t] for row, w, t in self.tokens())
        hard = sum(-w * row["logp"][t] for row, w, t in self.tokens())
        assert sum(expected) == pytest.approx(share * soft + (1 - share) * hard, abs=1e-12)
        view = make_bare_view("demonstrations", self.ROWS, state=later(epoch, 4))
        total, count = make_method("ps_kd", {"alpha_T": 0.6}).measure(view)["ps_kd/share"]
        assert (float(total), count) == (pytest.approx(share), 1)

    def test_it_starts_in_the_first_epoch_of_one(self) -> None:
        assert METHODS.get("ps_kd")().initial_state() == later(0, 1)

    def tokens(self) -> list[tuple[Row, float, int]]:
        return [(row, row["weight"], t) for row in self.ROWS for t, keep in enumerate(row["mask"]) if keep]

    def test_without_share_or_with_a_sure_teacher_it_is_sft(self) -> None:
        plain = float(terms("sft", demonstrations=self.ROWS).total())
        for options, state in (({"alpha_T": 0}, later(3, 4)), ({}, later(0, 4)), ({}, later(0, 1))):
            assert float(terms("ps_kd", options, demonstrations=self.ROWS, state=state).total()) == pytest.approx(plain)
        sure = [{**row, "cross_entropy": [-p for p in row["logp"]]} for row in self.ROWS]
        assert float(terms("ps_kd", demonstrations=sure, state=later(3, 4)).total()) == pytest.approx(plain, abs=1e-12)

    def test_gradient_in_the_logits_is_the_policy_minus_the_target(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        logits, other = torch.randn(2, 1, 5, dtype=torch.float64, generator=drawn)
        tile = Tile(logits.requires_grad_(), torch.tensor([2]), other)
        row = {"logp": logp(tile), "cross_entropy": cross_entropy(tile)}
        found = terms("ps_kd", {"alpha_T": 0.6}, demonstrations=[row], state=later(2, 3)).total()
        (slope,) = torch.autograd.grad(found, logits)
        target = 0.6 * other.softmax(-1) + 0.4 * torch.eye(5, dtype=torch.float64)[2]
        torch.testing.assert_close(slope, logits.softmax(-1) - target, atol=1e-14, rtol=0)

    def test_hard_tokens_shrink_and_easy_ones_keep_their_size(self) -> None:
        def slope(logits: list[float], state: dict[str, torch.Tensor]) -> float:
            at = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
            tile = Tile(at, torch.tensor([0]), at.detach())  # the policy has not moved since the epoch began
            row = {"logp": logp(tile), "cross_entropy": cross_entropy(tile)}
            found = terms("ps_kd", demonstrations=[row], state=state).total()
            return float(torch.autograd.grad(found, at)[0][0, 0])

        for logits in ([3.0, 0.0], [-3.0, 0.0]):
            ratio = slope(logits, later(1, 2)) / slope(logits, later(0, 2))
            assert ratio == pytest.approx(1 - 0.8, abs=1e-12)

    def test_what_a_later_epoch_does_passes_on_a_model(self) -> None:
        """The packed step of an epoch with soft targets equals one-sequence-at-a-time scoring."""
        method = METHODS.get("ps_kd")()
        bench = Bench(method)
        wanted_loss, wanted = golden_step(
            method, bench.roles, bench.reference, bench.groups, later(1, 2), seed=bench.seed
        )
        engine = engine_for(method, bench.roles, bench.reference, 60)
        loss, found, state = packed_step(engine, bench.accelerator, bench.groups, later(1, 2), seed=bench.seed)
        assert loss == pytest.approx(wanted_loss, abs=1e-5)
        assert relative_difference(found, wanted) < 1e-5
        assert state == later(1, 2)


def keyed(pair: Row, key: int = 7) -> Row:
    return {**pair, "chosen": {**pair["chosen"], "key": key}, "rejected": {**pair["rejected"], "key": 10**9 + key}}


class TestELR:
    def visited(self, pair: Row, times: int, **options: Any) -> dict[str, torch.Tensor]:
        """The state that visits of a pair have left."""
        state: Any = {}
        for _ in range(times):
            state = terms("elr", {"beta": 0.6, **options}, pairs=[pair], state=state).state
        return dict(state)

    @pytest.mark.parametrize(("options", "times"), [({"lambda": 0}, 0), ({"lambda": 0}, 3), ({"update": "after"}, 0)])
    def test_without_weight_or_target_it_is_dpo(self, options: dict[str, Any], times: int) -> None:
        state = self.visited(keyed(PAIR), times)
        found = np.asarray(terms("elr", {"beta": 0.6, **options}, pairs=[keyed(PAIR)], state=state))
        np.testing.assert_allclose(found, values("dpo", {"beta": 0.6}, pairs=[PAIR]), atol=1e-14)

    @pytest.mark.parametrize("times", [1, 2, 5])
    def test_the_target_is_a_running_mean_from_zero(self, times: int) -> None:
        p = s(0.6 * Z)
        target = self.visited(keyed(PAIR), times)["target"].numpy()
        np.testing.assert_allclose(target, [[(1 - 0.7**times) * p, (1 - 0.7**times) * (1 - p)]], atol=1e-14)

    def test_it_is_renewed_before_the_loss_reads_it(self) -> None:
        p = s(0.6 * Z)
        first = terms("elr", {"beta": 0.6}, pairs=[keyed(PAIR)])["elr"]
        assert float(first.values) == pytest.approx(math.log(1 - 0.3 * (p * p + (1 - p) ** 2)), abs=1e-14)
        assert first.scale == 3.0
        assert float(first.values) < 0

    def test_corrected_targets_are_the_form_of_one_number(self) -> None:
        """log(1 - t s(z) - (1 - t) s(-z)), which holds for targets that sum to 1 only."""
        state, p = self.visited(keyed(PAIR), 2), s(0.6 * Z)
        options = {"beta": 0.6, "update": "after"}
        other = {"chosen": one(-1.0, ref=[-1.5]), "rejected": one(-1.0)}
        q = s(0.6 * 0.5)
        for correct in (True, False):
            made = terms("elr", {**options, "bias_correction": correct}, pairs=[keyed(other)], state=state)["elr"]
            expected = math.log(1 - p * q - (1 - p) * (1 - q))
            assert (float(made.values) == pytest.approx(expected, abs=1e-12)) == correct

    def test_a_pair_learnt_the_other_way_is_pulled_from_its_label(self) -> None:
        other_way = {"chosen": one(-9.0, ref=[-1.0]), "rejected": one(-1.0, ref=[-9.0])}
        state = self.visited(keyed(other_way), 40)
        now = keyed({"chosen": one(-1.5, ref=[-1.0]), "rejected": one(-1.0, ref=[-1.0])})
        pull = slopes("elr", {"beta": 0.6, "lambda": 3.0}, [now], state)[0][0]
        label = slopes("dpo", {"beta": 0.6}, [now])[0][0]
        assert label < 0 < pull - label  # the label raises the chosen one, the regulariser lowers it

    def test_gradient_of_the_regulariser_without_that_of_the_target(self) -> None:
        state, p = self.visited(keyed(PAIR), 1), s(0.6 * Z)
        t = (1 - 0.7**2) * np.array([p, 1 - p])
        found = slopes("elr", {"beta": 0.6, "lambda": 2.0}, [keyed(PAIR)], state)[0]
        own = -0.6 * p * (1 - p) * 2.0 * (t[0] - t[1]) / (1 - t[0] * p - t[1] * (1 - p))
        np.testing.assert_allclose(found, -0.6 * (1 - p) + own, atol=1e-13)

    def test_bounded(self) -> None:
        sure = {"chosen": one(-1.0, ref=[-900.0]), "rejected": one(-900.0, ref=[-1.0])}
        state = self.visited(keyed(sure), 80)
        found = terms("elr", {"beta": 0.6}, pairs=[keyed(sure)], state=state)["elr"]
        np.testing.assert_allclose(state["target"], [[1 - 1e-4, 1e-4]], atol=1e-11)
        assert float(found.values) == pytest.approx(math.log(1 - (1 - 1e-4) ** 2 - 1e-8), abs=1e-6)
        assert float(found.values) >= math.log(1e-4)
        assert not slopes("elr", {"beta": 0.6}, [keyed(sure)], state)[0].any()

    def test_every_pair_has_its_own_target_whatever_the_order_and_the_batches(self) -> None:
        rows = random_rows(METHODS.get("elr")(), 9, seed=2)
        once = terms("elr", pairs=rows).state
        parts: Any = {}
        for cut in (rows[6:], rows[:2], rows[2:6]):
            parts = terms("elr", pairs=cut, state=parts).state
        assert len(once["key"]) == 9
        assert torch.equal(once["key"], once["key"].sort().values)
        assert torch.equal(once["key"], parts["key"])
        torch.testing.assert_close(once["target"], parts["target"], atol=1e-15, rtol=0)
        again = terms("elr", pairs=rows[3:5], state=once).state
        changed = (again["target"] != once["target"]).any(-1)
        assert int(changed.sum()) == 2

    def test_a_pair_met_twice_in_a_batch_has_one_target(self) -> None:
        flipped = {"chosen": one(-9.0, ref=[-1.0]), "rejected": one(-1.0)}
        state = terms("elr", {"beta": 0.6}, pairs=[keyed(PAIR), keyed(flipped), keyed(PAIR, 8)]).state
        assert len(state["key"]) == 2
        means = sorted([0.3 * (s(0.6 * Z) + s(0.6 * -8)) / 2, 0.3 * s(0.6 * Z)])
        np.testing.assert_allclose(sorted(state["target"][:, 0].tolist()), means, atol=1e-12)

    def test_pairs_of_the_same_answers_differ_by_order_and_partner(self) -> None:
        keys = [(3, 4), (4, 3), (3, 5), (2**62, 1)]
        rows = [{"chosen": {**PAIR["chosen"], "key": a}, "rejected": {**PAIR["rejected"], "key": b}} for a, b in keys]
        assert len(terms("elr", pairs=rows).state["key"]) == 4


MORE = [
    ("elr", {"bias_correction": True}),
    ("elr", {"bias_correction": True, "update": "after", "lambda": 1.0}),
    ("iqlearn_sft", {"gamma": 0.7, "warmup_steps": 4}),
    ("iqlearn_sft", {"detach_next": True, "lambda": 0.9}),
    ("regret_pref", {"form": "value", "value_weight": 0.3, "kappa": 2.0}),
    ("cpl", {"gamma": 0.7, "form": "kl"}),
    ("cpl", {"gamma": 0.7, "discount": "token", "normalize": "token"}),
    ("cpl", {"bc_steps": 2, "bc_weight": 0.4, "bc_on": "both"}),
    ("cpl", {"bc_steps": 3, "gamma": 0.5}),
    ("wpo", {"clamp": None}),
    ("wpo", {"clamp": 0.5, "alignment": "greedy"}),
    ("tgdpo", {"beta_guide": 0.8, "alpha": 3.0, "floor": 0.2}),
]


def test_the_memory_is_that_of_the_loop() -> None:
    """Rows that were met before: the loop finds their targets under the same keys."""
    method = METHODS.get("elr")()
    rows, others = random_rows(method, 6, seed=1), random_rows(method, 5, seed=2)
    state = terms(method, pairs=[*others, *rows[:4]], state=terms(method, pairs=[*rows[2:], *others[:2]]).state).state
    expected, _ = LOOPS["elr"](rows, {name: x.tolist() for name, x in state.items()})
    np.testing.assert_allclose(np.asarray(terms(method, pairs=rows, state=state)), expected, atol=1e-12)
    fresh, _ = LOOPS["elr"](rows, {})
    assert np.abs(np.array(expected) - fresh).min() > 1e-3


@pytest.mark.parametrize(
    ("name", "options"), [("cpl", {"bc_steps": 2}), ("iqlearn_sft", {"warmup_steps": 3}), ("ps_kd", {}), ("elr", {})]
)
def test_a_missing_state_is_the_first(name: str, options: dict[str, Any]) -> None:
    method = make_method(name, options)
    rows = random_rows(method, 4, seed=3)
    bare, first = (make_bare_view(method.view, rows, state=state) for state in ({}, method.initial_state()))
    for term in method.loss(first):
        assert torch.equal(method.loss(bare)[term].values, method.loss(first)[term].values)
    if name != "ps_kd":
        ours, theirs = method.observe(bare), method.observe(first)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and len(theirs) == len(ours) > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("cpl", {"normalize": "token", "gamma": 0.5}), ("wpo", {}), ("regret_pref", {"form": "value"})],
)
def test_a_completion_without_a_scored_token_is_finite(name: str, options: dict[str, Any]) -> None:
    method = make_method(name, options)
    rows = random_rows(method, 2, seed=5)
    rows[0]["chosen"]["mask"] = [False] * len(rows[0]["chosen"]["mask"])
    made, leaves = tracked(rows)
    total = evaluate(method, made).total()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in found if g is not None)


@pytest.mark.parametrize(("name", "options"), MORE, ids=[f"{name} {options}" for name, options in MORE])
def test_options_that_the_variants_leave_out_pass_the_same(name: str, options: dict[str, Any]) -> None:
    method = make_method(name, options)
    assert [str(check) for check in battery(method) if not check.ok] == []
    for seed in range(5):
        rows, state = random_rows(method, 7, seed), state_of(method, seed) if seed % 2 else method.initial_state()
        found = terms(method, **{method.view: rows}, state=state)
        names = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
        expected, count = LOOPS[name](rows, {key: x.tolist() for key, x in state.items()}, **names)
        ours = np.asarray(found)
        if ours.ndim == 2:  # the loop lists scored tokens only
            ours = ours[np.array([row["mask"] + [False] * (ours.shape[1] - len(row["mask"])) for row in rows])]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
        assert float(found.total()) == pytest.approx(sum(expected) / count, abs=1e-9)
