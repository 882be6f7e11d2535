"""SimPO."""

from __future__ import annotations

from typing import ClassVar

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, nll
from align.scoring.views import Pairs


@method("simpo", paper="2405.14734", view="pairs", claim=("length", "down", "length_biased", "dpo"))
class SimPO(Method):
    """Simple Preference Optimization: a reference-free, length-normalised reward and a target margin.

        m = beta * (log pi(y_w)/|y_w| - log pi(y_l)/|y_l| - gamma_ratio)
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m) + sft_weight * (-log pi(y_w)/|y_w|),   e = label_smoothing

    One value per pair [P], in nats; the SFT term is a mean over the pair's own chosen tokens, then over pairs. The
    paper's and TRL's gamma is beta * gamma_ratio (the official code's `gamma_beta_ratio` is ours). TRL adds an SFT
    term of weight 1 unless told otherwise; here its default is 0, as in the paper. Source: arXiv 2405.14734, Eq. 6.
    """

    formula: ClassVar[str] = (
        r"m &= \beta \left(\frac{\log\pi(y_w)}{|y_w|} - \frac{\log\pi(y_l)}{|y_l|} - \gamma_r\right) \\ "
        r"\mathcal{L} &= -(1 - \varepsilon) \log\sigma(m) - \varepsilon \log\sigma(-m) - "
        r"\frac{w_{\mathrm{sft}}}{|y_w|} \log\pi(y_w)"
    )
    when: ClassVar[str] = "Pick it when there is memory for one model only, or when answers grow long under dpo."

    beta: float = option(2.0, above=0, doc="scale of the implicit reward, 2 to 10; not the range of dpo's beta")
    gamma_ratio: float = option(0.5, at_least=0, doc="target margin divided by beta, in nats per token")
    label_smoothing: float = option(0.0, at_least=0, below=0.5, doc="assumed rate of flipped labels")
    sft_weight: float = option(0.0, at_least=0, doc="weight of the chosen response's token-mean NLL")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        margin = pairs.chosen.mean_logp - pairs.rejected.mean_logp - self.gamma_ratio
        terms = {"preference": Term(logistic(self.beta * margin, self.label_smoothing), "pair")}
        if self.sft_weight:
            terms["sft"] = Term(nll(pairs.chosen, "token_mean"), "pair", self.sft_weight)
        return terms

    def cautions(self) -> tuple[str, ...]:
        return ("simpo: `beta` is meant to be 2 to 10; below 1 it is dpo's scale",) if self.beta < 1 else ()
