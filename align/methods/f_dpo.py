"""f-DPO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.core.errors import ConfigError
from align.methods.base import Method, method, option
from align.methods.stages import capped_exp, logistic
from align.scoring.views import Completions, Pairs

ALPHA = 0.5
CAP = 80.0


@method("f_dpo", paper="2309.16240", view="pairs", needs={"ref_logp"}, claim=("entropy", "up", "style", "dpo"))
class FDPO(Method):
    """DPO under another f-divergence: Bradley-Terry on beta * f'(u), u = pi / pi_ref = e^h.

        loss = -log sigmoid(beta * phi(h_w) - beta * phi(h_l)),   phi(h) = f'(e^h) up to a constant
        reverse_kl:  phi = h                                 forward_kl:  phi = -exp(-h)
        js:          phi = log 2 + log sigmoid(h)            alpha:       phi = (1 - exp(-alpha * h)) / alpha
        chi2_kl:     phi = exp(h) + h

    One value per pair [P], in nats; log 2 at the reference for every f. h is the log-ratio to the reference summed over
    tokens. At the optimum beta f'(pi / pi_ref) = r - lambda(x): differences of rewards are recovered exactly. Near the
    reference the slope is beta f''(1): js is dpo of half the beta, chi2_kl of twice, the others of the same. js stops
    pulling a chosen response up (phi <= log 2) and is linear below; forward_kl and alpha punish a response that falls
    below the reference exponentially, so they need a smaller beta (the authors sweep to 1e-5).

    An f whose f'(0+) is finite (pure chi2, total variation, squared Hellinger) has no such optimum and is not offered.
    Exponents stop at 80, where float32 still holds them; `clamped` is the share of responses beyond, which have no
    gradient through it. TRL's `f_alpha_divergence_coef` is 1 - alpha. Source: arXiv 2309.16240.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} &= -\log\sigma(\beta \phi(h_w) - \beta \phi(h_l)) \\ "
        r"\text{js:}\quad \phi(h) &= \log 2 + \log\sigma(h) \\ "
        r"\text{reverse kl:}\quad \phi(h) &= h \\ "
        r"\text{forward kl:}\quad \phi(h) &= -e^{-h} \\ "
        r"\text{alpha:}\quad \phi(h) &= \frac{1 - e^{-\alpha h}}{\alpha} \\ "
        r"\text{chi2 kl:}\quad \phi(h) &= e^h + h"
    )
    when: ClassVar[str] = (
        "Pick it when diversity matters beside reward: another divergence than the reverse KL holds the policy."
    )

    beta: float = option(0.1, above=0, doc="strength of the leash; smaller for forward_kl and alpha")
    divergence: Literal["js", "reverse_kl", "forward_kl", "alpha", "chi2_kl"] = option("js", doc="the f that anchors")
    alpha: float = option(ALPHA, at_least=0, at_most=1, doc="of `alpha`, between the bounds: to 0 dpo, to 1 forward_kl")

    def check(self) -> None:
        if self.alpha in (0, 1):
            limit = "forward_kl" if self.alpha else "reverse_kl"
            raise ConfigError(
                f"method `f_dpo`: `alpha` is {self.alpha!r}, outside its range",
                mend=f"use a value > 0 and < 1, or the limit itself: `divergence: {limit}`",
            )

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.implicit_reward(pairs.chosen) - self.implicit_reward(pairs.rejected))

    def implicit_reward(self, completions: Completions) -> Tensor:
        return self.beta * self._link(completions.sum_log_ratio)

    def measure(self, view: Pairs) -> Mapping[str, tuple[Tensor, float]]:
        sign = {"forward_kl": -1.0, "alpha": -self.alpha, "chi2_kl": 1.0}.get(self.divergence, 0.0)
        ratios = torch.cat([view.chosen.sum_log_ratio, view.rejected.sum_log_ratio])
        return {"clamped": ((sign * ratios > CAP).sum(), float(len(ratios)))} if sign else {}

    def _link(self, h: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return -capped_exp(-h, CAP)
        if self.divergence == "js":
            return math.log(2.0) + logsigmoid(h)
        if self.divergence == "alpha":
            return -torch.expm1((-self.alpha * h).clamp(max=CAP)) / self.alpha
        return capped_exp(h, CAP) + h if self.divergence == "chi2_kl" else h

    def cautions(self) -> tuple[str, ...]:
        said = []
        if self.divergence in ("forward_kl", "alpha") and self.beta >= 0.1:
            said.append(f"f_dpo: `{self.divergence}` needs a `beta` below 0.1; the authors sweep down to 1e-5")
        if self.divergence != "alpha" and self.alpha != ALPHA:
            said.append(f"f_dpo: `alpha` is not read with `divergence: {self.divergence}`")
        return tuple(said)
