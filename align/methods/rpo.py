"""RPO."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, nll, sum_by
from align.scoring.views import Pairs


@method("rpo", paper="2405.16436", view="pairs", needs={"ref_logp", "baseline", "samples"})
class RPO(Method):
    """Regularized Preference Optimization: DPO plus SFT on a baseline response, from pessimism about the reward.

        sum:         loss = -log sigmoid(beta * (h_w - h_l)) + eta * beta * (-log pi(y_base))
        token_mean:  loss = -log sigmoid(beta * (h_w - h_l)) + eta * (-log pi(y_base) / |y_base|)

    One value per pair [P] for each term, in nats. y_base is the chosen response (the paper's experiments), the pair's
    demonstration (`sft`), or the mean over the pair's samples of a frozen policy (`samples`). Only the sum form is
    multiplied by beta, as the theory (eta of the reward's pessimism, beta of its scale) asks; at 300 tokens the four
    public conventions differ by a factor of 200 in the weight of a token. With `sum`, dL/dlog pi(y_w) =
    -beta (sigmoid(-z) + eta): never zero. Source: arXiv 2405.16436, Eq. 4.4 and App. F; not TRL's old `rpo_alpha`.
    """

    beta: float = option(0.01, above=0, doc="strength of the KL leash")
    eta: float = option(0.005, at_least=0, doc="weight of the SFT term; 0.2 is usual with token_mean")
    baseline: Literal["chosen", "sft", "samples"] = option("chosen", doc="the response that the SFT term imitates")
    sft_reduction: Literal["sum", "token_mean"] = option("sum", doc="NLL summed and times beta, or per token")

    def requires(self) -> frozenset[str]:
        extra = {"chosen": set(), "sft": {"baseline"}, "samples": {"samples"}}[self.baseline]
        return frozenset({"ref_logp", *extra})

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        scale = self.eta * self.beta if self.sft_reduction == "sum" else self.eta
        return {
            "preference": Term(logistic(self.beta * pairs.delta), "pair"),
            "sft": Term(self._baseline_nll(pairs), "pair", scale),
        }

    def _baseline_nll(self, pairs: Pairs) -> Tensor:
        if self.baseline == "chosen":
            return nll(pairs.chosen, self.sft_reduction)
        if self.baseline == "sft" and pairs.baseline is not None:
            return nll(pairs.baseline, self.sft_reduction)
        if self.baseline == "samples" and pairs.samples is not None and pairs.sample_pair is not None:
            values = nll(pairs.samples, self.sft_reduction)
            owner, size = pairs.sample_pair, len(pairs)
            return sum_by(values, owner, size) / sum_by(torch.ones_like(values), owner, size)
        name = "baseline" if self.baseline == "sft" else "samples"
        raise ConfigError(f"method `rpo`: the pairs have no `{name}`", mend="supply them, or use `baseline: chosen`")

    def cautions(self) -> tuple[str, ...]:
        if self.sft_reduction == "sum" and self.eta > 0.1:
            return ("rpo: `eta` multiplies a sum over tokens here; above 0.1 it swamps the preferences",)
        return ()
