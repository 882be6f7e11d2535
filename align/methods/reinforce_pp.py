"""REINFORCE++."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from align.methods._policy_gradient import (
    Correction,
    clip_shares,
    clipped,
    kl_stage,
    ratio,
    reward_stages,
    sampler_weight,
    scored,
)
from align.methods.base import Draw, Method, Rollouts, Stage, Term, Unit, method, option
from align.scoring.views import Groups, wide


@method("reinforce_pp", paper="2501.03262", view="groups", needs={"advantage", "old_logp", "ref_logp", "sampler_logp"})
class ReinforcePP(Method):
    """REINFORCE++: PPO without a critic; the whole batch is the baseline.

        r_t = [t is last] r - beta (log pi_old - log pi_ref)(y_t),   A_t = sum over s >= t of gamma^(s - t) r_s
        A <- (A - mean) / std over all tokens of the step
        loss = sum_i sum_t -min(rho_t A_it, clip(rho_t, 1 - epsilon, 1 + epsilon) A_it) / sum_i |y_i|

    Unit `token`, values [N, T]. One answer a prompt suffices. Statistics are over tokens, so a long answer counts as
    much as its tokens, and over the whole step, never a rank's share. It is PPO with V = 0 and lambda = 1. What is
    added to all rewards of one prompt changes it (`reinforce_pp_baseline` takes that out). TRL's page maps the name to
    RLOO with normalised advantages, which is another method. Source: arXiv 2501.03262; OpenRLHF.
    """

    formula: ClassVar[str] = (
        r"\rho_t(y) &= \frac{\pi(y_t)}{\pi_{\mathrm{old}}(y_t)} \\ "
        r"C(u, a) &= \min(u a, \operatorname{clip}(u, 1 - \epsilon, 1 + \epsilon) a) \\ "
        r"\mathcal{L} &= -\frac{1}{n} \sum_{i=1}^{K} \sum_{t=1}^{|y_i|} C(\rho_t(y_i), A_t(y_i)) \qquad "
        r"n = \sum_{i=1}^{K} |y_i|"
    )
    when: ClassVar[str] = (
        "Pick it when one answer a prompt is all that can be sampled, or when `grpo` blows up on prompts that are "
        "almost solved."
    )

    num_generations: int = option(1, at_least=1, doc="answers sampled for each prompt")
    beta: float = option(0.01, at_least=0, doc="weight of a token's KL in the reward; 0 needs no reference")
    gamma: float = option(1.0, above=0, at_most=1, doc="discount of a token")
    epsilon: float = option(0.2, above=0, below=1, doc="how far from 1 a ratio is followed")
    whiten_ddof: Literal[0, 1] = option(0, doc="1: the divisor of the variance is one less than the tokens")
    no_std_norm: bool = option(False, doc="subtract the mean of the advantages and do not divide")
    missing_eos_penalty: float = option(0.0, at_least=0, doc="taken off the reward of an answer that was cut")
    reward_clip: float | None = option(None, above=0, doc="rewards are held between minus this and this; null: free")
    kl_target: float | None = option(None, above=0, doc="nats an answer that beta is steered to; null: beta is fixed")
    kl_horizon: int = option(10000, at_least=1, doc="answers over which a steered beta moves by up to a fifth")
    sampler_correction: Correction = option("off", doc="weigh the loss by what the sampler's numbers differ")
    sampler_cap: float = option(3.0, above=1, doc="the largest such weight")

    def requires(self) -> frozenset[str]:
        # The reference is read before the loss, by the stage that charges the KL.
        reference = {"ref_logp"} if self.beta else set()
        sampler = {"sampler_logp"} if self.sampler_correction != "off" else set()
        return frozenset({"advantage", "old_logp"} | reference | sampler)

    def rollouts(self) -> Rollouts:
        returns = kl_stage("token_returns", self.beta, self.kl_target, self.kl_horizon, gamma=self.gamma)
        whiten = Stage("whiten", {"ddof": self.whiten_ddof, "mean_only": self.no_std_norm})
        stages = (*reward_stages(self.reward_clip, self.missing_eos_penalty), *self._baseline(), returns, whiten)
        return Rollouts((Draw("policy", self.num_generations),), "reward", "group", shaping=stages, ratio=True)

    def _baseline(self) -> tuple[Stage, ...]:
        return ()

    def loss(self, groups: Groups) -> dict[str, Term]:
        own = groups.completions
        advantage = scored(own, wide(own.advantage))
        gain = clipped(ratio(own, "token"), advantage, self.epsilon, self.epsilon)
        if self.sampler_correction != "off":
            gain = gain * sampler_weight(own, self.sampler_correction, self.sampler_cap)
        return {"policy": Term(scored(own, -gain), Unit("token", own.mask))}

    def measure(self, view: Groups) -> Mapping[str, tuple[Tensor, float]]:
        own = view.completions
        return clip_shares(ratio(own, "token"), own.advantage, own.mask, self.epsilon, self.epsilon)

    def cautions(self) -> tuple[str, ...]:
        said = []
        if self.gamma != 1:
            said.append(f"{self.id}: a `gamma` below 1 hides the reward from the tokens of a long answer")
        if (self.kl_target is None and self.kl_horizon != 10000) or (self.kl_target is not None and not self.beta):
            said.append(f"{self.id}: `kl_horizon` acts with a `kl_target` only, and that with a beta above 0")
        if self.sampler_correction == "off" and self.sampler_cap != 3:
            said.append(f"{self.id}: `sampler_cap` acts with a `sampler_correction` only")
        return tuple(said)
