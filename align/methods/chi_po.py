"""chi-PO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import capped_exp, logistic
from align.scoring.views import Completions, Pairs


@method("chi_po", paper="2407.13399", view="pairs", needs={"ref_logp"}, claim=("kl", "down", "style", "dpo"))
class ChiPO(Method):
    """Chi-squared Preference Optimization: f-DPO with chi2 + KL and a clipped margin; pessimistic by itself.

        loss = -log sigmoid(clip(beta * (phi(u_w) - phi(u_l)), -2 R_max, 2 R_max))
        phi(u) = u + gamma * log u,   u = pi / pi_ref = e^h

    One value per pair [P], in nats; log 2 at the reference. h is the log-ratio to the reference summed over tokens.
    d phi / dh = e^h + gamma: above the reference a response pulls exponentially, below only linearly. The slope at the
    reference is (1 + gamma) times dpo's. For rewards within [0, R] the optimum beta phi(u) = r - lambda(x) has
    e^{-R / (gamma beta)} <= u <= 1 + R / beta: some u is at least 1 and some at most 1, so lambda lies between -beta
    and R - beta; the cap on the ratio is linear in R / beta where KL's is exponential, and that is the pessimism.

    A pair whose margin is clipped has no gradient, badly fitted ones among them: `clipped` is their share. The exponent
    of u stops at `max_exponent`, above which only gamma * h pulls (`clamped` is the share); a lower stop, as some clip
    the log-ratio at -88, changes no float32 number. Not XPO. Source: arXiv 2407.13399, Algorithm 1.
    """

    formula: ClassVar[str] = (
        r"\phi(h) &= e^h + \gamma h \qquad m = \beta (\phi(h_w) - \phi(h_l)) \\ "
        r"\mathcal{L} &= -\log\sigma(\operatorname{clip}(m, -2 R_{\max}, 2 R_{\max}))"
    )
    when: ClassVar[str] = (
        "Pick it for many epochs on pairs that cover little, where dpo would drift far from the reference."
    )

    beta: float = option(0.05, above=0, doc="strength of the regulariser; 0.05 and 0.005 in the paper")
    R_max: float = option(1.0, above=0, doc="range of the reward, about 1 to 2; the margin is clipped at twice that")
    gamma: float = option(1.0, above=0, at_most=1, doc="weight of the KL part beside chi2")
    max_exponent: float = option(20.0, above=0, at_most=80, doc="where the exponent of u stops")

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self._margin(pairs).clamp(-2 * self.R_max, 2 * self.R_max))

    def implicit_reward(self, completions: Completions) -> Tensor:
        h = completions.sum_log_ratio
        return self.beta * (capped_exp(h, self.max_exponent) + self.gamma * h)

    def measure(self, view: Pairs) -> Mapping[str, tuple[Tensor, float]]:
        count, high = float(len(view)), self.max_exponent
        clamped = (view.chosen.sum_log_ratio > high).sum() + (view.rejected.sum_log_ratio > high).sum()
        clipped = (self._margin(view).abs() > 2 * self.R_max).sum()
        return {"clipped": (clipped, count), "clamped": (clamped, 2 * count)}

    def _margin(self, pairs: Pairs) -> Tensor:
        return self.implicit_reward(pairs.chosen) - self.implicit_reward(pairs.rejected)
