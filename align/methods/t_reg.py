"""T-REG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs, wide

BETTER = "Write an answer to the following that is better than a usual one: correct, helpful, to the point. {prompt}"
WORSE = "Write an answer to the following that is worse than a usual one: wrong, unhelpful, off the point. {prompt}"


@method(
    "t_reg",
    paper="2412.02685",
    view="pairs",
    needs={"ref_logp", "anchor.better", "anchor.worse"},
    claim=("gold_reward", "up", "style"),
)
class TREG(Method):
    """DPO plus a likelihood term whose token weights the reference makes from two opposite prompts.

        r_t = sigmoid(log pi_ref(y_t | x_better) - log pi_ref(y_t | x_worse)) - 1/2
        REG(y) = -sum_t beta r_t log pi(y_t | x),   w = stop_gradient(sigmoid(-beta (h_w - h_l)))
        loss = -log sigmoid(beta (h_w - h_l)) + alpha w (REG(y_w) + REG(y_l))

    One value per pair [P] for each term, in nats; the first is log 2 at the reference. r_t is in [-1/2, 1/2] and 0 for
    equal prompts. dpo's gradient of a chosen token is multiplied by 1 + alpha r_t, of a rejected one by 1 - alpha r_t,
    so up to alpha 2 no sign turns; on a solved pair both terms vanish with w, which is why w must not be
    differentiated. The two prompts are the last user turn inside `better_prompt` and `worse_prompt`, through the same
    chat template, and the answer's token ids are those scored after the prompt itself. The wording is ours; two more
    passes of the reference per pair (`reference: cached` keeps them). Source: arXiv 2412.02685.
    """

    formula: ClassVar[str] = (
        r"r_t(y) &= \sigma(\log\pi_{\mathrm{ref}}(y_t \mid x_{\mathrm{better}}) - \log\pi_{\mathrm{ref}}(y_t \mid "
        r"x_{\mathrm{worse}})) - \frac{1}{2} \\ "
        r"R(y) &= -\sum_t \beta r_t(y) \log\pi(y_t) \qquad w = \operatorname{sg}[\sigma(-\beta (h_w - h_l))] \\ "
        r"\mathcal{L} &= -\log\sigma(\beta (h_w - h_l)) + \alpha w (R(y_w) + R(y_l))"
    )
    when: ClassVar[str] = (
        "Pick it when the credit of a pair should go to the tokens that make an answer better, with no reward model."
    )

    beta: float = option(0.01, above=0, doc="strength of the KL leash")
    alpha: float = option(0.25, at_least=0, doc="weight of the token term; 0.1 to 0.5 in the paper")
    better_prompt: str = option(BETTER, doc="how to ask for a better answer; `{prompt}` is the last user turn")
    worse_prompt: str = option(WORSE, doc="how to ask for a worse answer")

    def check(self) -> None:
        for name, text in (("better_prompt", self.better_prompt), ("worse_prompt", self.worse_prompt)):
            if "{prompt}" not in text:
                raise ConfigError(f"method `t_reg`: `{name}` has no `{{prompt}}`", mend="put it where the prompt goes")

    def contexts(self) -> Mapping[str, str]:
        return {"better": self.better_prompt, "worse": self.worse_prompt}

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        margin = self.beta * pairs.delta
        weight = torch.sigmoid(-margin).detach()
        token_term = weight * (self._reg(pairs.chosen) + self._reg(pairs.rejected))
        return {"preference": Term(logistic(margin), "pair"), "token_reward": Term(token_term, "pair", self.alpha)}

    def _reg(self, completions: Completions) -> Tensor:
        reward = torch.sigmoid(wide(completions.anchor("better")) - wide(completions.anchor("worse"))) - 0.5
        return -self.beta * completions.sum(reward.detach() * wide(completions.logp))

    def cautions(self) -> tuple[str, ...]:
        return ("t_reg: with `alpha` above 2 some tokens are pushed the wrong way",) if self.alpha > 2 else ()
