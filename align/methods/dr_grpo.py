"""Dr. GRPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from align.methods._policy_gradient import Aggregation
from align.methods.base import method, option
from align.methods.grpo import GRPO


@method("dr_grpo", paper="2503.20783", view="groups", needs={"advantage", "old_logp", "ref_logp", "sampler_logp"})
class DrGRPO(GRPO):
    """GRPO done right: neither the answer's length nor the group's std divides.

        loss = mean_i (1/max_completion_length) sum_t -min(rho_t A_i, clip(rho_t) A_i),   A_i = r_i - mean of the group

    `grpo` with `aggregation: const`, `scale: none` and no KL. Its gradient is that of REINFORCE with the group's mean
    as baseline, over a constant; A is (G - 1) / G of RLOO's. The scale of the rewards matters here, as it does not in
    grpo. Under grpo's mean over an answer's own tokens wrong answers grow longer; here they do not.
    Source: arXiv 2503.20783, Section 3.2.
    """

    when: ClassVar[str] = (
        "Pick it when answers grow longer under `grpo` without getting better, and rewards have one scale for all "
        "prompts."
    )

    beta: float = option(0.0, at_least=0, doc="weight of the KL to the reference; 0 needs none")
    aggregation: Aggregation = option("const", doc="how tokens are averaged")
    scale: Literal["group", "batch", "none"] = option("none", doc="whose standard deviation divides an advantage")
