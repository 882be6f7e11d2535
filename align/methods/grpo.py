"""GRPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from align.core.errors import ConfigError
from align.methods._policy_gradient import (
    Aggregation,
    Correction,
    Estimator,
    Level,
    aggregate,
    clip_shares,
    clipped,
    kl,
    ratio,
    sampler_weight,
    scored,
)
from align.methods.base import Draw, Method, Rollouts, Stage, Term, method, option
from align.scoring.views import Groups, wide


@method("grpo", paper="2402.03300", view="groups", needs={"advantage", "old_logp", "ref_logp", "sampler_logp"})
class GRPO(Method):
    """Group Relative Policy Optimization: PPO's clip, and the group's own mean and std in place of a critic.

        rho_t = pi(y_t) / pi_old(y_t),   A_i = (r_i - mean of the group) / (its std + std_eps)
        loss = mean_i (1/|y_i|) sum_t [-min(rho_t A_i, clip(rho_t, 1 - epsilon, 1 + epsilon_high) A_i) + beta KL_t]

    Terms `policy` and, with beta > 0, `kl`, one value a completion [N], or a token [N, T] with `tok`. Switches:

    * `aggregation`: `seq` is the paper's mean of answers' own means, under which long wrong answers are punished
      less a token; `tok` the mean over all tokens (DAPO); `sum` sums an answer's tokens; `const` divides that by
      `max_completion_length` (Dr. GRPO). With equal lengths tok = seq = sum / L.
    * `importance_level: sequence` takes the geometric mean of an answer's ratios (GSPO); the KL keeps token ratios.
    * `kl_estimator`, d = log pi_ref - log pi: k3 = e^d - d - 1 is the paper's, and its expected gradient on the
      policy's samples is that of KL(pi_ref || pi); k2 = d^2 / 2 and k3_ratio = rho k3 (TRL's default) have that of
      KL(pi || pi_ref), and k1 none.
    * `delta` caps the ratio where A < 0 (INTELLECT-2, dual clip); it must be above 1 + epsilon_high.
    * `sampler_correction` weighs the policy term by pi_old / mu, mu the sampler's own probability: held at
      `sampler_cap` (`truncate`) or 0 above it (`mask`), by token or for the whole answer. Never on the KL.

    The advantage comes from shaping of the whole step's rewards: `scale`, `ddof`, `std_eps`, `dynamic_sampling`,
    `overlong_cache`, `mask_truncated`. A group of equal rewards has advantage 0 and only the KL left. What is left out
    of training leaves the averages' counts too (TRL keeps it there, as 0). Where a step trains on what its own weights
    sampled, the ratio is 1 and no clip acts. Source: arXiv 2402.03300, Equation 3.
    """

    formula: ClassVar[str] = (
        r"\rho_t(y) &= \frac{\pi(y_t)}{\pi_{\mathrm{old}}(y_t)} \qquad d_t(y) = \log\frac{\pi_{\mathrm{ref}}(y_t)}"
        r"{\pi(y_t)} \\ "
        r"\text{token:}\quad u_t(y) &= \rho_t(y) \qquad "
        r"\text{sequence:}\quad u_t(y) = \exp\left(\frac{1}{|y|} \sum_{j=1}^{|y|} \log\rho_j(y)\right) \\ "
        r"C(u, a) &= \min(\min(u, \delta) a, \operatorname{clip}(u, 1 - \epsilon, 1 + \epsilon_{\mathrm{high}}) a) \\ "
        r"\text{k1:}\quad k_t(y) &= -d_t(y) \qquad \text{k2:}\quad k_t(y) = \frac{1}{2} d_t(y)^2 \\ "
        r"\text{k3:}\quad k_t(y) &= e^{d_t(y)} - d_t(y) - 1 \qquad "
        r"\text{k3 ratio:}\quad k_t(y) = \rho_t(y) (e^{d_t(y)} - d_t(y) - 1) \\ "
        r"\ell_t(y) &= -C(u_t(y), A_t(y)) + \beta k_t(y) \\ "
        r"\text{seq:}\quad \mathcal{L} &= \frac{1}{K} \sum_{i=1}^{K} \frac{1}{|y_i|} \sum_{t=1}^{|y_i|} \ell_t(y_i) \\ "
        r"\text{tok:}\quad \mathcal{L} &= \frac{1}{n} \sum_{i=1}^{K} \sum_{t=1}^{|y_i|} \ell_t(y_i) \qquad "
        r"n = \sum_{i=1}^{K} |y_i| \\ "
        r"\text{sum:}\quad \mathcal{L} &= \frac{1}{K} \sum_{i=1}^{K} \sum_{t=1}^{|y_i|} \ell_t(y_i) \\ "
        r"\text{const:}\quad \mathcal{L} &= \frac{1}{K L_{\max}} \sum_{i=1}^{K} \sum_{t=1}^{|y_i|} \ell_t(y_i)"
    )
    when: ClassVar[str] = (
        "Pick it when a function or a model scores any answer, a few answers a prompt can be sampled, and there is no "
        "room for a critic."
    )

    num_generations: int = option(8, at_least=2, doc="answers sampled for each prompt, a group")
    beta: float = option(0.04, at_least=0, doc="weight of the KL to the reference; 0 needs none")
    epsilon: float = option(0.2, above=0, below=1, doc="how far below 1 a ratio is followed")
    epsilon_high: float | None = option(None, above=0, doc="how far above 1 a ratio is followed; null: epsilon")
    delta: float | None = option(None, doc="cap of a ratio of negative advantage, above 1 + epsilon_high; null: none")
    aggregation: Aggregation = option("seq", doc="how tokens are averaged")
    max_completion_length: int = option(1024, at_least=1, doc="tokens: divisor of `const`, end of overlong_cache")
    importance_level: Level = option("token", doc="the ratio of a token, or the geometric mean of the answer's")
    kl_estimator: Estimator = option("k3", doc="how the KL of a token is estimated")
    scale: Literal["group", "batch", "none"] = option("group", doc="whose standard deviation divides an advantage")
    ddof: Literal[0, 1] = option(1, doc="1: the divisor of that variance is one less than the rewards")
    std_eps: float = option(1e-4, above=0, doc="added to the standard deviation")
    dynamic_sampling: bool = option(False, doc="leave out groups whose rewards are all equal")
    mask_truncated: bool = option(False, doc="do not train on answers that were cut")
    overlong_cache: int = option(0, at_least=0, doc="tokens before max_completion_length that cost reward; 0: none")
    sampler_correction: Correction = option("off", doc="weigh the policy term by what the sampler's numbers differ")
    sampler_cap: float = option(3.0, above=1, doc="the largest such weight")

    def check(self) -> None:
        if self.delta is not None and self.delta <= 1 + self.high:
            raise ConfigError(
                f"method `{self.id}`: `delta` is {self.delta!r}, within the clip's 1 + {self.high!r}",
                mend="use a larger value, for example 4, or leave it out",
            )
        if self.overlong_cache > self.max_completion_length:
            raise ConfigError(
                f"method `{self.id}`: `overlong_cache` is {self.overlong_cache}, longer than an answer may be",
                mend=f"use at most `max_completion_length`, {self.max_completion_length}",
            )

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def requires(self) -> frozenset[str]:
        reference = {"ref_logp"} if self.beta else set()
        return frozenset({"advantage", "old_logp"} | reference | self._sampler())

    def _sampler(self) -> set[str]:
        return set() if self.sampler_correction == "off" else {"sampler_logp"}

    def rollouts(self) -> Rollouts:
        # Rewards as they were given decide which groups are left out; a penalty for length comes after.
        stages = [Stage("dynamic_sampling")] if self.dynamic_sampling else []
        if self.overlong_cache:
            sizes = {"max_length": self.max_completion_length, "cache": self.overlong_cache}
            stages.append(Stage("overlong", sizes))
        if self.mask_truncated:
            stages.append(Stage("mask_truncated"))
        stages.append(Stage("group_normalise", {"scale": self.scale, "ddof": self.ddof, "eps": self.std_eps}))
        draws = (Draw("policy", self.num_generations),)
        return Rollouts(draws, "reward", "group", shaping=tuple(stages), ratio=True)

    def loss(self, groups: Groups) -> dict[str, Term]:
        own, longest = groups.completions, self.max_completion_length
        gain = self._clipped(groups)
        if self.sampler_correction != "off":
            gain = gain * sampler_weight(own, self.sampler_correction, self.sampler_cap)
        found = {"policy": aggregate(own, scored(own, -gain), self.aggregation, longest)}
        if self.beta:
            found["kl"] = aggregate(own, kl(own, self.kl_estimator), self.aggregation, longest, self.beta)
        return found

    def _clipped(self, groups: Groups) -> Tensor:
        own = groups.completions
        advantage = scored(own, wide(own.advantage))
        return clipped(ratio(own, self.importance_level), advantage, self.epsilon, self.high, self.delta)

    def measure(self, view: Groups) -> Mapping[str, tuple[Tensor, float]]:
        own = view.completions
        shares = clip_shares(ratio(own, self.importance_level), own.advantage, own.mask, self.epsilon, self.high)
        drift = {"kl": (kl(own, "k3").sum(), float(own.length.sum()))} if self.beta else {}
        return {**shares, **drift}

    def cautions(self) -> tuple[str, ...]:
        said = []
        if self.kl_estimator == "k1" and self.beta:
            said.append(f"{self.id}: the expected gradient of `k1` in the loss is 0; take k2, k3 or k3_ratio")
        if self.importance_level == "sequence" and self.high > 0.05:
            said.append(f"{self.id}: ratios of sequences move little; an `epsilon` of 0.2 never clips (GSPO: 3e-4)")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        if (
            self.aggregation != "const"
            and not self.overlong_cache
            and self.max_completion_length != default["max_completion_length"]
        ):
            said.append(f"{self.id}: `max_completion_length` acts with `aggregation: const` or an overlong_cache only")
        if self.sampler_correction == "off" and self.sampler_cap != default["sampler_cap"]:
            said.append(f"{self.id}: `sampler_cap` acts with a `sampler_correction` only")
        return tuple(said)
