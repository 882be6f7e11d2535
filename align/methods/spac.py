"""SPAC."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic, mean_by
from align.scoring.views import Completions, Pairs


@method("spac", paper="2406.04274", view="pairs", needs={"ref_logp", "samples"}, claim=("gold_reward", "up", "style"))
class SPAC(Method):
    """Self-Play with Adversarial Critic (experimental): DPO against the last iterate, pessimistic about own samples.

        g(y) = log pi(y) - log pi_t(y), summed over tokens
        loss = -log sigmoid((g_w - g_l) / eta) + rho * P
        logistic:  P = -log sigmoid((g_w - g(y^)) / eta)
        linear:    P = (g(y^) - (g_w + g_l) / 2) / eta

    One value per pair [P] for each term, in nats. pi_t is the reference, y^ a sample of it (the mean over several).
    After a round pi becomes pi_t, samples are drawn and the cache is filled anew. Substituting r = g / eta into the
    paper's critic, argmin over r of the preference loss / rho + E[r(y^) - r(data)], with the mean over both answers of
    a pair for the data, gives the linear form: unbounded below in log pi(y^), E g(y^) = -KL(pi_t || pi). The logistic
    form, the default, is bounded: spin's loss of the chosen against the sample. At pi = pi_t: (1 + rho) log 2, or
    log 2 if linear, and E grad g(y^) = 0. rho 0 is dpo with beta = 1 / eta. The loss that the authors ran is not known
    here: both forms are derived. Source: arXiv 2406.04274, the algorithm of its abstract.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} &= -\log\sigma\left(\frac{h_w - h_l}{\eta}\right) + \rho P \\ "
        r"\text{logistic:}\quad P &= -\frac{1}{K} \sum_{i=1}^{K} \log\sigma\left(\frac{h_w - h(y_i)}{\eta}\right) \\ "
        r"\text{linear:}\quad P &= \frac{1}{\eta} \left(\frac{1}{K} \sum_{i=1}^{K} h(y_i) - \frac{h_w + "
        r"h_l}{2}\right)"
    )
    when: ClassVar[str] = (
        "Pick it for rounds of sampling when the policy's own answers should not be trusted above the data; "
        "experimental."
    )

    eta: float = option(10.0, above=0, doc="step of the actor: 1 / beta of dpo")
    rho: float = option(0.1, at_least=0, doc="weight of the pessimism")
    kind: Literal["logistic", "linear"] = option("logistic", doc="bounded pessimism, or the theory's linear one")

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        return {
            "preference": Term(logistic(pairs.delta / self.eta), "pair"),
            "pessimism": Term(self._pessimism(pairs), "pair", self.rho),
        }

    def _pessimism(self, pairs: Pairs) -> Tensor:
        samples, owner, count = pairs.samples, pairs.sample_pair, len(pairs)
        if samples is None or owner is None:
            raise ConfigError("method `spac`: the pairs have no `samples`", mend="supply samples of the reference")
        own, chosen = samples.sum_log_ratio, pairs.chosen.sum_log_ratio
        if self.kind == "logistic":
            return mean_by(logistic((chosen[owner] - own) / self.eta), owner, count)
        return (mean_by(own, owner, count) - (chosen + pairs.rejected.sum_log_ratio) / 2) / self.eta

    def implicit_reward(self, completions: Completions) -> Tensor:
        """g / eta, [N]."""
        return completions.sum_log_ratio / self.eta

    def cautions(self) -> tuple[str, ...]:
        if self.kind == "linear" and self.rho:
            return ("spac: the linear pessimism is unbounded below; keep `rho` small and rounds short",)
        return ()
