"""XPO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Draw, Method, Rollouts, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs

REFERENCE = "reference"
"""The role of an answer that the reference wrote."""


@method("xpo", paper="2405.21046", view="pairs", needs={"ref_logp", "finished", "role"})
class XPO(Method):
    """Exploratory Preference Optimization: online DPO of an own answer against the reference's, less likely made.

        loss = -log sigmoid(beta * (h_w - h_l)) + alpha * log pi(y~)

    One value per pair [P] for each term, in nats. One answer of the pair is the present policy's, the other, y~, the
    reference's (its `role` says so), whichever won; log pi(y~) is a sum over tokens, so alpha times the length is what
    it weighs. The bonus lowers the likelihood of what the reference writes: E_ref log pi = -KL(pi_ref || pi) - H(ref),
    so it maximises the forward KL from the reference. Its expected gradient is 0 at pi = pi_ref; it has no bound. A y~
    that was cut has no bonus, for the log-prob of a beginning is not that of an answer; the pair still counts. alpha 0
    is `online_dpo` with one answer of the reference. The paper's alpha is 1e-5, 5e-6 and 0 in three rounds, over all
    data so far; here it is one step on fresh answers. Source: arXiv 2405.21046, Alg. 1.
    """

    formula: ClassVar[str] = r"\mathcal{L} = -\log\sigma(\beta (h_w - h_l)) + \alpha \phi \log\pi(y_{\mathrm{ref}})"
    when: ClassVar[str] = (
        "Pick it when good answers are rare under the reference and online DPO settles too early: it explores."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    alpha: float = option(1e-5, at_least=0, doc="weight of the optimism, in units of a sum over tokens")

    def requires(self) -> frozenset[str]:
        return self.needs if self.alpha else frozenset({"ref_logp"})

    def rollouts(self) -> Rollouts:
        return Rollouts((Draw("policy"), Draw("reference")), "preference", "pair")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        terms = {"preference": Term(logistic(self.beta * pairs.delta), "pair")}
        if self.alpha:
            terms["optimism"] = Term(_explored(pairs), "pair", self.alpha)
        return terms


def _explored(pairs: Pairs) -> Tensor:
    """log pi(y~) of each pair's answer of the reference, [P]; 0 where it was cut."""
    chosen, rejected = _by_reference(pairs.chosen), _by_reference(pairs.rejected)
    if len(chosen) != len(pairs) or chosen != [not one for one in rejected]:
        raise ConfigError(
            f"method `xpo`: not every pair has one answer whose role is `{REFERENCE}`",
            why="the bonus is on the reference's answer, and nothing else tells which one that is",
            mend="sample one answer of each, or use `online_dpo`",
        )
    return _bonus(pairs.chosen, chosen) + _bonus(pairs.rejected, rejected)


def _by_reference(completions: Completions) -> list[bool]:
    return [role == REFERENCE for role in completions.role]


def _bonus(completions: Completions, by_reference: list[bool]) -> Tensor:
    """Its log-prob where the reference wrote it to the end, else 0, [N]."""
    whole = completions.finished & torch.tensor(by_reference, device=completions.finished.device)
    return torch.where(whole, completions.sum_logp, 0.0)
