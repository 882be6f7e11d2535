"""What the papers (and a little algebra) say of the losses of online methods on pairs and of those of rounds.

Where a fact is one of expectations, every answer of a small game is enumerated with its probability: an answer is one
token, P an intransitive judge. The rows weigh the method's own loss, and the gradient is that in the policy's logits.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods import METHODS, terms
from align.methods._online import anchored, mixture
from align.methods.base import Draw, finish
from align.methods.evaluate import make_bare_view, make_method
from align.testing.rows import Row
from align.testing.token_tree import TokenTree, gradient_of, norm, own_answers, random_policy
from tests.methods.loops import h, softplus
from tests.methods.test_identities import LOG2, PAIR, Z, at_h, one, shifted, slopes, values

NEAR = {"abs": 1e-12}
JUDGE = np.array([[0.5, 0.9, 0.3, 0.95], [0.1, 0.5, 0.6, 0.55], [0.7, 0.4, 0.5, 0.55], [0.05, 0.45, 0.45, 0.5]])
REFERENCE = np.array([0.4, 0.3, 0.2, 0.1])
POLICY = np.array([0.1, 0.35, 0.25, 0.3])
PREVIOUS = np.array([0.25, 0.15, 0.35, 0.25])
FOUR = range(4)


def pair_at(chosen: float, rejected: float = 0.0, **more: Any) -> Row:
    """A pair of one token each with these log-ratios."""
    return {"chosen": at_h(chosen), "rejected": at_h(rejected), **more}


def value(name: str, options: dict[str, Any], pair: Row) -> float:
    return float(values(name, options, pairs=[pair])[0])


def slope(name: str, options: dict[str, Any], pair: Row) -> tuple[float, float]:
    """dL / dlp_w and dL / dlp_l of the first token of each."""
    chosen, rejected = slopes(name, options, [pair])[:2]
    return float(chosen[0]), float(rejected[0])


# The game


def answers(logits: Tensor, previous: np.ndarray = PREVIOUS) -> list[Row]:
    """Each answer as a completion of one token."""
    logp = logits.log_softmax(-1)
    return [
        {
            "logp": logp[i : i + 1],
            "ref_logp": [math.log(REFERENCE[i])],
            "old_logp": [math.log(previous[i])],
            "anchor": {"previous": [math.log(previous[i])]},
        }
        for i in FOUR
    ]


def drawn_pairs(own: Sequence[Row], law: np.ndarray, judge: np.ndarray = JUDGE, **more: Any) -> list[Row]:
    """Both answers drawn by `law`, the winner from the judge: 16 rows whose weights are 16 times probabilities."""
    return [
        {
            "chosen": own[i],
            "rejected": own[j],
            "weight": 16 * law[i] * law[j] * judge[i, j] * 2,
            **{name: table[i, j] for name, table in more.items()},
        }
        for i in FOUR
        for j in FOUR
    ]


def expected(name: str, options: Mapping[str, Any], rows: Callable[[Tensor], list[Row]], at: np.ndarray) -> np.ndarray:
    """Gradient of the expected loss in the logits of the policy `at`."""
    logits = torch.tensor(np.log(at), requires_grad=True)
    total = terms(name, options, **{METHODS.get(name).view: rows(logits)}).total()
    return torch.autograd.grad(total, logits)[0].numpy()


def tilted(base: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    weights = base * np.exp(exponent - exponent.max())
    return weights / weights.sum()


@functools.cache
def equilibrium(tau: float) -> np.ndarray:
    """pi* proportional to pi_ref exp(P(y > pi*) / tau), by averaged iteration."""
    pi = REFERENCE
    for step in range(40_000):
        pi = pi + (tilted(REFERENCE, JUDGE @ pi / tau) - pi) / (20 + step / 200)
    assert np.abs(pi - tilted(REFERENCE, JUDGE @ pi / tau)).max() < 1e-12
    return pi


def is_zero(gradient: np.ndarray) -> bool:
    return bool(np.abs(gradient).max() < 1e-10)


class TestOnlineDPO:
    def test_each_head_is_the_offline_method(self) -> None:
        for head, name, options in (
            ("sigmoid", "dpo", {"beta": 0.6}),
            ("ipo", "ipo", {"tau": 0.6, "normalize": "sum"}),
            ("hinge", "dpo_hinge", {"beta": 0.6}),
        ):
            online = {"beta": 0.6, "loss": head}
            assert value("online_dpo", online, PAIR) == pytest.approx(value(name, options, PAIR), **NEAR)
            assert slope("online_dpo", online, PAIR) == pytest.approx(slope(name, options, PAIR), **NEAR)

    @pytest.mark.parametrize("head", ["sigmoid", "ipo", "hinge"])
    def test_a_probability_is_the_mean_over_drawn_winners(self, head: str) -> None:
        """And turning the pair round together with P changes nothing."""
        plain, soft = {"beta": 0.6, "loss": head}, {"beta": 0.6, "loss": head, "label": "prob"}
        turned = {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
        won, lost = value("online_dpo", plain, PAIR), value("online_dpo", plain, turned)
        mean = value("online_dpo", soft, {**PAIR, "probability": 0.7})
        assert mean == pytest.approx(0.7 * won + 0.3 * lost, **NEAR)
        assert value("online_dpo", soft, {**turned, "probability": 0.3}) == pytest.approx(mean, **NEAR)
        assert value("online_dpo", soft, {**PAIR, "probability": 1.0}) == pytest.approx(won, **NEAR)
        assert abs(won - lost) > 0.01

    @pytest.mark.parametrize("label", ["hard", "sampled"])
    def test_otherwise_the_probability_is_not_read(self, label: str) -> None:
        found = [value("online_dpo", {"label": label}, {**PAIR, "probability": p}) for p in (1.0, 0.6)]
        assert found[0] == found[1] == pytest.approx(softplus(-0.1 * Z), **NEAR)

    def test_two_equal_answers_have_no_gradient_and_count(self) -> None:
        same = {"chosen": PAIR["chosen"], "rejected": PAIR["chosen"]}
        chosen, rejected = slopes("online_dpo", {}, [same, PAIR])[:2]
        np.testing.assert_allclose(chosen + rejected, 0, atol=1e-15)
        alone, beside = (slopes("online_dpo", {}, rows)[-1] for rows in ([PAIR], [same, PAIR]))
        np.testing.assert_allclose(alone, 2 * beside, atol=1e-15)

    def test_the_ipo_head_is_a_line_and_a_parabola(self) -> None:
        """-Delta + beta Delta^2 = beta IPO - 1 / (4 beta)."""
        ipo = value("online_dpo", {"beta": 0.3, "loss": "ipo"}, PAIR)
        assert 0.3 * ipo - 1 / (4 * 0.3) == pytest.approx(-Z + 0.3 * Z**2, **NEAR)

    def test_the_hinge_ends_at_its_margin(self) -> None:
        options = {"beta": 0.5, "loss": "hinge"}
        assert slope("online_dpo", options, pair_at(1.999))[0] == pytest.approx(-0.5, **NEAR)
        assert slope("online_dpo", options, pair_at(2.001)) == (0, 0)


class TestOnlineIPO:
    def test_it_is_ipo_of_sums(self) -> None:
        options = {"tau": 0.4, "normalize": "sum"}
        assert value("online_ipo", {"tau": 0.4}, PAIR) == pytest.approx(value("ipo", options, PAIR), **NEAR)

    @pytest.mark.parametrize("label", ["sampled", "prob"])
    @pytest.mark.parametrize("at", [POLICY, PREVIOUS])
    def test_its_gradient_is_four_over_tau_times_that_of_self_play(self, label: str, at: np.ndarray) -> None:
        tau = 0.3
        if label == "sampled":
            found = expected("online_ipo", {"tau": tau}, lambda logits: drawn_pairs(answers(logits), at), at)
        else:
            even = np.full((4, 4), 0.5)
            options = {"tau": tau, "label": "prob"}
            found = expected(
                "online_ipo", options, lambda logits: drawn_pairs(answers(logits), at, even, probability=JUDGE), at
            )
        own = expected("nash_md", {"tau": tau, "mix": 0.0}, lambda logits: first_answers(logits, at, at), at)
        np.testing.assert_allclose(found, 4 / tau * own, atol=1e-12)
        assert np.abs(found).max() > 0.1

    def test_it_stops_at_the_regularised_equilibrium(self) -> None:
        tau = 0.3
        star = equilibrium(tau)
        assert is_zero(expected("online_ipo", {"tau": tau}, lambda x: drawn_pairs(answers(x), star), star))
        assert not is_zero(expected("online_ipo", {"tau": 1.1 * tau}, lambda x: drawn_pairs(answers(x), star), star))

    def test_likelier_winners_are_another_game(self) -> None:
        tau = 0.3
        star = equilibrium(tau)
        likelier = (JUDGE > 0.5) + 0.5 * (JUDGE == 0.5)
        moved = expected("online_ipo", {"tau": tau}, lambda x: drawn_pairs(answers(x), star, likelier), star)
        assert np.abs(moved).max() > 0.1

    def test_two_distributions_are_another_gradient(self) -> None:
        """At the equilibrium, with the second answer the reference's: not 0."""
        star = equilibrium(0.3)

        def rows(logits: Tensor) -> list[Row]:
            own, first = answers(logits), {"law": star}
            return [
                {
                    "chosen": own[i if won else j],
                    "rejected": own[j if won else i],
                    "weight": 32 * first["law"][i] * REFERENCE[j] * (JUDGE[i, j] if won else JUDGE[j, i]),
                }
                for i in FOUR
                for j in FOUR
                for won in (True, False)
            ]

        assert np.abs(expected("online_ipo", {"tau": 0.3}, rows, star)).max() > 0.01

    def test_of_a_mixture_it_stops_where_the_mixture_is_the_equilibrium(self) -> None:
        """The mixture pi^(1-m) ref^m is the equilibrium of temperature tau / (1 - m)."""
        tau, mix = 0.2, 0.4
        mixed = equilibrium(tau / (1 - mix))
        policy = (mixed / REFERENCE**mix) ** (1 / (1 - mix))
        policy /= policy.sum()
        options = {"tau": tau, "mix": mix}
        assert is_zero(expected("online_ipo", options, lambda x: drawn_pairs(answers(x), mixed), policy))
        assert not is_zero(expected("online_ipo", options, lambda x: drawn_pairs(answers(x), policy), policy))


def first_answers(logits: Tensor, law: np.ndarray, opponent: np.ndarray, judge: np.ndarray = JUDGE) -> list[Row]:
    """Singles drawn by `law`, rewarded with the probability of beating a draw of `opponent`."""
    wins = judge @ opponent
    return [{**row, "reward": wins[i], "weight": 4 * law[i]} for i, row in enumerate(answers(logits))]


class TestNashMD:
    def test_a_token_answers_for_the_log_ratios_from_itself_on(self) -> None:
        """The slope in log pi(y_t) is c_t, an unscored token counting for nothing."""
        row = one(-0.3, -9.0, -1.2, -0.4, ref=[-0.5, -1.0, -1.0, -0.9], mask=[True, False, True, True], reward=0.8)
        (found,) = slopes("nash_md", {"tau": 0.5}, [row])
        ahead = [0.2 - 0.2 + 0.5, 0.0, -0.2 + 0.5, 0.5]
        wanted = [0.5 - 0.8 + 0.5 * ahead[t] if t != 1 else 0.0 for t in range(4)]
        np.testing.assert_allclose(found, wanted, atol=1e-12)

    def test_the_value_is_a_surrogate(self) -> None:
        row = one(-0.3, -1.2, ref=[-0.5, -1.0], reward=0.8)
        c = [-0.3 + 0.5 * (0.2 - 0.2), -0.3 + 0.5 * -0.2]
        found = values("nash_md", {"tau": 0.5}, singles=[row])
        assert float(found[0]) == pytest.approx(c[0] * -0.3 + c[1] * -1.2, **NEAR)

    def test_tau_zero_reads_no_reference(self) -> None:
        row = {"logp": [-0.3, -1.2], "reward": 0.8}
        assert make_method("nash_md", {"tau": 0.0}).requires() == {"reward"}
        np.testing.assert_allclose(slopes("nash_md", {"tau": 0.0}, [row])[0], [-0.3, -0.3], atol=1e-12)
        with pytest.raises(ConfigError, match="ref_logp"):
            values("nash_md", {}, singles=[row])

    @pytest.mark.parametrize("opponent", [POLICY, REFERENCE])
    def test_it_stops_where_its_objective_does(self, opponent: np.ndarray) -> None:
        """Its gradient is that of -(P(pi > pi') - tau KL(pi || pi_ref)); the best response has none."""
        tau = 0.4
        logits = torch.tensor(np.log(PREVIOUS), requires_grad=True)
        pi, wins = logits.softmax(-1), torch.tensor(JUDGE @ opponent)
        kl = (pi * (pi.log() - torch.tensor(np.log(REFERENCE)))).sum()
        wanted = torch.autograd.grad(-(pi * wins).sum() + tau * kl, logits)[0].numpy()
        options = {"tau": tau}
        found = expected("nash_md", options, lambda x: first_answers(x, PREVIOUS, opponent), PREVIOUS)
        np.testing.assert_allclose(found, wanted, atol=1e-12)
        best = tilted(REFERENCE, JUDGE @ opponent / tau)
        assert is_zero(expected("nash_md", options, lambda x: first_answers(x, best, opponent), best))

    def test_self_play_stops_at_the_regularised_equilibrium(self) -> None:
        star = equilibrium(0.3)
        options = {"tau": 0.3, "mix": 0.0}
        assert is_zero(expected("nash_md", options, lambda x: first_answers(x, star, star), star))
        assert not is_zero(expected("nash_md", options, lambda x: first_answers(x, POLICY, POLICY), POLICY))

    def test_a_half_has_no_expected_gradient(self) -> None:
        """The baseline: with every P raised by the same, the expected gradient stays."""
        rows = [first_answers, lambda x, law, other: first_answers(x, law, other, JUDGE + 0.25)]
        found = [expected("nash_md", {}, lambda x, row=row: row(x, POLICY, REFERENCE), POLICY) for row in rows]
        np.testing.assert_allclose(found[0], found[1], atol=1e-12)

    def test_the_objective_of_several_tokens_and_what_a_tokens_own_log_ratio_misses(self) -> None:
        """On all leaves of a tree, drawn by the policy: with the log-ratios ahead, or all of them, the gradient is
        that of -(P(pi > ref) - tau KL); with a token's own it misses tau E[sum_t (those after t) grad log pi_t]."""
        tau, tree = 0.3, TokenTree.random(1)
        policy = random_policy(tree, 2).tracked()
        view = own_answers(tree, policy)
        ratio, centre = view.completions.log_ratio.detach(), (0.5 - view.completions.reward)[:, None]
        ahead = ratio.flip(-1).cumsum(-1).flip(-1)

        def credited(coefficient: Tensor) -> list[Tensor]:
            own = own_answers(tree, policy).completions
            return gradient_of((own.weight[:, None] / len(own) * coefficient * own.logp).sum(), policy)

        logp, ref = tree.leaf_logp(policy), tree.leaf_logp(tree.reference)
        objective = -(logp.exp() * view.completions.reward).sum() + tau * (logp.exp() * (logp - ref)).sum()
        wanted = gradient_of(objective, policy)
        view = own_answers(tree, policy)
        ours = gradient_of(finish(make_method("nash_md", {"tau": tau}).loss(view), view).total(), policy)
        alone, missing = credited(centre + tau * ratio), credited(tau * (ahead - ratio))
        completed = [a + b for a, b in zip(alone, missing, strict=True)]
        for found in (ours, credited(centre + tau * ratio.sum(-1, keepdim=True)), completed):
            assert norm([a - b for a, b in zip(found, wanted, strict=True)]) < 1e-12
        assert norm(missing) > 0.01 * norm(wanted)


class TestXPO:
    EXPLORED = one(-0.8, -0.2, ref=[-0.6, -0.5], role="reference", finished=True)
    OWN = one(-0.3, -1.2, -0.4, ref=[-0.5, -1.0, -0.9], role="policy", finished=True)
    OPTIONS = {"beta": 0.6, "alpha": 0.2}  # noqa: RUF012

    def test_alpha_zero_is_online_dpo_and_needs_no_roles(self) -> None:
        assert value("xpo", {"beta": 0.6, "alpha": 0.0}, PAIR) == pytest.approx(softplus(-0.6 * Z), **NEAR)
        assert make_method("xpo", {"alpha": 0.0}).requires() == {"ref_logp"}
        assert list(terms("xpo", {"alpha": 0.0}, pairs=[PAIR])) == ["preference"]

    @pytest.mark.parametrize(("chosen", "rejected"), [(EXPLORED, OWN), (OWN, EXPLORED)])
    def test_the_references_answer_is_made_less_likely_whichever_won(self, chosen: Row, rejected: Row) -> None:
        pair = {"chosen": chosen, "rejected": rejected}
        preference, push = value("online_dpo", {"beta": 0.6}, pair), slope("online_dpo", {"beta": 0.6}, pair)
        found = terms("xpo", self.OPTIONS, pairs=[pair])
        assert float(found.total()) == pytest.approx(preference + 0.2 * -1.0, **NEAR)
        pushed = slope("xpo", self.OPTIONS, pair)
        bonus = [0.2 if side["role"] == "reference" else 0.0 for side in (chosen, rejected)]
        assert [b - a for a, b in zip(push, pushed, strict=True)] == pytest.approx(bonus, **NEAR)

    def test_a_cut_answer_has_no_bonus_and_counts(self) -> None:
        cut = {"chosen": {**self.EXPLORED, "finished": False}, "rejected": self.OWN}
        whole = {"chosen": self.EXPLORED, "rejected": self.OWN}
        own_cut = {"chosen": self.EXPLORED, "rejected": {**self.OWN, "finished": False}}
        found = terms("xpo", self.OPTIONS, pairs=[cut, whole, own_cut])
        np.testing.assert_allclose(found["optimism"].values, [0.0, -1.0, -1.0], atol=1e-12)
        assert found.counts["optimism"] == 3
        for pair in (cut, {"chosen": self.OWN, "rejected": cut["chosen"]}):
            assert float(terms("xpo", self.OPTIONS, pairs=[pair])["optimism"].values[0]) == 0

    @pytest.mark.parametrize("roles", [("policy", "policy"), ("reference", "reference"), ("", "")])
    def test_one_of_the_answers_is_the_references(self, roles: tuple[str, str]) -> None:
        pair = {side: {**self.OWN, "role": role} for side, role in zip(("chosen", "rejected"), roles, strict=True)}
        with pytest.raises(ConfigError, match="role is `reference`"):
            values("xpo", {}, pairs=[pair])

    def test_the_bonus_is_the_forward_kl_and_level_at_the_reference(self) -> None:
        """E_ref log pi = -KL(ref || pi) - H(ref): 0 slope at the reference, down with every step away from it."""

        def bonus(pi: np.ndarray) -> tuple[float, np.ndarray]:
            logits = torch.tensor(np.log(pi), requires_grad=True)
            own = answers(logits)
            rows = [
                {
                    "chosen": {**own[i], "role": "reference", "finished": True},
                    "rejected": {**own[0], "role": "policy", "finished": True},
                    "weight": 4 * REFERENCE[i],
                }
                for i in FOUR
            ]
            term = terms("xpo", {"alpha": 1.0}, pairs=rows)["optimism"].values.mean()
            return float(term.detach()), torch.autograd.grad(term, logits)[0].numpy()

        entropy = -float((REFERENCE * np.log(REFERENCE)).sum())
        kl = float((REFERENCE * np.log(REFERENCE / POLICY)).sum())
        assert bonus(POLICY)[0] == pytest.approx(-kl - entropy, **NEAR)
        assert is_zero(bonus(REFERENCE)[1]) and not is_zero(bonus(POLICY)[1])


class TestREBEL:
    OLD = {side: {**row, "old_logp": row["ref_logp"]} for side, row in PAIR.items()}  # noqa: RUF012

    def test_the_residual_squared_and_its_slopes(self) -> None:
        pair = {**self.OLD, "margin": 0.7}
        residual = Z - 2.0 * 0.7
        assert value("rebel", {"eta": 2.0}, pair) == pytest.approx(residual**2, **NEAR)
        assert slope("rebel", {"eta": 2.0}, pair) == pytest.approx((2 * residual, -2 * residual), **NEAR)

    def test_it_compares_with_the_policy_that_sampled_and_not_with_the_reference(self) -> None:
        pair = {"chosen": {"logp": [-1.0], "old_logp": [-1.3]}, "rejected": {"logp": [-0.4], "old_logp": [-0.9]}}
        assert value("rebel", {}, {**pair, "margin": 0.5}) == pytest.approx((0.3 - 0.5 - 0.5) ** 2, **NEAR)

    def test_in_a_round_the_reference_is_the_policy_that_sampled(self) -> None:
        """Nothing is sampled then, and `old_logp` is not asked for: with pairs of a file it would be the policy's."""
        method = make_method("rebel", {"anchor": "reference"})
        assert method.rollouts() is None and method.requires() == {"ref_logp", "margin"}
        far = {side: {**row, "old_logp": [9.0] * len(row["logp"])} for side, row in PAIR.items()}
        for pair in (PAIR, far):
            found = value("rebel", {"anchor": "reference", "eta": 2.0}, {**pair, "margin": 0.7})
            assert found == pytest.approx((Z - 2.0 * 0.7) ** 2, **NEAR)

    def test_rewards_of_a_half_are_ipo_to_the_old_policy(self) -> None:
        ipo = value("ipo", {"tau": 1 / (2 * 0.8), "normalize": "sum"}, PAIR)
        assert value("rebel", {"eta": 0.8}, {**self.OLD, "margin": 1.0}) == pytest.approx(ipo, **NEAR)

    def test_one_exponential_step_has_loss_zero_and_one_newton_step_leads_there(self) -> None:
        """Rewards plus a constant are the same rewards."""
        eta, rewards = 1.3, np.array([0.3, -1.0, 0.8, 0.1])
        gaps = rewards[:, None] - rewards

        def rows(logits: Tensor) -> list[Row]:
            even = np.full((4, 4), 0.5)
            return drawn_pairs(answers(logits), PREVIOUS, even, margin=gaps)

        stepped = tilted(PREVIOUS, eta * rewards)
        total = terms("rebel", {"eta": eta}, pairs=rows(torch.tensor(np.log(stepped)))).total()
        assert float(total) < 1e-24

        def loss(logits: Tensor) -> Tensor:
            return terms("rebel", {"eta": eta}, pairs=rows(logits)).total()

        start = torch.tensor(np.log(PREVIOUS))
        hessian = torch.autograd.functional.hessian(loss, start).numpy()
        slope_there = expected("rebel", {"eta": eta}, rows, PREVIOUS)
        newton = np.log(PREVIOUS) - np.linalg.pinv(hessian, rcond=1e-9) @ slope_there
        np.testing.assert_allclose(np.exp(newton) / np.exp(newton).sum(), stepped, atol=1e-9)

    def test_pairs_without_a_margin_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="margin"):
            values("rebel", {}, pairs=[self.OLD])
        view = make_bare_view("pairs", [self.OLD])
        with pytest.raises(ConfigError, match="`rebel`: some pairs have no `margin`"):
            make_method("rebel").loss(view)


class TestSPPO:
    def test_zero_at_the_target_and_the_residual_is_the_slope(self) -> None:
        options = {"eta": 4.0}
        there = {"chosen": at_h(4.0 * 0.3, reward=0.8), "rejected": at_h(4.0 * -0.4, reward=0.1)}
        assert value("sppo", options, there) == pytest.approx(0, **NEAR)
        off = {"chosen": at_h(1.5, reward=0.8), "rejected": at_h(0.2, reward=0.1)}
        assert value("sppo", options, off) == pytest.approx((0.3**2 + 1.8**2) / 2, **NEAR)
        assert slope("sppo", options, off) == pytest.approx((0.3, 1.8), **NEAR)

    def test_each_answer_is_by_itself(self) -> None:
        pair = {"chosen": at_h(1.5, reward=0.8), "rejected": at_h(0.2, reward=0.1)}
        other = {**pair, "rejected": at_h(-3.0, reward=0.4)}
        assert slope("sppo", {}, pair)[0] == pytest.approx(slope("sppo", {}, other)[0], abs=1e-9)

    def test_a_constant_on_both_changes_it_and_not_dpo(self) -> None:
        pair = {side: {**row, "reward": 0.6} for side, row in PAIR.items()}
        moved = {side: shifted(row, -0.5) for side, row in pair.items()}
        assert abs(value("sppo", {"eta": 2.0}, pair) - value("sppo", {"eta": 2.0}, moved)) > 0.1
        assert value("dpo", {}, pair) == pytest.approx(value("dpo", {}, moved), **NEAR)

    def test_the_minimiser_is_multiplicative_weights_up_to_a_constant(self) -> None:
        """With P(y > pi_t) of all answers, the log-ratio of the best table differs from eta P by a constant."""
        eta, wins = 2.0, JUDGE @ REFERENCE
        best = [at_h(eta * (win - 0.5), reward=win) for win in wins]
        rows = [{"chosen": one, "rejected": other} for one in best for other in best]
        np.testing.assert_allclose(values("sppo", {"eta": eta}, pairs=rows), 0, atol=1e-24)
        assert float(REFERENCE @ wins) == pytest.approx(0.5, **NEAR)

    @pytest.mark.parametrize("k", [2, 5])
    def test_counting_oneself_among_the_opponents_shrinks_the_step(self, k: int) -> None:
        """Win rates among K samples with the answer itself at 1/2 are those without it, (K - 1) / K as far from 1/2."""
        without = 0.9
        among = (0.5 + (k - 1) * without) / k
        shrunk = {"chosen": at_h(0.0, reward=among), "rejected": at_h(0.0, reward=0.5)}
        pure = {"chosen": at_h(0.0, reward=without), "rejected": at_h(0.0, reward=0.5)}
        smaller = value("sppo", {"eta": 3.0 * (k - 1) / k}, pure)
        assert value("sppo", {"eta": 3.0}, shrunk) == pytest.approx(smaller, **NEAR)

    def test_without_rewards_it_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="reward"):
            values("sppo", {}, pairs=[PAIR])


def with_previous(row: Row, previous: list[float]) -> Row:
    return {**row, "anchor": {"previous": previous}}


BOTH = {
    "chosen": with_previous(PAIR["chosen"], [-0.4, -0.7, -0.6]),
    "rejected": with_previous(PAIR["rejected"], [-0.9, -0.1]),
}
FROM_PREVIOUS = (-1.9 + 1.7) - (-1.0 + 1.0)
"""The pair's difference of log-ratios to the previous iterate."""
TO_PREVIOUS = {side: {**row, "ref_logp": row["anchor"]["previous"]} for side, row in BOTH.items()}


class TestAnchor:
    def test_weights_sum_to_one_and_the_ends_read_one_policy(self) -> None:
        view: Any = make_bare_view("pairs", [BOTH])
        own, previous = h(BOTH["chosen"]), -1.9 + 1.7
        for weight in (0.0, 0.3, 1.0):
            found = float(anchored(view.chosen, weight)[0])
            assert found == pytest.approx((1 - weight) * own + weight * previous, **NEAR)
        bare: Any = make_bare_view("pairs", [PAIR])
        assert float(anchored(bare.chosen, 0.0)[0]) == pytest.approx(own, **NEAR)
        without = {side: {"logp": row["logp"], "anchor": row["anchor"]} for side, row in BOTH.items()}
        only: Any = make_bare_view("pairs", [without])
        assert float(anchored(only.chosen, 1.0)[0]) == pytest.approx(previous, **NEAR)

    def test_what_has_no_weight_is_not_asked_for(self) -> None:
        asked = {
            ("inpo", "tau", 0.0): {"anchor.previous"},
            ("inpo", "tau", 0.001): {"ref_logp", "anchor.previous"},
            ("alpha_spin", "alpha", 0.0): {"anchor.previous"},
            ("alpha_spin", "alpha", 1.0): {"ref_logp"},
            ("alpha_spin", "alpha", 0.5): {"ref_logp", "anchor.previous"},
        }
        for (name, option, number), columns in asked.items():
            assert make_method(name, {option: number}).requires() == columns


class TestINPO:
    OPTIONS = {"eta": 0.5, "tau": 0.2}  # noqa: RUF012

    def test_the_first_loss(self) -> None:
        same = {side: with_previous(one(-0.4, -0.9), [-0.4, -0.9]) for side in ("chosen", "rejected")}
        assert value("inpo", {"eta": 0.01, "tau": 0.004}, same) == pytest.approx(1 / (4 * 0.01**2), abs=1e-9)

    def test_the_margin_weighs_reference_and_previous(self) -> None:
        margin = 0.4 * Z + 0.6 * FROM_PREVIOUS
        assert value("inpo", self.OPTIONS, BOTH) == pytest.approx((margin - 1.0) ** 2, **NEAR)
        assert slope("inpo", self.OPTIONS, BOTH) == pytest.approx((2 * (margin - 1), -2 * (margin - 1)), **NEAR)

    def test_tau_zero_is_ipo_to_the_previous_iterate(self) -> None:
        ipo = value("ipo", {"tau": 0.5, "normalize": "sum"}, TO_PREVIOUS)
        assert value("inpo", {"eta": 0.5, "tau": 0.0}, BOTH) == pytest.approx(ipo, **NEAR)
        bare = {side: {"logp": row["logp"], "anchor": row["anchor"]} for side, row in BOTH.items()}
        assert value("inpo", {"eta": 0.5, "tau": 0.0}, bare) == pytest.approx(ipo, **NEAR)

    @pytest.mark.parametrize("eta", [0.25, 0.5, 2.0])
    def test_the_exact_step_is_the_minimiser_and_the_equilibrium_stays(self, eta: float) -> None:
        """pi_{t+1} ~ exp(P(y > pi_t) / eta) ref^(tau / eta) pi_t^(1 - tau / eta); the fixed point for every eta."""
        tau, star = 0.2, equilibrium(0.2)
        options = {"eta": eta, "tau": tau}

        def rows(logits: Tensor, law: np.ndarray) -> list[Row]:
            return drawn_pairs(answers(logits, law), law)

        for law in (PREVIOUS, star):
            stepped = tilted(REFERENCE ** (tau / eta) * law ** (1 - tau / eta), JUDGE @ law / eta)
            assert is_zero(expected("inpo", options, lambda x, law=law: rows(x, law), stepped))
            moved = 0.01 if law is star else 0.0
            assert (np.abs(stepped - law).max() < 1e-10) == bool(moved)
        assert not is_zero(expected("inpo", options, lambda x: rows(x, PREVIOUS), PREVIOUS))

    def test_the_loss_is_a_constant_away_from_a_regression_on_win_rates(self) -> None:
        """Over drawn pairs and labels: E[(h - 1/(2 eta))^2] - E[(h - (P_i - P_j) / eta)^2] is the same for all pi."""
        eta, tau, wins = 0.5, 0.2, JUDGE @ PREVIOUS
        gaps = []
        for pi in (POLICY, REFERENCE, PREVIOUS):
            rows = drawn_pairs(answers(torch.tensor(np.log(pi)), PREVIOUS), PREVIOUS)
            m = np.log(pi) - tau / eta * np.log(REFERENCE) - (1 - tau / eta) * np.log(PREVIOUS)
            residual = (m[:, None] - m) - (wins[:, None] - wins) / eta
            regression = float((np.outer(PREVIOUS, PREVIOUS) * residual**2).sum())
            gaps.append(float(terms("inpo", {"eta": eta, "tau": tau}, pairs=rows).total()) - regression)
        assert gaps == pytest.approx([gaps[0]] * 3, abs=1e-10)

    def test_eta_zero_is_outside_its_range(self) -> None:
        with pytest.raises(ConfigError, match=r"`eta` is 0(\.0)?, outside its range"):
            make_method("inpo", {"eta": 0.0, "tau": 0.0})

    def test_tau_at_eta_is_refused_and_says_why(self) -> None:
        with pytest.raises(ConfigError, match="weight 1 - tau / eta of the previous iterate would be <= 0") as caught:
            make_method("inpo", {"eta": 0.01, "tau": 0.01})
        assert "0.00333" in caught.value.mend and "`tau` is 0.01 and `eta` 0.01" in str(caught.value)


class TestDNO:
    def test_it_is_soft_dpo_on_margins(self) -> None:
        pair = {**PAIR, "margin": 0.9}
        soft = value("soft_dpo", {"beta": 0.6, "label": "margin"}, pair)
        assert value("dno", {"eta": 0.6}, pair) == pytest.approx(soft, **NEAR)

    def test_turning_the_pair_round_with_its_margin_changes_nothing(self) -> None:
        turned = {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"], "margin": -0.9}
        there = value("dno", {"eta": 0.6}, {**PAIR, "margin": 0.9})
        assert there == pytest.approx(value("dno", {"eta": 0.6}, turned), **NEAR)
        assert abs(there - value("dno", {"eta": 0.6}, {**turned, "margin": 0.9})) > 0.01

    def test_large_margins_make_it_the_practical_one(self) -> None:
        practical = value("dno_prct", {"eta": 0.6, "sft_weight": 0.0}, PAIR)
        assert value("dno", {"eta": 0.6}, {**PAIR, "margin": 60.0}) == pytest.approx(practical, **NEAR)

    def test_least_where_the_margin_is_the_reward_difference(self) -> None:
        for side in (-0.01, 0.0, 0.01):
            chosen, _ = slope("dno", {"eta": 0.5}, pair_at(0.9 / 0.5 + side, margin=0.9))
            assert np.sign(round(chosen, 12)) == np.sign(side)

    def test_ties_are_read(self) -> None:
        """Equal rewards pull the two answers together, where the others leave ties out."""
        assert "ties" in make_method("dno").requires() and "ties" not in make_method("dno_prct").requires()
        assert slope("dno", {"eta": 0.5}, pair_at(1.0, margin=0.0))[0] > 0.05

    def test_the_minimiser_is_the_tilted_previous_iterate(self) -> None:
        """eta is a temperature."""
        eta, rewards = 0.7, JUDGE @ REFERENCE
        gaps = rewards[:, None] - rewards
        stepped = tilted(REFERENCE, rewards / eta)
        even = np.full((4, 4), 0.5)
        rows = lambda logits: drawn_pairs(answers(logits), POLICY, even, margin=gaps)  # noqa: E731
        assert is_zero(expected("dno", {"eta": eta}, rows, stepped))
        assert not is_zero(expected("dno", {"eta": 1.1 * eta}, rows, stepped))

    def test_pairs_without_a_margin_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="`dno`: some pairs have no `margin`"):
            make_method("dno").loss(make_bare_view("pairs", [PAIR]))


class TestDNOPrct:
    def test_it_is_dpo_and_a_little_sft_per_token(self) -> None:
        found = terms("dno_prct", {"eta": 0.6, "sft_weight": 0.3}, pairs=[PAIR])
        dpo = value("dpo", {"beta": 0.6}, PAIR)
        assert float(found.total()) == pytest.approx(dpo + 0.3 * 1.9 / 3, **NEAR)
        push, pushed = slope("dpo", {"beta": 0.6}, PAIR), slope("dno_prct", {"eta": 0.6, "sft_weight": 0.3}, PAIR)
        assert pushed == pytest.approx((push[0] - 0.1, push[1]), **NEAR)

    def test_the_contrast_has_no_finite_minimiser(self) -> None:
        found = [value("dno_prct", {"sft_weight": 0.0}, pair_at(x)) for x in (0.0, 10.0, 100.0, 300.0)]
        assert all(a > b > 0 for a, b in itertools.pairwise(found))


class TestAlphaSPIN:
    def test_the_ends_are_spin_and_dpo(self) -> None:
        spin, dpo = value("spin", {"lambda": 0.6}, TO_PREVIOUS), value("dpo", {"beta": 0.6}, PAIR)
        assert value("alpha_spin", {"beta": 0.6, "alpha": 0.0}, BOTH) == pytest.approx(spin, **NEAR)
        assert value("alpha_spin", {"beta": 0.6, "alpha": 1.0}, PAIR) == pytest.approx(dpo, **NEAR)
        assert abs(spin - dpo) > 0.01

    def test_two_leashes_are_one_with_a_mixed_anchor(self) -> None:
        """lambda_1 to the previous iterate and lambda_2 to the first model: beta is their sum, alpha a share."""
        first, second = 0.5, 0.2
        margin = first * FROM_PREVIOUS + second * Z
        options = {"beta": first + second, "alpha": second / (first + second)}
        assert value("alpha_spin", options, BOTH) == pytest.approx(softplus(-margin), **NEAR)

    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_the_exact_step_and_its_fixed_point(self, alpha: float) -> None:
        """pi_t^(1-alpha) pi_0^alpha (data / pi_t)^(1/beta), fixed at (data pi_0^(ab))^(1 / (1 + ab))."""
        beta, data = 1.5, POLICY
        options = {"beta": beta, "alpha": alpha}

        def rows(logits: Tensor, law: np.ndarray) -> list[Row]:
            own = answers(logits, law)
            return [{"chosen": own[i], "rejected": own[j], "weight": 16 * data[i] * law[j]} for i in FOUR for j in FOUR]

        fixed = (data * REFERENCE ** (alpha * beta)) ** (1 / (1 + alpha * beta))
        fixed /= fixed.sum()
        for law in (PREVIOUS, fixed):
            stepped = law ** (1 - alpha) * REFERENCE**alpha * (data / law) ** (1 / beta)
            stepped /= stepped.sum()
            assert is_zero(expected("alpha_spin", options, lambda x, law=law: rows(x, law), stepped))
            assert (np.abs(stepped - law).max() < 1e-12) == (law is fixed)
        assert (np.abs(fixed - data).max() < 1e-12) == (alpha == 0)


# What they ask the trainer for


def test_what_each_wants_sampled_and_judged() -> None:
    two = (Draw("policy", 2),)
    for label in ("hard", "sampled", "prob"):
        for name in ("online_dpo", "online_ipo"):
            wanted = make_method(name, {"label": label}).rollouts()
            assert (wanted.draws, wanted.feedback, wanted.select, wanted.label) == (two, "preference", "pair", label)
            assert not wanted.ratio
            assert make_method(name, {"label": label}).requires() == (
                {"ref_logp", "probability", "ties"} if label == "prob" else {"ref_logp"}
            )
    assert make_method("online_dpo").label == "hard" and make_method("online_ipo").label == "sampled"
    xpo = make_method("xpo").rollouts()
    assert (xpo.draws, xpo.feedback, xpo.select) == ((Draw("policy"), Draw("reference")), "preference", "pair")
    nash = make_method("nash_md", {"mix": 0.3}).rollouts()
    assert nash.draws == (Draw("policy", 1), Draw("mixture", 1, mix=0.3))
    assert (nash.feedback, nash.select) == ("preference", "first")
    rebel = make_method("rebel").rollouts()
    assert (rebel.draws, rebel.feedback, rebel.select, rebel.ratio) == (two, "reward", "pair", True)
    assert rebel.label == "prob", "a tie is a pair with a target: it must stay"
    assert [name for name in ("sppo", "inpo", "dno", "dno_prct", "alpha_spin") if make_method(name).rollouts()] == []


def test_a_mixture_with_one_weight_is_one_policy() -> None:
    assert mixture(0.0, 2) == Draw("policy", 2) and mixture(1.0, 2) == Draw("reference", 2)
    assert mixture(0.4, 2) == Draw("mixture", 2, mix=0.4)
    assert make_method("online_ipo", {"mix": 0.4}).rollouts().draws == (Draw("mixture", 2, mix=0.4),)
    assert make_method("nash_md", {"mix": 0.0}).rollouts().draws == (Draw("policy", 1), Draw("policy", 1))


def test_first_losses() -> None:
    same = {side: {**one(-0.4, -0.9), "reward": 0.5, "old_logp": [-0.4, -0.9]} for side in ("chosen", "rejected")}
    assert value("online_dpo", {}, same) == pytest.approx(LOG2, **NEAR)
    assert value("online_ipo", {"tau": 0.2}, same) == pytest.approx(1 / (4 * 0.2**2), **NEAR)
    assert value("rebel", {}, {**same, "margin": 0.0}) == 0
    assert value("sppo", {}, same) == 0
    assert value("dno", {}, {**same, "margin": 2.0}) == pytest.approx(LOG2, **NEAR)
