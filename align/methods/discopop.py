"""DiscoPOP."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("discopop", paper="2406.08414", view="pairs", needs={"ref_logp"}, claim=("gold_reward", "up", "style"))
class DiscoPOP(Method):
    """Discovered Preference Optimization: logistic at negative margins, exponential at positive ones.

        z = beta * (h_w - h_l),   m = sigmoid(z / tau)
        loss = (1 - m) * softplus(-z) + m * exp(-z)

    One value per pair [P]; (log 2 + 1) / 2 at the reference. h is the log-ratio to the reference summed over tokens;
    the gradient flows through m. Neither convex nor monotone: with tau 0.05 a local minimum at z = -0.1186 and a local
    maximum at 0.072, so the first steps push margins down, and pairs may stay slightly below 0. tau is below 1, since
    from there on the exponential rules at negative margins too. Source: arXiv 2406.08414, its log-ratio modulated loss.
    """

    formula: ClassVar[str] = (
        r"z &= \beta (h_w - h_l) \qquad m = \sigma(z / \tau) \\ "
        r"\mathcal{L} &= (1 - m) \log(1 + e^{-z}) + m e^{-z}"
    )
    when: ClassVar[str] = "Pick it to reproduce its paper; it is not monotone in the margin, so not a default."

    beta: float = option(0.05, above=0, doc="scale of the implicit reward")
    tau: float = option(0.05, above=0, below=1, doc="width of the change from logistic to exponential, in z")

    def loss(self, pairs: Pairs) -> Tensor:
        z = self.beta * pairs.delta
        log_m = logsigmoid(z / self.tau)
        # m e^-z as one exponential: e^-z alone overflows where m is 0. Its exponent is at most 0 for tau < 1.
        return logsigmoid(-z / self.tau).exp() * logistic(z) + (log_m - z).exp()
