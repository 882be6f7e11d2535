"""BRAIn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from align.methods._lists import kl_by, scores_of
from align.methods.base import Method, method, option
from align.methods.stages import log_softmax_by, sum_by
from align.scoring.views import Completions, Lists, wide


@method(
    "brain",
    paper="2402.02479",
    view="lists",
    needs={"ref_logp", "scores", "anchor.guide"},
    claim=("gold_reward", "up", "style"),
)
class BRAIn(Method):
    """Bayesian Reward-conditioned Amortized Inference: the policy learns the posterior of a good answer.

        a_i proportional to exp(log p(y_i) - log q'(y_i) + log g(y_i)),   b_i to exp(log pi(y_i) - log q'(y_i))
        exponential:  log g = r / T         sigmoid:  log g = log sigmoid((r - mean of r over the list) / T)
        loss = KL(a || b) = sum_i a_i (log a_i - log b_i),   a and b normalised over the list's K samples

    One value per list [G], in nats; sums over tokens, p the reference (prior), q' the proposal that the samples were
    drawn from, r the data's scores. dL/dlog pi(y_i) = b_i - a_i: these sum to 0, which is the self-normalised baseline.
    0 where pi is proportional to p g on the samples, and nowhere else. At the reference with q' = p, b_i = 1 / K.

    `exponential` makes the target the optimal policy of KL-regularised reward (what the authors' code means by a
    Bradley-Terry reward). `sigmoid` saturates: answers far above the list's mean are equally good; for T far above the
    rewards' spread it is `exponential` with 2 T. The list's mean as centre leaves it unmoved by a constant in r.

    `proposal: guide` is for later rounds: the samples come from a copy of the policy, given as `reference.guide`, whose
    log-probabilities are then those of the trainer's own numerics. Sample at temperature 1 without top-p: another
    support is not corrected. Differences of tens of nats make `a` a one-hot: `effective_samples` is 1 / sum a_i^2. A
    list of one teaches nothing; such rows are dropped and counted. Source: arXiv 2402.02479, Theorem 4.2, and the
    authors' code.
    """

    formula: ClassVar[str] = (
        r"a_i &\propto \frac{\pi_{\mathrm{ref}}(y_i)}{q'(y_i)} g_i \qquad b_i \propto \frac{\pi(y_i)}{q'(y_i)} "
        r"\qquad \mathcal{L} = \sum_{i=1}^{K} a_i \log\frac{a_i}{b_i} \\ "
        r"\text{exponential:}\quad g_i &= e^{r_i / T} \\ "
        r"\text{sigmoid:}\quad g_i &= \sigma\left(\frac{r_i - \bar{r}}{T}\right)"
    )
    when: ClassVar[str] = (
        "Pick it when each prompt has several samples with rewards whose size, not only their order, should be learnt."
    )

    T: float = option(1.0, above=0, doc="temperature of the goodness, in the unit of the scores")
    goodness: Literal["exponential", "sigmoid"] = option("exponential", doc="p(good | x, y) as a function of the score")
    proposal: Literal["reference", "guide"] = option("reference", doc="the policy that the samples were drawn from")

    def requires(self) -> frozenset[str]:
        return self.needs if self.proposal == "guide" else self.needs - {"anchor.guide"}

    def loss(self, lists: Lists) -> Tensor:
        y = lists.completions
        drawn = y.sum(wide(y.logp) - self._proposal(y))
        return kl_by(self._target(lists), log_softmax_by(drawn, lists.group, len(lists)), lists)

    def measure(self, view: Lists) -> Mapping[str, tuple[Tensor, float]]:
        squares = sum_by((2 * self._target(view)).exp(), view.group, len(view))
        return {"effective_samples": ((1 / squares).sum(), float(len(view)))}

    def _proposal(self, y: Completions) -> Tensor:
        return wide(y.ref_logp if self.proposal == "reference" else y.anchor("guide"))

    def _target(self, lists: Lists) -> Tensor:
        """log a, [N]."""
        y, scores = lists.completions, scores_of(lists)
        if self.goodness == "sigmoid":
            count = sum_by(scores.new_ones(len(scores)), lists.group, len(lists))
            centre = (sum_by(scores, lists.group, len(lists)) / count)[lists.group]
            goodness = logsigmoid((scores - centre) / self.T)
        else:
            goodness = scores / self.T
        return log_softmax_by(y.sum(wide(y.ref_logp) - self._proposal(y)) + goodness, lists.group, len(lists))
