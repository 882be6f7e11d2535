"""HyPO."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, mean_by, sum_by
from align.scoring.views import Pairs


@method("hypo", paper="2406.01462", view="pairs", needs={"ref_logp", "samples"}, claim=("kl", "down", "style", "dpo"))
class HyPO(Method):
    """Hybrid Preference Optimization: offline DPO plus an explicit reverse KL on the policy's own samples.

        loss = -log sigmoid(beta * (h_w - h_l)) + lambda * mean_i log pi(y_i) * (l_i - b_i)
        l_i = log pi(y_i) - log pi_ref(y_i), summed over tokens;  b_i = mean of the other samples' l;  both no gradient

    One value per pair [P] for each term, in nats. y_1 .. y_k are samples of the current policy for the pair's prompt
    (the paper's k is 2), at temperature 1 without top-p, and finished: a cut answer biases l. With one sample, or
    `baseline: zero`, b is 0. The second term is a surrogate: its value means nothing, its expected gradient is that of
    KL(pi || pi_ref). (The plain mean of l_i has expected gradient 0.) Coefficients of a prompt sum to 0 under `rloo`.
    Samples come with the data: those of an older policy give another gradient, not corrected here, so draw them anew
    every few steps. lambda multiplies sums over tokens, hence its size: with l - b of 10 nats a token is weighed by
    lambda * 10, against at most beta in dpo's part. lambda 0 is dpo. Source: arXiv 2406.01462, the
    algorithm of its Section 5; not Hybrid-DPO (2602.11902).
    """

    lambda_: float = option(1e-4, at_least=0, doc="weight of the reverse KL, in units of a sum over tokens")
    beta: float = option(0.05, above=0, doc="strength of dpo's KL leash")
    baseline: Literal["rloo", "zero"] = option("rloo", doc="mean of the prompt's other samples, or none")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        return {
            "preference": Term(logistic(self.beta * pairs.delta), "pair"),
            "kl_surrogate": Term(self._surrogate(pairs), "pair", self.lambda_),
        }

    def _surrogate(self, pairs: Pairs) -> Tensor:
        samples, owner = pairs.samples, pairs.sample_pair
        if samples is None or owner is None:
            raise ConfigError("method `hypo`: the pairs have no `samples`", mend="supply samples of the current policy")
        log_ratio = samples.sum_log_ratio.detach()
        coefficient = log_ratio
        if self.baseline == "rloo":
            others = sum_by(torch.ones_like(log_ratio), owner, len(pairs))[owner] - 1
            total = sum_by(log_ratio, owner, len(pairs))[owner]
            coefficient = log_ratio - torch.where(others > 0, (total - log_ratio) / others.clamp(min=1), 0.0)
        return mean_by(samples.sum_logp * coefficient, owner, len(pairs))
