"""DNO-Prct."""

from __future__ import annotations

from typing import ClassVar

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, nll
from align.scoring.views import Pairs


@method("dno_prct", paper="2404.03715", view="pairs", needs={"ref_logp"})
class DNOPrct(Method):
    """DNO in practice: contrast in rounds against the previous iterate, with a little SFT on the better answer.

        loss = -log sigmoid(eta * (h_w - h_l)) + sft_weight * (-log pi(y_w) / |y_w|),   h = log pi - log pi_t

    One value per pair [P] for each term, in nats; log 2 and the weighted NLL at pi = pi_t. The reference is the policy
    as the round began. Without SFT it is dpo with that reference and beta = eta: no finite minimiser. What makes it DNO
    is how pairs are made: five own answers and a teacher's for each prompt, scored in points by a judge; a winner of at
    least 5 points and 2 ahead (1, where it is the policy's own); at most 30 % of the round before and 15 % of the one
    before that mixed in; one epoch. The paper prints the SFT weight and not its form: here the mean over tokens.
    Source: arXiv 2404.03715, Alg. 2 and its configuration.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} = -\log\sigma(\eta (h_w - h_l)) - \frac{w_{\mathrm{sft}}}{|y_w|} \log\pi(y_w)"
    )
    when: ClassVar[str] = "Pick it for rounds with a judge that gives points and a stronger model's answers."

    eta: float = option(0.1, above=0, doc="temperature: beta of dpo against the previous iterate")
    sft_weight: float = option(0.005, at_least=0, doc="weight of the NLL per token of the better answer")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        return {
            "preference": Term(logistic(self.eta * pairs.delta), "pair"),
            "sft": Term(nll(pairs.chosen, "token_mean"), "pair", self.sft_weight),
        }
