"""Flex-DPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, nll
from align.scoring.views import Completions, Pairs


@method("flex_dpo", paper="2406.07327", view="pairs", needs={"ref_logp"}, claim=("chosen_logp", "up", "style", "dpo"))
class FlexDPO(Method):
    """3D-properties: a smaller beta for the rejected response, and the chosen one's likelihood.

        loss = -log sigmoid(beta_w * h_w - beta_l * h_l) + gamma * (-log pi(y_w) / |y_w|)

    One value per pair [P] for each term, in nats; log 2 at the reference (gamma 0). h is the log-ratio summed over
    tokens. dpo's gradient in the probabilities is -beta s(-m) / pi_w and +beta s(-m) / pi_l: as pi_l goes to 0 the
    rejected one's diverges like pi_l^(beta - 1) and the chosen one's dies like pi_l^beta, hence a drastic drop of the
    rejected, degradation of the chosen and dispersion to the rest; so the rejected one is slowed. |dL/dlog pi_l| /
    |dL/dlog pi_w| = beta_l / beta_w; equal betas are dpo, beta_l 0 ignores the rejected. With unequal betas a function
    f(x) in the reference matters, by (beta_w - beta_l) f(x). Log `logps/chosen`, `logps/rejected`. The SFT term is a
    mean over the chosen tokens, or with `sft_reduction: sum` their sum. The paper's "adaptive" beta_l is a constant
    per run in its experiments, best near 0.8 beta_w. Source: arXiv 2406.07327, the objective as derived from its text.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} &= -\log\sigma(\beta_w h_w - \beta_l h_l) - \frac{\gamma}{n} \log\pi(y_w) \\ "
        r"\text{sum:}\quad n &= 1 \qquad \text{token mean:}\quad n = |y_w|"
    )
    when: ClassVar[str] = (
        "Pick it when the rejected answers' likelihood drops drastically under dpo and drags the chosen ones' with it."
    )

    beta_w: float = option(0.1, above=0, doc="scale of the chosen response's log-ratio")
    beta_l: float = option(0.08, at_least=0, doc="scale of the rejected response's; at most beta_w")
    gamma: float = option(0.0, at_least=0, doc="weight of the SFT term")
    sft_reduction: Literal["token_mean", "sum"] = option("token_mean", doc="NLL of the chosen per token, or summed")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        margin = self.beta_w * pairs.chosen.sum_log_ratio - self.beta_l * pairs.rejected.sum_log_ratio
        terms = {"preference": Term(logistic(margin), "pair")}
        if self.gamma:
            terms["sft"] = Term(nll(pairs.chosen, self.sft_reduction), "pair", self.gamma)
        return terms

    def implicit_reward(self, completions: Completions) -> Tensor:
        """beta_w * h, [N]: one scale for both sides, so that accuracies compare log-ratios."""
        return self.beta_w * completions.sum_log_ratio

    def cautions(self) -> tuple[str, ...]:
        if self.beta_l > self.beta_w:
            return (
                "flex_dpo: `beta_l` above `beta_w` pushes the rejected response harder, the opposite of the intent",
            )
        return ()
