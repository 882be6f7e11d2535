"""beta-DPO."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from align.core.seeds import derive, uniforms
from align.methods.base import Method, Term, Unit, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs

FLOOR = 1e-3
TINY = 1e-12


@method(
    "beta_dpo",
    paper="2407.08639",
    view="pairs",
    needs={"ref_logp", "key"},
    coupling="batch",
    claim=("gold_reward", "up", "noisy"),
)
class BetaDPO(Method):
    """DPO with a dynamic beta: one a batch, growing with the batch's margin, on pairs drawn near the usual margin.

        Delta = h_w - h_l, no gradient in 1 to 3
        1:  M0 <- m M0 + (1 - m) mean(Delta),   S <- m S + (1 - m) std(Delta)
        2:  keep floor(rho * P) pairs, drawn without replacement by weight exp(-((Delta - M0) / S)^2 / 2)
        3:  beta_b = max(0.001, beta0 * (1 + a * (mean over kept(Delta) - M0)))
        4:  loss = mean over kept of -log sigmoid(beta_b * Delta)

    One value per pair [P], in nats; log 2 at the reference. h is the log-ratio to the reference summed over tokens, P
    the pairs of the global batch of all ranks, at least one of which is kept. M0 and S, in nats, start at 0, are
    checkpointed, and take the present batch in before they are read, as in the authors' code; std divides by P - 1, and
    a batch of one leaves S. Delta is not times beta0, as in that code: the same a acts 1 / beta0 times as strongly as
    on rewards. A draw is a function of seed, step and row, not of order or split. a = 0 with rho = 1 is dpo. Source:
    arXiv 2407.08639.
    """

    formula: ClassVar[str] = (
        r"M_0 &\leftarrow m M_0 + (1 - m) \operatorname{mean}_i(\Delta_i) \qquad S \leftarrow m S + (1 - m) "
        r"\operatorname{std}_i(\Delta_i) \\ "
        r"w_i &= \exp\left(-\frac{(\Delta_i - M_0)^2}{2 S^2}\right) "
        r"\text{, the weights by which } \rho P \text{ pairs } B \text{ are drawn} \\ "
        r"\beta_b &= \operatorname{sg}\left[\max(10^{-3}, \beta_0 (1 + a (\operatorname{mean}_{i \in B}(\Delta_i) - "
        r"M_0)))\right] \\ "
        r"\mathcal{L} &= \operatorname{mean}_{i \in B}(-\log\sigma(\beta_b \Delta_i))"
    )
    when: ClassVar[str] = (
        "Pick it when the quality of pairs is mixed: the leash follows the batch, and outlying pairs are left out."
    )

    beta0: float = option(0.1, above=0, doc="beta where the batch's margin is the usual one")
    a: float = option(0.6, at_least=0, doc="how strongly beta follows the batch's margin, per nat")
    rho: float = option(0.8, above=0, at_most=1, doc="share of the pairs that is kept")
    m: float = option(0.9, at_least=0, below=1, doc="share of the past in the running mean and deviation")

    def initial_state(self) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.float64) for name in ("M0", "S")}

    def observe(self, view: Pairs) -> dict[str, Tensor]:
        before = {**self.initial_state(), **view.state}
        delta = view.delta.detach().double()
        after = {"M0": self.m * before["M0"] + (1 - self.m) * delta.mean(), "S": before["S"]}
        if len(view) > 1:
            after["S"] = self.m * before["S"] + (1 - self.m) * delta.std()
        return after

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        state, delta = self.observe(pairs), pairs.delta.detach().double()
        kept = self._kept(pairs, (delta - state["M0"]) / state["S"].clamp(min=TINY))
        beta = (self.beta0 * (1 + self.a * (delta[kept].mean() - state["M0"]))).clamp(min=FLOOR)
        return {"loss": Term(logistic(beta.to(pairs.delta.dtype) * pairs.delta), Unit("pair", kept))}

    def _kept(self, pairs: Pairs, standard: Tensor) -> Tensor:
        """bool [P]: the largest of log weight + Gumbel noise are a draw without replacement."""
        count = max(1, math.floor(self.rho * len(pairs) + 1e-9))
        keys = [one.key.cpu().numpy() for one in (pairs.chosen, pairs.rejected)]
        uniform = torch.from_numpy(uniforms(derive(pairs.seed, "beta_dpo"), *keys)).to(standard.device)
        score = -(-uniform.log()).log() - standard.square() / 2
        return torch.zeros_like(score, dtype=torch.bool).index_fill(0, score.topk(count).indices, True)

    def implicit_reward(self, completions: Completions) -> Tensor:
        """beta0 * h, [N]."""
        return self.beta0 * completions.sum_log_ratio
