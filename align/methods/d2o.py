"""D2O."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, Term, Unit, method, option
from align.methods.stages import logistic, mean_by
from align.scoring.views import Singles


@method(
    "d2o",
    paper="2403.03419",
    view="singles",
    needs={"ref_logp", "label", "samples"},
    claim=("rejected_logp", "down", "style"),
)
class D2O(Method):
    """Distributional Dispreference Optimization: bad responses against the model's own samples, no good ones needed.

        loss = -log sigmoid((beta / K) * sum_i h(y_i) - alpha * h(y_l)),   y_1 .. y_K the prompt's samples

    One value per completion [N] in nats, averaged over those labelled undesirable (y_l); desirable ones give 0 and are
    not counted. h is the log-ratio to the reference summed over tokens; log 2 at the reference. The samples come from
    the initial model (with a safety prompt, where there is one), which is the reference too. One sample that is the
    chosen response, with alpha = beta, is dpo; many samples pull like -beta KL(reference || policy): they anchor the
    policy where the likelihood of the negatives alone would fall without end. The paper draws K = 11. A sample that is
    the negative itself gives beta / K against alpha: leave such samples out. Source: arXiv 2403.03419, Eq. 3, with
    one reference in both places, as in its experiments.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} = -\log\sigma\left(\frac{\beta}{K} \sum_{i=1}^{K} h(y_i) - \alpha h(y_l)\right)"
    )
    when: ClassVar[str] = "Pick it when you have bad answers only, as in safety data, and a model to sample from."

    alpha: float = option(0.1, above=0, doc="scale of the negative's log-ratio")
    beta: float = option(0.1, above=0, doc="scale of the samples' mean log-ratio")

    def loss(self, view: Singles) -> dict[str, Term]:
        negative = ~view.completions.label
        margin = self.beta * self._samples(view) - self.alpha * view.completions.sum_log_ratio
        return {"loss": Term(logistic(margin), Unit("completion", where=negative))}

    def _samples(self, view: Singles) -> Tensor:
        if view.samples is None or view.sample_of is None:
            raise ConfigError("method `d2o`: the rows have no `samples`", mend="supply samples of the initial model")
        return mean_by(view.samples.sum_log_ratio, view.sample_of, len(view))
