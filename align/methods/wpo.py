"""WPO."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs, wide

PEAKS = {"sampled": "log_sum_sq", "greedy": "log_max"}


@method(
    "wpo",
    paper="2406.11827",
    view="pairs",
    needs={"ref_logp", "log_sum_sq", "log_max"},
    claim=("gold_reward", "up", "style"),
)
class WPO(Method):
    """Weighted Preference Optimization: dpo's loss of a pair times how likely the policy is to write the pair.

        log w(y) = (1/|y|) sum_t (log pi(y_t) - a_t),   W = min(w(y_w) w(y_l), clamp), no gradient
        a_t = log sum_v pi(v)^2 (sampled), log max_v pi(v) (greedy), 0 (none)
        loss = -W log sigmoid(beta * (h_w - h_l))

    One value per pair [P], in nats; W log 2 at the reference. `sampled` compares a token with the mean probability of
    what the policy samples, so uniform distributions give w = 1. W above 1 is cut, as in the authors' code and unlike
    TRL's, which multiplies without a clamp (`clamp: null` here). The loss of off-policy pairs is small, and shrinks:
    compare runs by reward, not by loss. Source: arXiv 2406.11827, Eqs. 3 to 5, and the authors' code.
    """

    formula: ClassVar[str] = (
        r"\omega(y) &= \frac{1}{|y|} \sum_t (\log\pi(y_t) - a_t(y)) \qquad W = \operatorname{sg}[\min(e^{\omega(y_w) "
        r"+ \omega(y_l)}, W_{\max})] \\ "
        r"\mathcal{L} &= -W \log\sigma(\beta (h_w - h_l)) \\ "
        r"\text{sampled:}\quad a_t(y) &= \log\sum_v \pi(v)^2 \qquad \text{greedy:}\quad a_t(y) = \log\max_v \pi(v) "
        r"\qquad \text{none:}\quad a_t(y) = 0"
    )
    when: ClassVar[str] = (
        "Pick it when the answers come from other models: pairs that the policy would hardly write count less."
    )

    beta: float = option(0.01, above=0, doc="strength of the KL leash")
    alignment: Literal["sampled", "greedy", "none"] = option("sampled", doc="what a token's probability is compared to")
    clamp: float | None = option(1.0, above=0, doc="largest weight of a pair; null: none")

    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp", *([PEAKS[self.alignment]] if self.alignment in PEAKS else [])})

    def loss(self, pairs: Pairs) -> Tensor:
        return self._weight(pairs) * logistic(self.beta * pairs.delta)

    def _weight(self, pairs: Pairs) -> Tensor:
        log_weight = (self._mean(pairs.chosen) + self._mean(pairs.rejected)).detach()
        return (log_weight if self.clamp is None else log_weight.clamp(max=math.log(self.clamp))).exp()

    def _mean(self, completions: Completions) -> Tensor:
        surprise = wide(completions.logp)
        if self.alignment in PEAKS:
            surprise = surprise - wide(completions.column(PEAKS[self.alignment]))
        return completions.sum(surprise) / completions.length.clamp(min=1)

    def measure(self, pairs: Pairs) -> dict[str, tuple[Tensor, float]]:
        return {"wpo/weight": (self._weight(pairs).sum(), float(len(pairs)))}
