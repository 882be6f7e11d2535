"""Demonstration-regularised preference learning."""

from __future__ import annotations

from typing import ClassVar, Literal

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, nll, of_response
from align.scoring.views import Pairs


@method(
    "demo_reg",
    paper="2310.17303",
    view="pairs",
    needs={"ref_logp", "baseline"},
    claim=("demo_logp", "up", "style", "dpo"),
)
class DemoReg(Method):
    """Demonstration-regularised learning: dpo with the behaviour-cloned policy as reference, and demonstrations kept.

        loss = -log sigmoid(beta * (h_w - h_l)) + mu * (-log pi(y_demo)),   h = log pi / pi_BC

    One value per pair [P] for each term, in nats. A recipe more than a loss: first `sft` on the demonstrations (with
    enough smoothing that every answer keeps some mass: log-ratios need it), then this with that model as start and
    reference. The KL to pi_BC alone replaces pessimism. mu 0, the default, is dpo, and needs no demonstrations any
    more; its optimum is pi_BC exp(r / beta), which goes to pi_BC for large beta. With mu the NLL of the prompt's
    demonstration is added, summed over tokens (or per token) and not multiplied by beta: it is rpo with `baseline:
    sft` and eta = mu / beta (or eta = mu per token). The theory's beta goes with the error of the clone, about
    1 / sqrt(number of demonstrations). Source: arXiv 2310.17303, Section 4; the offline form is derived.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} &= -\log\sigma(\beta (h_w - h_l)) - \frac{\mu}{n} \log\pi(y_{\mathrm{demo}}) \\ "
        r"\text{sum:}\quad n &= 1 \qquad \text{token mean:}\quad n = |y_{\mathrm{demo}}|"
    )
    when: ClassVar[str] = (
        "Pick it when there are many demonstrations and few pairs: clone first, then stay near the clone."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL to the cloned policy, 0.05 to 0.5")
    mu: float = option(0.0, at_least=0, doc="weight of the demonstration's NLL")
    sft_reduction: Literal["sum", "token_mean"] = option("sum", doc="NLL summed, or per token")

    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp", "baseline"} if self.mu else {"ref_logp"})

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        terms = {"preference": Term(logistic(self.beta * pairs.delta), "pair")}
        if self.mu:
            imitated = of_response(pairs, "sft", lambda one: nll(one, self.sft_reduction))
            terms["sft"] = Term(imitated, "pair", self.mu)
        return terms
