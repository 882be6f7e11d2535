"""Implicit-reward SFT with an f-divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.scoring.views import Demonstrations

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "tv": lambda r: r,
    "chi2": lambda r: r - r.square() / 4,
    "rkl": lambda r: -torch.expm1(-r),
    "hellinger": lambda r: r / (1 + r),
    "js": lambda r: torch.log1p(-torch.expm1(-r)),
}
FLOORS = {"rkl": -20.0, "hellinger": -0.9, "js": -0.6}
"""Least r: e^20 is no weight for a token, and two functions have poles at -1 and at -log 2."""


@method("sft_fdiv", paper="2507.00018", view="demonstrations", needs={"ref_logp"}, claim=("kl", "down", "style", "sft"))
class SFTFDiv(Method):
    """SFT as implicit-reward learning: another divergence than total variation keeps the KL to the start in the loss.

        loss = -phi(r),   r = beta * log(pi / pi_ref) of a token (or of the whole response)
        tv: r    chi2: r - r^2/4    rkl: 1 - e^{-r}    hellinger: r / (1 + r)    js: log(2 - e^{-r})

    `token`: values [N, T], the mean over all scored tokens; `sequence`: one value per completion [N], of the sum. The
    loss is 0 and its slope -beta at the reference for every kind; `tv` is sft times beta, less a constant. chi2 stops
    at r = 2 and pulls back beyond; the weight of rkl is e^{-r}, so surprising tokens dominate it. r is held at -20
    (rkl), -0.9 (hellinger) and -0.6 (js), without gradient below: the share is logged. V(x) = 0 is a choice of gauge:
    only `tv` does not depend on it. The paper's other finding is a lower rate, 1/4 to 1/10 of sft's usual one: the
    default here. Source: arXiv 2507.00018; the functions follow from its Eq. for r = beta h + V with V = 0.
    """

    formula: ClassVar[str] = (
        r"\text{token:}\quad \mathcal{L}_t &= -\phi(\beta h_t) \\ "
        r"\text{sequence:}\quad \mathcal{L} &= -\phi(\beta h) \\ "
        r"\text{tv:}\quad \phi(r) &= r \\ "
        r"\text{chi2:}\quad \phi(r) &= r - \frac{r^2}{4} \\ "
        r"\text{rkl:}\quad \phi(r) &= 1 - e^{-u(r)} \qquad u(r) = \max(r, -20) \\ "
        r"\text{hellinger:}\quad \phi(r) &= \frac{u(r)}{1 + u(r)} \qquad u(r) = \max(r, -0.9) \\ "
        r"\text{js:}\quad \phi(r) &= \log(2 - e^{-u(r)}) \qquad u(r) = \max(r, -0.6)"
    )
    when: ClassVar[str] = (
        "Pick it for demonstrations when the model should stay nearer to its start than sft leaves it."
    )

    beta: float = option(1.0, above=0, doc="scale of the implicit reward; far smaller with level sequence")
    kind: Literal["tv", "chi2", "rkl", "hellinger", "js"] = option("chi2", doc="the divergence's function phi")
    level: Literal["token", "sequence"] = option("token", doc="the log-ratio of a token, or of the response")

    def loss(self, view: Demonstrations) -> dict[str, Term]:
        values = -PHI[self.kind](self._reward(view).clamp(min=FLOORS.get(self.kind, -torch.inf)))
        if self.level == "sequence":
            return {"loss": Term(values, "completion")}
        return {"loss": Term(values, Unit("token"))}

    def _reward(self, view: Demonstrations) -> Tensor:
        completions = view.completions
        if self.level == "sequence":
            return self.beta * completions.sum_log_ratio
        return torch.where(completions.mask, self.beta * completions.log_ratio, 0.0)

    def measure(self, view: Demonstrations) -> dict[str, tuple[Tensor, float]]:
        if self.kind not in FLOORS:
            return {}
        held = self._reward(view) < FLOORS[self.kind]
        return {"sft_fdiv/held": (held.sum(), float(view.counts()[self._unit]))}

    @property
    def _unit(self) -> str:
        return "completion" if self.level == "sequence" else "token"

    def cautions(self) -> tuple[str, ...]:
        if self.level == "sequence" and self.beta > 0.1 and self.kind != "tv":
            return ("sft_fdiv: with `level: sequence` r is a sum over tokens; above 0.1 `beta` is large",)
        return ()
