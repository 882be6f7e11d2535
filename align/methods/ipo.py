"""IPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods.base import Method, method, option
from align.scoring.views import Pairs


@method("ipo", paper="2310.12036", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "style"))
class IPO(Method):
    """Identity Preference Optimization: regression of the margin on a finite target.

        loss = (Delta - 1 / (2 tau))^2
        token:  Delta = h_w / |y_w| - h_l / |y_l|        sum:  Delta = h_w - h_l

    One value per pair [P]; h is the log-ratio to the reference summed over tokens. 1 / (4 tau^2) at the reference, 0
    at the target, and pairs beyond it are pulled back. `sum` is the paper's Eq. 17 as written; `token` is what its
    authors are said to have used (TRL, HALOs). The two optima differ by a factor of the length: the target at tau 0.1
    is 5 nats for the whole pair in `sum`, 5 nats for every token in `token`. Source: arXiv 2310.12036, Eq. 17.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} &= \left(\Delta - \frac{1}{2 \tau}\right)^2 \\ "
        r"\text{token:}\quad \Delta &= \frac{h_w}{|y_w|} - \frac{h_l}{|y_l|} \\ "
        r"\text{sum:}\quad \Delta &= h_w - h_l"
    )
    when: ClassVar[str] = "Pick it for small, clean or repeated data: margins go to a finite target and no further."

    tau: float = option(0.1, above=0, doc="regularisation; the target margin is 1 / (2 tau)")
    normalize: Literal["token", "sum"] = option("token", doc="log-ratios per token, or summed as in the paper")

    def loss(self, pairs: Pairs) -> Tensor:
        if self.normalize == "sum":
            margin = pairs.delta
        else:
            margin = pairs.chosen.mean_log_ratio - pairs.rejected.mean_log_ratio
        return (margin - 1 / (2 * self.tau)).square()

    def cautions(self) -> tuple[str, ...]:
        target = 1 / (2 * self.tau)
        if self.normalize == "token" and target > 2:
            return (f"ipo: a target margin of {target:g} nats per token is out of reach; use `tau` of 0.5 to 1",)
        return ()
