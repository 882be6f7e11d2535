"""SLiC."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods.base import Method, Term, method, option
from align.methods.stages import RESPONSE_COLUMNS, nll, of_response
from align.scoring.views import Completions, Pairs


@method("slic", paper="2305.10425", view="pairs", needs={"baseline"}, claim=("gold_reward", "up", "style"))
class SLiC(Method):
    """Sequence likelihood calibration: a hinge on the policy's own log-likelihoods, plus an SFT term; no reference.

        loss = max(0, delta - log pi(y_w) + log pi(y_l)) + lambda * (-log pi(y_target)),   sums over tokens

    One value per pair [P] for each term, in nats; its start depends on the data. y_target is the chosen response, or
    the pair's demonstration (`sft`, as in the paper). From a margin of delta nats on, only the SFT term has a gradient.
    HALOs' code adds the policy's unreduced token log-probabilities as SFT term; this does not. TRL's `hinge` is
    `dpo_hinge`. Source: arXiv 2305.10425, the rank calibration loss.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} = \max(0, \delta - \log\pi(y_w) + \log\pi(y_l)) - \lambda \log\pi(y_{\mathrm{base}})"
    )
    when: ClassVar[str] = (
        "Pick it when there is memory for one model only and a pair that is learnt should be left alone."
    )

    delta: float = option(1.0, at_least=0, doc="margin in nats at which a pair counts as learnt")
    lambda_: float = option(0.1, at_least=0, doc="weight of the SFT term; 0.1 to 10 are tried")
    baseline: Literal["chosen", "sft"] = option("chosen", doc="the response that the SFT term imitates")

    def requires(self) -> frozenset[str]:
        return RESPONSE_COLUMNS[self.baseline]

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        margin = pairs.chosen.sum_logp - pairs.rejected.sum_logp
        return {
            "preference": Term((self.delta - margin).relu(), "pair"),
            "sft": Term(of_response(pairs, self.baseline, self._nll), "pair", self.lambda_),
        }

    def _nll(self, completions: Completions) -> Tensor:
        return nll(completions, "sum")

    def implicit_reward(self, completions: Completions) -> Tensor:
        """log pi(y | x), [N]."""
        return completions.sum_logp
