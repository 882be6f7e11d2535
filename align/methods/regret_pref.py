"""Regret preference model."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs, wide


@method(
    "regret_pref",
    paper="2206.02231",
    view="pairs",
    needs={"ref_logp", "token_reward", "value", "finished"},
    claim=("gold_reward", "up", "style"),
)
class RegretPref(Method):
    """People prefer the segment with less regret: the larger sum of advantages, not of rewards.

        loss = -log sigmoid(kappa * (sum_t A_t(y_w) - sum_t A_t(y_l)))
        policy:  A_t = beta * h_t
        value:   A_t = r_t + V(s_{t+1}) - V(s_t),   V = 0 after the end
                 + value_weight * mean_t (V(s_t) - stop_gradient(r_t + V(s_{t+1})))^2

    One value per pair [P] for each term, in nats (the second in squared units of the reward); log 2 at the reference in
    the form `policy`. Without unscored turns inside, the sum of A is -regret = sum_t r_t + V(s_T) - V(s_0): for two
    finished answers to one prompt V(s_0) cancels and it is the partial-return model, dpo with kappa * beta in the form
    `policy`. It differs for segments that end in different states: answers that were cut, where V(s_T) stays. A turn
    of a user or tool between adds no advantage. `value` reads a reward for each of the assistant's turns
    (`chosen_step_rewards`, `rejected_step_rewards`) and trains the value role alone. Source: arXiv 2206.02231, Eq. 3.
    """

    formula: ClassVar[str] = (
        r"\text{policy:}\quad A_t(y) &= \beta h_t(y) \qquad E(y) = 0 \\ "
        r"\text{value:}\quad A_t(y) &= r_t(y) + V_{t+1}(y) - V_t(y) \qquad E(y) = \frac{1}{|y|} \sum_t (V_t(y) - "
        r"\operatorname{sg}[r_t(y) + V_{t+1}(y)])^2 \\ "
        r"\mathcal{L} &= -\log\sigma\left(\kappa \left(\sum_t A_t(y_w) - \sum_t A_t(y_l)\right)\right) + w_V "
        r"\frac{E(y_w) + E(y_l)}{2}"
    )
    when: ClassVar[str] = (
        "Pick it for segments that end in different states, such as answers that were cut, with a reward for each turn."
    )

    kappa: float = option(1.0, above=0, doc="how sharply regret decides a preference")
    form: Literal["policy", "value"] = option("policy", doc="advantages of the policy, or of rewards and a value role")
    beta: float = option(0.1, above=0, doc="scale of the policy's advantage, with form policy")
    value_weight: float = option(1.0, at_least=0, doc="weight of the value's temporal difference, with form value")

    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp"} if self.form == "policy" else {"token_reward", "value", "finished"})

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        if self.form == "policy":
            return {"preference": Term(logistic(self.kappa * self.beta * pairs.delta), "pair")}
        chosen, rejected = self._advantages(pairs.chosen), self._advantages(pairs.rejected)
        margin = pairs.chosen.sum(chosen) - pairs.rejected.sum(rejected)
        errors = self._error(pairs.chosen) + self._error(pairs.rejected)
        return {
            "preference": Term(logistic(self.kappa * margin), "pair"),
            "value": Term(errors / 2, "pair", self.value_weight),
        }

    def _error(self, completions: Completions) -> Tensor:
        target = (wide(completions.token_reward) + self._next(completions)).detach()
        square = (wide(completions.value)[:, :-1] - target).square()
        return completions.sum(square) / completions.length.clamp(min=1)

    def _advantages(self, completions: Completions) -> Tensor:
        return wide(completions.token_reward) + self._next(completions) - wide(completions.value)[:, :-1]

    @staticmethod
    def _next(completions: Completions) -> Tensor:
        """V of the state after each token, [N, T]; 0 after the last scored token of a finished completion."""
        after = wide(completions.value)[:, 1:]
        left = completions.mask.flip(-1).cumsum(-1).flip(-1)
        return torch.where((left == 1) & completions.finished[:, None], 0.0, after)

    def cautions(self) -> tuple[str, ...]:
        unused = "value_weight" if self.form == "policy" else "beta"
        default = {"value_weight": 1.0, "beta": 0.1}[unused]
        if getattr(self, unused) != default:
            return (f"regret_pref: `{unused}` is not read with `form: {self.form}`",)
        return ()
