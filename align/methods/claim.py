"""What a method is meant to do, stated with it and measured on a world: a claim that can turn out false."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.core.errors import ConfigError, suggestion

METRICS = {
    "gold_reward": "gold reward of an answer to a held-out prompt",
    "length": "tokens of an answer to a held-out prompt",
    "kl": "KL to the starting model, nats an answer, on the policy's own answers",
    "entropy": "entropy of the policy, nats an answer, on its own answers",
    "accuracy": "share of held-out pairs, ordered by the gold reward, that the log-ratio to the start orders so too",
    "margin": "log-ratio to the start of the better answer less that of the worse, nats, on held-out pairs",
    "chosen_logp": "log-likelihood of the better answer of held-out pairs, nats",
    "rejected_logp": "log-likelihood of the worse answer of held-out pairs, nats",
    "demo_logp": "log-likelihood of held-out demonstrations, nats",
}
"""What `bench/direction.py` measures, name -> words. Temperature 1; answers end with their end token."""
START = "start"
"""The starting model, as something to be compared with."""


@dataclass(frozen=True, slots=True)
class Claim:
    """`metric` goes in direction `sign` on `world`, against a model: the starting one, or that of another method."""

    metric: str
    sign: Literal["up", "down"]
    world: str
    against: str = START

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(f"there is no metric `{self.metric}`", mend=suggestion(self.metric, METRICS))
        if self.sign not in ("up", "down"):
            raise ConfigError(f"the sign of a claim is `{self.sign}`", mend="write up or down")

    def __str__(self) -> str:
        against = "the starting model" if self.against == START else f"`{self.against}`"
        return f"{self.metric} {self.sign} on world `{self.world}`, against {against}"

    def holds(self, low: float, high: float) -> bool:
        """Whether an interval of the difference lies wholly on the claimed side of zero."""
        return low > 0 if self.sign == "up" else high < 0
