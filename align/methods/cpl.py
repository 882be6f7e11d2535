"""CPL."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, nll
from align.scoring.views import Completions, Pairs, wide


@method(
    "cpl",
    paper="2310.13639",
    view="pairs",
    needs={"ref_logp", "step"},
    takes={"probability"},
    claim=("gold_reward", "up", "style"),
)
class CPL(Method):
    """Contrastive Preference Learning: preferences compare discounted sums of log-probs, the optimal advantages.

        plain:  S = sum_t gamma^k(t) log pi(y_t)
        kl:     S = sum_t gamma^k(t) (log pi(y_t) - log pi_ref(y_t))
        loss = p softplus(-alpha (S_w - lambda S_l)) + (1 - p) softplus(-alpha (S_l - lambda S_w))
               + bc_weight * (-mean_t log pi)

    One value per pair [P] for each term, in nats; p is the data's probability that the chosen one wins (1 by default).
    k(t) counts the turns of the response, or its scored tokens, from 0. lambda < 1 makes lowering both sums costly,
    which keeps likelihood in distribution; lambda 1 sees their difference only: with a reference it is dpo, without one
    cpo's preference term. For the first `bc_steps` steps the loss is -mean_t log pi alone. Published: alpha 0.1 and
    lambda 0.5; 0.2 and 0.75 with `kl`; lambda 1 with `bc_weight` 1. A reference-free sum over hundreds of tokens
    saturates the sigmoid at once: use `kl`, or `normalize: token` (alpha / |y|), for language models. At the reference
    the form `kl` is log 2. Not there: the ranking of all segments of a batch by a score, for which pairs have none, and
    segments after different prompts. Source: arXiv 2310.13639 and the authors' code (whose label is 1 when the second
    wins).
    """

    formula: ClassVar[str] = (
        r"\text{plain:}\quad S(y) &= \sum_t \gamma^{k_t(y)} \log\pi(y_t) \\ "
        r"\text{kl:}\quad S(y) &= \sum_t \gamma^{k_t(y)} h_t(y) \\ "
        r"\mathcal{L} &= -p \log\sigma(\alpha (S(y_w) - \lambda S(y_l))) - (1 - p) \log\sigma(\alpha (S(y_l) - "
        r"\lambda S(y_w))) - \frac{w_{\mathrm{bc}}}{|y_w|} \log\pi(y_w)"
    )
    when: ClassVar[str] = (
        "Pick it for pairs of dialogues or of segments, where turns are discounted and likelihood should be kept up."
    )

    alpha: float = option(0.1, above=0, doc="temperature: the advantage is alpha log pi")
    lambda_: float = option(0.5, above=0, at_most=1, doc="weight of the losing sum; below 1 conservative")
    gamma: float = option(1.0, above=0, at_most=1, doc="discount of a turn or token")
    discount: Literal["turn", "token"] = option("turn", doc="what gamma counts")
    form: Literal["plain", "kl"] = option("plain", doc="log-probs, or log-ratios to the reference")
    normalize: Literal["sum", "token"] = option("sum", doc="alpha for the sum, or divided by the scored tokens")
    bc_weight: float = option(0.0, at_least=0, doc="weight of the token-mean NLL")
    bc_on: Literal["chosen", "both"] = option("chosen", doc="responses that are imitated")
    bc_steps: int = option(0, at_least=0, doc="first steps that only imitate")

    def requires(self) -> frozenset[str]:
        return self.needs - ({"ref_logp"} if self.form == "plain" else set())

    def initial_state(self) -> dict[str, Tensor]:
        return {"steps": torch.zeros((), dtype=torch.float64)} if self.bc_steps else {}

    def observe(self, view: Pairs) -> dict[str, Tensor]:
        return {name: steps + 1 for name, steps in {**self.initial_state(), **view.state}.items()}

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        chosen, rejected = self._sum(pairs.chosen), self._sum(pairs.rejected)
        p = pairs.probability
        values = p * logistic(chosen - self.lambda_ * rejected) + (1 - p) * logistic(rejected - self.lambda_ * chosen)
        imitation = nll(pairs.chosen, "token_mean")
        if self.bc_on == "both":
            imitation = (imitation + nll(pairs.rejected, "token_mean")) / 2
        if self.bc_steps:
            first = {**self.initial_state(), **pairs.state}["steps"] < self.bc_steps
            values = torch.where(first, 0.0, values)
            imitation = torch.where(first, imitation, self.bc_weight * imitation)
        elif not self.bc_weight:
            return {"preference": Term(values, "pair")}
        scale = 1.0 if self.bc_steps else self.bc_weight
        return {"preference": Term(values, "pair"), "imitation": Term(imitation, "pair", scale)}

    def _sum(self, completions: Completions) -> Tensor:
        values = wide(completions.logp) if self.form == "plain" else completions.log_ratio
        discounts = self.gamma ** self._count(completions).to(values.dtype)
        total = self.alpha * completions.sum(discounts * values)
        return total / completions.length.clamp(min=1) if self.normalize == "token" else total

    def _count(self, completions: Completions) -> Tensor:
        """Turns or scored tokens before each token, from 0 at the first that is scored."""
        if self.discount == "token":
            return completions.mask.cumsum(-1) - 1
        step = completions.step
        first = torch.where(completions.mask, step, torch.iinfo(step.dtype).max).amin(-1, keepdim=True)
        return (step - first).clamp(min=0)

    def cautions(self) -> tuple[str, ...]:
        found = []
        if self.form == "plain" and self.normalize == "sum":
            found.append("cpl: a sum of log-probs without reference saturates on long answers; `form: kl` does not")
        if self.bc_on == "both" and not self.bc_weight and not self.bc_steps:
            found.append("cpl: `bc_on` says nothing without `bc_weight` or `bc_steps`")
        return tuple(found)
