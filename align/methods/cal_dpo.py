"""Cal-DPO."""

from __future__ import annotations

from typing import ClassVar

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("cal_dpo", paper="2412.14516", view="pairs", needs={"ref_logp"}, claim=("chosen_logp", "up", "style", "dpo"))
class CalDPO(Method):
    """Calibrated DPO: a logistic loss, and squares that hold the log-ratios at +1/(2 beta) and -1/(2 beta).

        loss = -log sigmoid(h_w - h_l) + c * ((h_w - 1/(2 beta))^2 + (h_l + 1/(2 beta))^2)

    One value per pair [P] for each term: nats, and nats squared. No beta inside the sigmoid. The targets are rewards
    beta * h of +1/2 and -1/2. At the reference log 2 + c / (2 beta^2), with slope -1/2 - c / beta in h_w: the chosen
    response is pushed up. With c = 0 it is dpo with beta 1. The authors' code takes beta 0.001 and c = 1/2, a target of
    500 nats where the square's gradient is about 1000 and only gradient clipping holds it; hence 0.01 here. Source:
    arXiv 2412.14516, and the authors' code.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} = -\log\sigma(h_w - h_l) + c \left[\left(h_w - \frac{1}{2 \beta}\right)^2 + \left(h_l + "
        r"\frac{1}{2 \beta}\right)^2\right]"
    )
    when: ClassVar[str] = (
        "Pick it when the chosen answer's likelihood must rise to a set height, not only stay above the rejected one's."
    )

    beta: float = option(0.01, above=0, doc="1 / (2 beta) is the target log-ratio in nats; 0.01 to 0.1")
    c: float = option(1.0, at_least=0, doc="weight of the squares; 1 in the paper's formula, 0.5 in its code")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        target = 1 / (2 * self.beta)
        chosen, rejected = pairs.chosen.sum_log_ratio, pairs.rejected.sum_log_ratio
        return {
            "preference": Term(logistic(pairs.delta), "pair"),
            "calibration": Term((chosen - target) ** 2 + (rejected + target) ** 2, "pair", self.c),
        }

    def cautions(self) -> tuple[str, ...]:
        if self.beta < 0.01:
            return ("cal_dpo: with `beta` below 0.01 the squares swamp the preferences",)
        return ()
