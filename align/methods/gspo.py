"""GSPO."""

from __future__ import annotations

from typing import ClassVar

from align.methods._policy_gradient import Level
from align.methods.base import method, option
from align.methods.grpo import GRPO


@method("gspo", paper="2507.18071", view="groups", needs={"advantage", "old_logp", "ref_logp", "sampler_logp"})
class GSPO(GRPO):
    """Group Sequence Policy Optimization: the ratio is the answer's, and so is the clip.

        s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|),   loss = -mean_i min(s_i A_i, clip(s_i, 1 - 3e-4, 1 + 4e-4) A_i)

    `grpo` with `importance_level: sequence`, a narrow clip and no KL. An answer is followed or clipped as a whole:
    its gradient is s_i A_i (1/|y_i|) sum_t grad log pi(y_t), whichever tokens the ratio comes from, which spares
    mixtures of experts the noise of single tokens. With answers of one token it is PPO's clip; where the ratio is 1,
    grpo. It acts only where a batch of rollouts feeds several steps. Source: arXiv 2507.18071, Equations 5 and 7.
    """

    when: ClassVar[str] = (
        "Pick it when a batch of rollouts feeds several steps and single tokens' ratios are noisy: long answers, or a "
        "mixture of experts."
    )

    beta: float = option(0.0, at_least=0, doc="weight of the KL to the reference; 0 needs none")
    epsilon: float = option(3e-4, above=0, below=1, doc="how far below 1 a ratio is followed")
    epsilon_high: float | None = option(4e-4, above=0, doc="how far above 1 a ratio is followed; null: epsilon")
    importance_level: Level = option("sequence", doc="the ratio of a token, or the geometric mean of the answer's")
