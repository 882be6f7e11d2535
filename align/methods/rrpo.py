"""RRPO."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs


@method(
    "rrpo",
    paper="2504.12083",
    view="pairs",
    needs={"ref_logp", "kl_ref_policy", "marked"},
    claim=("kl", "down", "style", "dpo"),
)
class RRPO(Method):
    """Refined Regularized Preference Optimization: a margin of the differing segments, and a token-wise KL.

        u = sum of h_t over the marked tokens of y_w - the same of y_l
        loss = -log sigmoid(beta * u) + alpha * sum_t KL(pi_ref(.|x, y_w,<t) || pi(.|x, y_w,<t))

    One value per pair [P] for each term, in nats; log 2 at the reference. The KL is over all scored tokens of the
    chosen response, a sum: alpha is per token, and the term grows with length. Marked are the tokens in which the two
    answers differ (`data.marks`, by difflib on token ids), in as many segments of any lengths; a token outside them has
    no gradient from the margin. A pair without a marked token is dropped and counted. All tokens marked and alpha 0 is
    dpo. Source: arXiv 2504.12083 and the authors' code, whose reference probabilities underflow in softmax().log();
    published settings beta/alpha: 0.1/0.01 (LLaVA-Video), 0.5/0.05 (LongVU), 0.9/0.01 (VideoChat2).
    """

    formula: ClassVar[str] = (
        r"u &= \sum_t M_t(y_w) h_t(y_w) - \sum_t M_t(y_l) h_t(y_l) \\ "
        r"\mathcal{L} &= -\log\sigma(\beta u) + \alpha \sum_t D_t(y_w) \\ "
        r"D_t(y) &= \operatorname{KL}(\pi_{\mathrm{ref}}(\cdot \mid x, y_{<t}) \,\|\, \pi(\cdot \mid x, y_{<t}))"
    )
    when: ClassVar[str] = (
        "Pick it when the answers of a pair differ in a few phrases, and all else should stay as it was."
    )

    beta: float = option(0.1, above=0, doc="scale of the margin, 0.1 to 0.9 in the paper")
    alpha: float = option(0.01, at_least=0, doc="weight of the chosen response's KL, a sum over tokens")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        margin = self._segments(pairs.chosen) - self._segments(pairs.rejected)
        kept = Unit("pair", where=self._has_segments(pairs))
        return {
            "preference": Term(logistic(self.beta * margin), kept),
            "kl": Term(pairs.chosen.sum(pairs.chosen.kl_ref_policy), kept, self.alpha),
        }

    @staticmethod
    def _segments(completions: Completions) -> Tensor:
        return completions.sum(completions.log_ratio * completions.marked)

    @staticmethod
    def _has_segments(pairs: Pairs) -> Tensor:
        return (pairs.chosen.marked & pairs.chosen.mask).any(-1) | (pairs.rejected.marked & pairs.rejected.mask).any(-1)

    def measure(self, pairs: Pairs) -> dict[str, tuple[Tensor, float]]:
        return {"rrpo/pairs_without_segments": ((~self._has_segments(pairs)).sum(), float(len(pairs)))}
