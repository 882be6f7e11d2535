"""SPPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.scoring.views import Completions, Pairs


@method("sppo", paper="2405.00675", view="pairs", needs={"ref_logp", "reward"})
class SPPO(Method):
    """Self-Play Preference Optimization: each answer's log-ratio is regressed on its win rate, by itself.

        loss = 1/2 (h_w - eta (P_w - 1/2))^2 + 1/2 (h_l - eta (P_l - 1/2))^2

    One value per pair [P]; 0 where h = eta (P - 1/2) for both. P, the answer's `reward`, is the probability that it
    beats a draw of pi_t, and h = log pi - log pi_t, summed over tokens: the reference is the policy as the round began.
    **eta is a step**: the exact one is multiplicative weights, pi_{t+1} proportional to pi_t exp(eta P(y > pi_t)), its
    log-normaliser replaced by eta / 2. Absolute log-ratios count: the winner itself is raised, and a constant added to
    both log-probs changes the loss, as it does not in dpo. Without a KL to a fixed policy the last iterate cycles where
    preferences are intransitive; the average of the iterates does not. The authors take the best and the worst of five
    answers by PairRM, each with its win rate among the five, itself included (which shrinks P - 1/2 by 4/5), eta 1000,
    three rounds and a learning rate of 5e-7. Targets of hundreds of nats are never reached: it acts as a push in
    proportion to P - 1/2, ended by the number of steps. Source: arXiv 2405.00675, Eq. 3.6, and the authors' trainer,
    whose beta is 1 / eta.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} = \frac{1}{2} \left(h_w - \eta \left(r_w - \frac{1}{2}\right)\right)^2 + "
        r"\frac{1}{2} \left(h_l - \eta \left(r_l - \frac{1}{2}\right)\right)^2"
    )
    when: ClassVar[str] = "Pick it for rounds with a pairwise judge when good answers themselves should get likelier."

    eta: float = option(1000.0, above=0, doc="step: log-ratio that a win rate of 1 above 1/2 asks for, in nats")

    def loss(self, pairs: Pairs) -> Tensor:
        return 0.5 * (self._square(pairs.chosen) + self._square(pairs.rejected))

    def _square(self, completions: Completions) -> Tensor:
        return (completions.sum_log_ratio - self.eta * (completions.reward - 0.5)).square()
