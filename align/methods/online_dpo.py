"""Online DPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import relu

from align.methods._online import either_way
from align.methods.base import Draw, Method, Rollouts, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs


@method("online_dpo", paper="2402.04792", view="pairs", needs={"ref_logp", "probability", "ties"})
class OnlineDPO(Method):
    """Online DPO, or OAIF: before every step two answers of the present policy are judged, and a pair loss is taken.

        loss = l(h_w - h_l)      prob:  loss = P l(h_w - h_l) + (1 - P) l(h_l - h_w)
        sigmoid:  l(u) = -log sigmoid(beta u)
        ipo:      l(u) = (u - 1 / (2 beta))^2
        hinge:    l(u) = max(0, 1 - beta u)

    One value per pair [P], in nats; log 2 at the reference with `sigmoid`. h is the log-ratio to a reference that never
    moves, summed over tokens; no gradient goes through sampling. `hard` takes the likelier winner and leaves ties out:
    the policy then plays the game in which a majority is a certainty, another one than the judge's where preferences
    are intransitive. `sampled` draws the winner from the judge's P, `prob` takes the mean over such draws and keeps
    ties. Two equal answers have no gradient: the trainer leaves them out. With `ipo` the policy stops at the
    regularised Nash equilibrium of temperature beta; with `sigmoid` near that of beta / 4, for sigmoid(z) is about
    1/2 + z / 4. The paper's beta is 0.1 with `sigmoid`, 1 with `ipo`, 0.002 with `hinge`, at temperature 0.9; its judge
    is asked in both orders. Source: arXiv 2402.04792, Sections 2 and 3.
    """

    formula: ClassVar[str] = (
        r"\text{sigmoid:}\quad \ell(u) &= -\log\sigma(\beta u) \\ "
        r"\text{ipo:}\quad \ell(u) &= \left(u - \frac{1}{2 \beta}\right)^2 \\ "
        r"\text{hinge:}\quad \ell(u) &= \max(0, 1 - \beta u) \\ "
        r"\text{hard:}\quad p &= 1 \qquad \text{sampled:}\quad p = 1 \qquad \text{prob:}\quad p = P \\ "
        r"\mathcal{L} &= p \ell(h_w - h_l) + (1 - p) \ell(h_l - h_w)"
    )
    when: ClassVar[str] = "Pick it first of the online methods, when a judge or a reward is cheap to ask at every step."

    beta: float = option(0.1, above=0, doc="strength of the KL leash, in the unit of `loss`")
    loss_: Literal["sigmoid", "ipo", "hinge"] = option("sigmoid", doc="the loss of a pair's margin")
    label: Literal["hard", "sampled", "prob"] = option("hard", doc="likelier winner, a drawn one, or P itself")

    def requires(self) -> frozenset[str]:
        return self.needs if self.label == "prob" else frozenset({"ref_logp"})

    def rollouts(self) -> Rollouts:
        return Rollouts((Draw("policy", 2),), "preference", "pair", label=self.label)

    def loss(self, pairs: Pairs) -> Tensor:
        if self.label == "prob":
            return either_way(self._of_margin, pairs.delta, pairs.probability)
        return self._of_margin(pairs.delta)

    def _of_margin(self, margin: Tensor) -> Tensor:
        if self.loss_ == "ipo":
            return (margin - 1 / (2 * self.beta)).square()
        if self.loss_ == "hinge":
            return relu(1 - self.beta * margin)
        return logistic(self.beta * margin)

    def cautions(self) -> tuple[str, ...]:
        if self.loss_ == "sigmoid" and self.beta > 1:
            return ("online_dpo: with `beta` above 1 the policy hardly moves",)
        return ()
