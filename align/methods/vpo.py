"""VPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods.base import Method, Term, method, option
from align.methods.stages import RESPONSE_COLUMNS, logistic, of_response
from align.scoring.views import Completions, Pairs


@method(
    "vpo",
    paper="2405.19320",
    view="pairs",
    needs={"ref_logp", "baseline", "samples"},
    claim=("chosen_logp", "up", "style", "dpo"),
)
class VPO(Method):
    """Value-Incentivized Preference Optimization: the reward's likelihood with its own optimal value as regulariser.

        loss = -log sigmoid(beta * (h_w - h_l)) + sign * alpha * beta * h(y_cal)

    One value per pair [P] for each term, in nats; log 2 at the reference. h is the log-ratio summed over tokens. `sign`
    -1 is pessimism, for offline data: it raises y_cal; +1 is optimism, for rounds of new data: it lowers y_cal, without
    bound, so few steps a round. y_cal is drawn from the distribution under which the reward's mean is fixed at 0: the
    chosen response, the pair's demonstration (`sft`), or the mean over the pair's samples of a behaviour policy; the
    paper's own choice is not known here. dL/dlog pi(y_w) = -beta (sigmoid(-z) - sign * alpha) with y_w as y_cal: so
    alpha is read against sigmoid(-z), 1/2 at the reference, and with sign +1 the chosen one falls once
    z > log((1 - alpha) / alpha). alpha 0 is dpo; sign -1 with y_w is rpo of eta = alpha up to alpha * beta *
    log pi_ref(y_w); the two signs average to dpo. Source: arXiv 2405.19320, the offline objective and its online twin.
    """

    formula: ClassVar[str] = r"\mathcal{L} = -\log\sigma(\beta (h_w - h_l)) + s \alpha \beta h(y_{\mathrm{base}})"
    when: ClassVar[str] = (
        "Pick it for offline pairs as a pessimistic dpo, or with the other sign for optimism in rounds of new data."
    )

    alpha: float = option(0.01, at_least=0, doc="weight of the regulariser, 0.01 to 0.1")
    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    sign: Literal[-1, 1] = option(-1, doc="-1 pessimism (offline), +1 optimism (online)")
    baseline: Literal["chosen", "sft", "samples"] = option("chosen", doc="the calibration response y_cal")

    def requires(self) -> frozenset[str]:
        return RESPONSE_COLUMNS[self.baseline] | {"ref_logp"}

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        calibration = of_response(pairs, self.baseline, _log_ratio)
        return {
            "preference": Term(logistic(self.beta * pairs.delta), "pair"),
            "value": Term(calibration, "pair", self.sign * self.alpha * self.beta),
        }

    def cautions(self) -> tuple[str, ...]:
        if self.sign > 0:
            return (
                "vpo: `sign` 1 lowers the calibration responses without bound; it is meant for a few steps a round",
            )
        return ("vpo: `alpha` above 0.1 swamps the preferences",) if self.alpha > 0.1 else ()


def _log_ratio(completions: Completions) -> Tensor:
    return completions.sum_log_ratio
