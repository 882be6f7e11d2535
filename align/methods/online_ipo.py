"""Online IPO and IPO-MD."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods._online import either_way, mixture
from align.methods.base import Method, Rollouts, method, option
from align.scoring.views import Pairs


@method("online_ipo", paper="2403.08635", view="pairs", needs={"ref_logp", "probability", "ties"})
class OnlineIPO(Method):
    """Online IPO: ipo on two answers of the present policy; with `mix` above 0 it is IPO-MD, on two of a mixture.

        loss = (h_w - h_l - 1 / (2 tau))^2
        prob:  loss = P (h_w - h_l - 1 / (2 tau))^2 + (1 - P) (h_l - h_w - 1 / (2 tau))^2

    One value per pair [P]; h is the log-ratio to a reference that never moves, summed over tokens (`ipo` alone takes
    means per token). 1 / (4 tau^2) at the reference. Both answers come from one distribution, the policy's, or, token
    by token, softmax((1 - mix) log pi + mix log pi_ref); with two different ones the expected gradient is another. It
    is 4 / tau times that of `nash_md`'s self-play: at `mix` 0 the policy stops at the regularised Nash equilibrium of
    temperature tau, pi* proportional to pi_ref exp(P(y > pi*) / tau), also where preferences are intransitive. With
    `mix` the mixture stops at that of temperature tau / (1 - mix). This needs winners drawn from the judge's P
    (`sampled`) or P itself (`prob`); the likelier winner (`hard`) is another game. The paper's tau is 1, its `mix`
    0.125. Source: arXiv 2403.08635, Sections 3 and 4.
    """

    formula: ClassVar[str] = (
        r"\ell(u) &= \left(u - \frac{1}{2 \tau}\right)^2 \\ "
        r"\text{sampled:}\quad p &= 1 \qquad \text{prob:}\quad p = P \qquad \text{hard:}\quad p = 1 \\ "
        r"\mathcal{L} &= p \ell(h_w - h_l) + (1 - p) \ell(h_l - h_w)"
    )
    when: ClassVar[str] = (
        "Pick it when a judge compares answers and preferences may be intransitive: it ends at an equilibrium."
    )

    tau: float = option(1.0, above=0, doc="temperature of the equilibrium; the target margin is 1 / (2 tau)")
    mix: float = option(0.0, at_least=0, at_most=1, doc="weight of the reference in the mixture that is sampled")
    label: Literal["sampled", "prob", "hard"] = option("sampled", doc="a drawn winner, P itself, or the likelier one")

    def requires(self) -> frozenset[str]:
        return self.needs if self.label == "prob" else frozenset({"ref_logp"})

    def rollouts(self) -> Rollouts:
        return Rollouts((mixture(self.mix, 2),), "preference", "pair", label=self.label)

    def loss(self, pairs: Pairs) -> Tensor:
        if self.label == "prob":
            return either_way(self._of_margin, pairs.delta, pairs.probability)
        return self._of_margin(pairs.delta)

    def _of_margin(self, margin: Tensor) -> Tensor:
        return (margin - 1 / (2 * self.tau)).square()

    def cautions(self) -> tuple[str, ...]:
        if self.label == "hard":
            return ("online_ipo: `label: hard` plays the game of likelier winners; `sampled` and `prob` the judge's",)
        return ()
