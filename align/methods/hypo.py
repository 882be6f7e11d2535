"""HyPO."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Live, Method, Term, method, option
from align.methods.stages import logistic, mean_by, sum_by
from align.scoring.views import Pairs

NEW_TOKENS = 256


@method("hypo", paper="2406.01462", view="pairs", needs={"ref_logp", "samples"}, claim=("kl", "down", "style", "dpo"))
class HyPO(Method):
    """Hybrid Preference Optimization: offline DPO plus an explicit reverse KL on the policy's own samples.

        loss = -log sigmoid(beta * (h_w - h_l)) + lambda * mean_i log pi(y_i) * (l_i - b_i)
        l_i = log pi(y_i) - log pi_ref(y_i), summed over tokens;  b_i = mean of the other samples' l;  both no gradient

    One value per pair [P] for each term, in nats. y_1 .. y_k are samples of the current policy for the pair's prompt
    (the paper's k is 2), at temperature 1 without top-p. `live: 2` has the trainer draw them before every step for the
    prompts of its batch; where they are cut at `max_new_tokens` it is the KL of the answers' beginnings. With one
    sample, or `baseline: zero`, b is 0. The second term is a surrogate: its value means nothing, its expected gradient
    is that of KL(pi || pi_ref). (The plain mean of l_i has expected gradient 0.) Coefficients of a prompt sum to 0
    under `rloo`. With `live: 0` samples come with the data: those of an older policy give another gradient, not
    corrected here, and a cut one biases l. lambda multiplies sums over tokens, hence its size: with l - b of 10 nats a
    token is weighed by lambda * 10, against at most beta in dpo's part. lambda 0 is dpo. Source: arXiv 2406.01462, the
    algorithm of its Section 5; not Hybrid-DPO (2602.11902).
    """

    formula: ClassVar[str] = (
        r"l_i &= \operatorname{sg}[h(y_i)] \qquad \text{rloo:}\quad b_i = \frac{1}{K - 1} \sum_{j \ne i} l_j \qquad "
        r"\text{zero:}\quad b_i = 0 \\ "
        r"\mathcal{L} &= -\log\sigma(\beta (h_w - h_l)) + \frac{\lambda}{K} \sum_{i=1}^{K} (l_i - b_i) \log\pi(y_i)"
    )
    when: ClassVar[str] = (
        "Pick it when the pairs cover little of what the policy writes, and fresh samples of it can be drawn."
    )

    lambda_: float = option(1e-4, at_least=0, doc="weight of the reverse KL, in units of a sum over tokens")
    beta: float = option(0.05, above=0, doc="strength of dpo's KL leash")
    baseline: Literal["rloo", "zero"] = option("rloo", doc="mean of the prompt's other samples, or none")
    live: int = option(0, at_least=0, doc="samples drawn for each prompt before every step; 0: the data's `samples`")
    max_new_tokens: int = option(NEW_TOKENS, at_least=1, doc="most tokens of a live sample, its end token included")

    def check(self) -> None:
        if not self.live and self.max_new_tokens != NEW_TOKENS:
            raise ConfigError("method `hypo`: `max_new_tokens` belongs to live samples", mend="set `live: 2` too")

    def requires(self) -> frozenset[str]:
        return self.needs - ({"samples"} if self.live else set())

    def live_samples(self) -> Live | None:
        return Live(self.live, self.max_new_tokens) if self.live else None

    def cautions(self) -> tuple[str, ...]:
        if self.live == 1 and self.baseline == "rloo":
            return ("hypo: one sample has no others to be compared with: `live: 2` has a baseline",)
        return () if self.live else ("hypo: `samples` of the data are of an older policy; `live: 2` draws them anew",)

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        return {
            "preference": Term(logistic(self.beta * pairs.delta), "pair"),
            "kl_surrogate": Term(self._surrogate(pairs), "pair", self.lambda_),
        }

    def _surrogate(self, pairs: Pairs) -> Tensor:
        samples, owner = pairs.samples, pairs.sample_pair
        if samples is None or owner is None:
            raise ConfigError(
                "method `hypo`: the pairs have no `samples`", mend="supply samples, or draw them: `live: 2`"
            )
        log_ratio = samples.sum_log_ratio.detach()
        coefficient = log_ratio
        if self.baseline == "rloo":
            others = sum_by(torch.ones_like(log_ratio), owner, len(pairs))[owner] - 1
            total = sum_by(log_ratio, owner, len(pairs))[owner]
            coefficient = log_ratio - torch.where(others > 0, (total - log_ratio) / others.clamp(min=1), 0.0)
        return mean_by(samples.sum_logp * coefficient, owner, len(pairs))
