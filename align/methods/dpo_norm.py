"""Length-normalised DPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs


@method(
    "dpo_norm", paper="2411.15124", view="pairs", needs={"ref_logp"}, claim=("length", "down", "length_biased", "dpo")
)
class LengthNormalisedDPO(Method):
    """Length-normalised DPO: the log-ratio of an average token in place of the sum, against verbosity.

        loss = -log sigmoid(beta * (h_w / |y_w| - h_l / |y_l|))

    One value per pair [P], in nats; log 2 at the reference. |y| is the number of scored tokens; with one token each it
    is dpo. Its beta is of another scale than dpo's: 5 to 10. Not simpo, which has no reference and a target margin.
    TRL's `sigmoid_norm`. Source: arXiv 2411.15124 (Tulu 3), its length-normalised DPO.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} = -\log\sigma\left(\beta \left(\frac{h_w}{|y_w|} - \frac{h_l}{|y_l|}\right)\right)"
    )
    when: ClassVar[str] = "Pick it when answers grow long under dpo: the reward is that of an average token."

    beta: float = option(5.0, above=0, doc="scale of the implicit reward per token, 5 to 10; not dpo's range")

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * (pairs.chosen.mean_log_ratio - pairs.rejected.mean_log_ratio))

    def implicit_reward(self, completions: Completions) -> Tensor:
        """beta * h / |y|, [N]."""
        return self.beta * completions.mean_log_ratio

    def cautions(self) -> tuple[str, ...]:
        return ("dpo_norm: `beta` is meant to be 5 to 10; below 1 it is dpo's scale",) if self.beta < 1 else ()
