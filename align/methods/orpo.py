"""ORPO."""

from __future__ import annotations

from typing import ClassVar

from align.methods.base import Method, Term, method, option
from align.methods.stages import log_odds, logistic, nll
from align.scoring.views import Pairs


@method("orpo", paper="2403.07691", view="pairs", claim=("gold_reward", "up", "style"))
class ORPO(Method):
    """Odds-Ratio Preference Optimization: SFT on the chosen response plus an odds-ratio penalty, no reference.

        p(y) = exp(log pi(y)/|y|),   odds(y) = p / (1 - p)
        loss = -log p(y_w) - lambda * log sigmoid(log odds(y_w) - log odds(y_l))

    One value per pair [P] for each of the two terms, in nats; equal p gives -log p + lambda log 2. The NLL is the mean
    over the chosen response's own tokens (p is defined by it), then over pairs; TRL averages over all tokens of the
    micro-batch, prompts included. log(1 - p) is taken by log1mexp; the official code's log1p(-exp(m)) is -inf near
    m = 0. d log odds / d log p = 1 / (1 - p). Source: arXiv 2403.07691, Eqs. 5 to 7.

    The paper's text gives lambda 0.1 for Mistral and 0.2 to 0.25 for smaller models only from memory; 0.1, which is
    also TRL's default, stands.
    """

    formula: ClassVar[str] = (
        r"p(y) &= \pi(y)^{1 / |y|} \qquad o(y) = \frac{p(y)}{1 - p(y)} \\ "
        r"\mathcal{L} &= -\log p(y_w) - \lambda \log\sigma\left(\log\frac{o(y_w)}{o(y_l)}\right)"
    )
    when: ClassVar[str] = (
        "Pick it for a base model that has seen no SFT: likelihood and preference in one stage, no reference."
    )

    lambda_: float = option(0.1, at_least=0, doc="weight of the odds-ratio term; TRL calls it beta")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        margin = log_odds(pairs.chosen.mean_logp) - log_odds(pairs.rejected.mean_logp)
        return {
            "sft": Term(nll(pairs.chosen, "token_mean"), "pair"),
            "odds_ratio": Term(logistic(margin), "pair", self.lambda_),
        }
