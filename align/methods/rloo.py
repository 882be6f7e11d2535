"""RLOO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from align.methods._policy_gradient import CAP, clip_shares, clipped, kl_stage, log_ratio, reward_stages
from align.methods.base import Draw, Method, Rollouts, Stage, Term, method, option
from align.methods.stages import capped_exp
from align.scoring.views import Groups


@method("rloo", paper="2402.14740", view="groups", needs={"advantage", "old_logp", "ref_logp"})
class RLOO(Method):
    """REINFORCE Leave-One-Out: the baseline of an answer is the mean reward of the prompt's other answers.

        R_i = r_i - beta sum_t (log pi_old - log pi_ref)(y_it),   A_i = R_i - mean of R_j over j != i
        none:      loss = -mean_i A_i log pi(y_i)
        sequence:  loss = -mean_i min(rho_i A_i, clip(rho_i, 1 - epsilon, 1 + epsilon) A_i),  rho = pi(y) / pi_old(y)

    One value a completion [N]. `none` is the paper's; its value says nothing, only its gradient. `sequence` is TRL's,
    with the same gradient at pi_old, and holds where a batch of rollouts feeds several steps; but the ratio of a whole
    answer leaves the clip after tiny changes of its tokens, so that most answers are clipped then: `gspo`, or one step.
    The KL is charged to the reward, before the baseline. A sums to 0 in a group, is +-(R_1 - R_2) of two, and does not
    see what is added to all rewards of a prompt. Source: arXiv 2402.14740, Equations 5 and 6.
    """

    formula: ClassVar[str] = (
        r"\rho(y) &= \frac{\pi(y)}{\pi_{\mathrm{old}}(y)} \\ "
        r"\text{sequence:}\quad \mathcal{L} &= -\frac{1}{K} \sum_{i=1}^{K} \min(\rho(y_i) A(y_i), "
        r"\operatorname{clip}(\rho(y_i), 1 - \epsilon, 1 + \epsilon) A(y_i)) \\ "
        r"\text{none:}\quad \mathcal{L} &= -\frac{1}{K} \sum_{i=1}^{K} A(y_i) \log\pi(y_i)"
    )
    when: ClassVar[str] = (
        "Pick it when a reward model scores whole answers, the KL to the reference matters, and each batch of rollouts "
        "feeds one step."
    )

    num_generations: int = option(4, at_least=2, doc="answers sampled for each prompt")
    beta: float = option(0.03, at_least=0, doc="weight of the KL in the reward; 0 needs no reference")
    ratio: Literal["sequence", "none"] = option("sequence", doc="clip the answer's ratio, or plain REINFORCE")
    epsilon: float = option(0.2, above=0, below=1, doc="how far from 1 that ratio is followed")
    missing_eos_penalty: float = option(0.0, at_least=0, doc="taken off the reward of an answer that was cut")
    reward_clip: float | None = option(None, above=0, doc="rewards are held between minus this and this; null: free")
    kl_target: float | None = option(None, above=0, doc="nats an answer that beta is steered to; null: beta is fixed")
    kl_horizon: int = option(10000, at_least=1, doc="answers over which a steered beta moves by up to a fifth")

    def requires(self) -> frozenset[str]:
        # The reference is read before the loss, by the stage that charges the KL.
        reference = {"ref_logp"} if self.beta else set()
        return frozenset({"advantage"} | reference | ({"old_logp"} if self.ratio == "sequence" else set()))

    def rollouts(self) -> Rollouts:
        stages = reward_stages(self.reward_clip, self.missing_eos_penalty)
        if self.beta:
            stages.append(kl_stage("kl_in_reward", self.beta, self.kl_target, self.kl_horizon))
        stages.append(Stage("leave_one_out"))
        draws = (Draw("policy", self.num_generations),)
        return Rollouts(draws, "reward", "group", shaping=tuple(stages), ratio=self.ratio == "sequence")

    def loss(self, groups: Groups) -> dict[str, Term]:
        own, advantage = groups.completions, self._advantage(groups)
        if self.ratio == "none":
            return {"policy": Term(-advantage * own.sum_logp, "completion")}
        gain = clipped(capped_exp(log_ratio(own).sum(-1), CAP), advantage, self.epsilon, self.epsilon)
        return {"policy": Term(-gain, "completion")}

    def _advantage(self, groups: Groups) -> Tensor:
        """One number an answer, [N]: it is the same at all of its tokens."""
        own = groups.completions
        return own.sum(own.advantage) / own.length.clamp(min=1)

    def measure(self, view: Groups) -> Mapping[str, tuple[Tensor, float]]:
        if self.ratio == "none":
            return {}
        own = view.completions
        ratio = capped_exp(log_ratio(own).sum(-1), CAP)
        return clip_shares(ratio, self._advantage(view), own.length > 0, self.epsilon, self.epsilon)

    def cautions(self) -> tuple[str, ...]:
        said = []
        if self.ratio == "none" and self.epsilon != 0.2:
            said.append("rloo: `epsilon` acts with `ratio: sequence` only")
        if (self.kl_target is None and self.kl_horizon != 10000) or (self.kl_target is not None and not self.beta):
            said.append("rloo: `kl_horizon` acts with a `kl_target` only, and that with a beta above 0")
        return tuple(said)
