"""REINFORCE++ with the group's mean as baseline."""

from __future__ import annotations

from typing import ClassVar

from align.methods.base import Stage, method, option
from align.methods.reinforce_pp import ReinforcePP


@method(
    "reinforce_pp_baseline",
    paper="2501.03262",
    view="groups",
    needs={"advantage", "old_logp", "ref_logp", "sampler_logp"},
)
class ReinforcePPBaseline(ReinforcePP):
    """REINFORCE++-baseline: the group's mean is taken off each reward, the batch's std divides.

        r_i <- r_i - mean of the group, then as `reinforce_pp`

    Unlike in grpo no group's own std divides, so a prompt that is almost solved weighs no more than others; what is
    added to all rewards of a prompt changes nothing. With one group, equal lengths and beta 0 it is grpo (with the
    same ddof, eps aside). The paper's third version puts the KL in the loss instead (k2); here it is in the reward, as
    in OpenRLHF. Source: arXiv 2501.03262; OpenRLHF.
    """

    when: ClassVar[str] = (
        "Pick it when several answers a prompt are sampled and `grpo` over-fits the prompts that it has almost solved."
    )

    num_generations: int = option(8, at_least=2, doc="answers sampled for each prompt, a group")

    def _baseline(self) -> tuple[Stage, ...]:
        return (Stage("group_center", {"into": "reward"}),)
