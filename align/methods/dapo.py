"""DAPO."""

from __future__ import annotations

from typing import ClassVar

from align.methods._policy_gradient import Aggregation
from align.methods.base import method, option
from align.methods.grpo import GRPO


@method("dapo", paper="2503.14476", view="groups", needs={"advantage", "old_logp", "ref_logp", "sampler_logp"})
class DAPO(GRPO):
    """Decoupled Clip and Dynamic sAmpling Policy Optimization: GRPO for verifiable rewards and long answers.

        loss = sum_i sum_t -min(rho_t A_i, clip(rho_t, 1 - 0.2, 1 + 0.28) A_i) / sum_i |y_i|

    `grpo` with four changes: the upper clip is wider, so that rare tokens may grow (entropy stays up); tokens of all
    answers weigh the same (`tok`); groups of equal rewards are left out (`dynamic_sampling`); length costs reward over
    the last `overlong_cache` tokens. No KL. The paper draws further prompts until the batch is full; here the batch
    becomes smaller, and `groups_kept` tells by how much. Rewards are +-1 in the paper, the penalty for length at most
    1. Set `max_completion_length` to what is sampled, or the penalty never acts. Not Direct Advantage Policy
    Optimization, which has the same letters. Source: arXiv 2503.14476, Equations 8 to 13.
    """

    when: ClassVar[str] = (
        "Pick it when rewards are right or wrong, answers are long, and `grpo` loses entropy or learns from few groups."
    )

    num_generations: int = option(16, at_least=2, doc="answers sampled for each prompt, a group")
    beta: float = option(0.0, at_least=0, doc="weight of the KL to the reference; 0 needs none")
    epsilon_high: float | None = option(0.28, above=0, doc="how far above 1 a ratio is followed; null: epsilon")
    aggregation: Aggregation = option("tok", doc="how tokens are averaged")
    max_completion_length: int = option(20480, at_least=1, doc="tokens: divisor of `const`, end of overlong_cache")
    dynamic_sampling: bool = option(True, doc="leave out groups whose rewards are all equal")
    overlong_cache: int = option(4096, at_least=0, doc="tokens before max_completion_length that cost reward; 0: none")
