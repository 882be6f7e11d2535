"""RPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods.base import Method, Term, method, option
from align.methods.stages import RESPONSE_COLUMNS, logistic, nll, of_response
from align.scoring.views import Completions, Pairs


@method(
    "rpo",
    paper="2405.16436",
    view="pairs",
    needs={"ref_logp", "baseline", "samples"},
    claim=("chosen_logp", "up", "style", "dpo"),
)
class RPO(Method):
    """Regularized Preference Optimization: DPO plus SFT on a baseline response, from pessimism about the reward.

        sum:         loss = -log sigmoid(beta * (h_w - h_l)) + eta * beta * (-log pi(y_base))
        token_mean:  loss = -log sigmoid(beta * (h_w - h_l)) + eta * (-log pi(y_base) / |y_base|)

    One value per pair [P] for each term, in nats. y_base is the chosen response (the paper's experiments), the pair's
    demonstration (`sft`), or the mean over the pair's samples of a frozen policy (`samples`). Only the sum form is
    multiplied by beta, as the theory (eta of the reward's pessimism, beta of its scale) asks; at 300 tokens the four
    public conventions differ by a factor of 200 in the weight of a token. With `sum`, dL/dlog pi(y_w) =
    -beta (sigmoid(-z) + eta): never zero. Source: arXiv 2405.16436, Eq. 4.4 and App. F; not TRL's old `rpo_alpha`.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} &= -\log\sigma(\beta (h_w - h_l)) - \eta b \log\pi(y_{\mathrm{base}}) \\ "
        r"\text{sum:}\quad b &= \beta \qquad \text{token mean:}\quad b = \frac{1}{|y_{\mathrm{base}}|}"
    )
    when: ClassVar[str] = "Pick it when the chosen answers' likelihood falls under dpo: the first remedy."

    beta: float = option(0.01, above=0, doc="strength of the KL leash")
    eta: float = option(0.005, at_least=0, doc="weight of the SFT term; 0.2 is usual with token_mean")
    baseline: Literal["chosen", "sft", "samples"] = option("chosen", doc="the response that the SFT term imitates")
    sft_reduction: Literal["sum", "token_mean"] = option("sum", doc="NLL summed and times beta, or per token")

    def requires(self) -> frozenset[str]:
        return RESPONSE_COLUMNS[self.baseline] | {"ref_logp"}

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        scale = self.eta * self.beta if self.sft_reduction == "sum" else self.eta
        return {
            "preference": Term(logistic(self.beta * pairs.delta), "pair"),
            "sft": Term(of_response(pairs, self.baseline, self._nll), "pair", scale),
        }

    def _nll(self, completions: Completions) -> Tensor:
        return nll(completions, self.sft_reduction)

    def cautions(self) -> tuple[str, ...]:
        if self.sft_reduction == "sum" and self.eta > 0.1:
            return ("rpo: `eta` multiplies a sum over tokens here; above 0.1 it swamps the preferences",)
        return ()
