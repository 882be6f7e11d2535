"""What changes a knob from step to step: the weight of the KL, steered towards a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from align.core.options import option
from align.shaping.base import Batch, ShapingStage

STEP = 0.2
"""The largest relative error that one update sees."""


def adapted(beta: float, kl: float, target: float, share: float) -> float:
    """beta * (1 + clip(KL / target - 1, -0.2, 0.2) * share), `share` being completions of the step over the horizon.

    Source: Ziegler et al. (arXiv 1909.08593), Section 2.2.
    """
    return float(beta * (1.0 + np.clip(kl / target - 1.0, -STEP, STEP) * share))


@dataclass(frozen=True, kw_only=True)
class KLStage(ShapingStage):
    """A stage that charges beta times the log-ratio to the reference; with a `target`, beta follows the measured KL.

    The KL of a completion is sum_t log pi_old - log pi_ref of its own tokens, in nats, an unbiased estimate of
    KL(pi_old || pi_ref) that may be negative. The new beta holds from the next step on.
    """

    beta: float = option(0.05, at_least=0, doc="weight of the KL; with a target, at the first step")
    target: float | None = option(None, above=0, doc="nats a completion that beta is steered to; null: beta is fixed")
    horizon: int = option(10000, at_least=1, doc="completions over which a steered beta moves by up to a fifth")

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def state_name(self) -> str:
        """Of the state that holds the present beta; each kind of stage has its own."""
        return f"{self.id}.beta"

    def present_beta(self, state: Mapping[str, np.ndarray]) -> float:
        return float(state.get(self.state_name, self.beta)) if self.target is not None else self.beta

    def charged(self, batch: Batch) -> tuple[Batch, np.ndarray]:
        """The batch with its metrics and the next state, and the price of each token, float64 [N, T], 0 if unscored."""
        if not self.needs_reference or batch.log_ratio is None:
            return batch, np.zeros(batch.mask.shape)
        ratio = np.where(batch.mask, batch.log_ratio, 0.0)
        beta = self.present_beta(batch.state)
        kl = float(ratio.sum(1).mean()) if len(ratio) else 0.0
        made = batch.with_metrics(kl=kl, kl_beta=beta)
        if self.target is not None:
            after = adapted(beta, kl, self.target, len(ratio) / self.horizon)
            made = replace(made, state={**made.state, self.state_name: np.array(after)})
        return made, beta * ratio
