"""BCO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.core.errors import ConfigError
from align.methods.base import Method, Term, method, option
from align.methods.stages import split_by_label
from align.scoring.views import Singles

STATE = ("desirable_sum", "desirable_count", "undesirable_sum", "undesirable_count")


@method(
    "bco",
    paper="2404.04656",
    view="singles",
    needs={"ref_logp", "label"},
    coupling="batch",
    claim=("gold_reward", "up", "style"),
)
class BCO(Method):
    """Binary Classifier Optimization: logistic classification of beta * h around a running centre.

        r = beta * h,   delta = (mean of r over the desirable + mean over the undesirable) / 2, no gradient
        desirable:    loss = -log sigmoid(r - delta)
        undesirable:  loss = -w(x) log sigmoid(-(r - delta)),   w(x) = clip(p / (1 - p)), 1 by default

    One value per completion [N], in nats; log 2 at the reference. h is the log-ratio to the reference summed over
    tokens, p the probability that the prompt is of the desirable kind; the data's `weight` of an undesirable completion
    is p / (1 - p) and is clipped (0 stays 0: such a completion is off). Weights of the desirable are used as given.

    Why class means: for a pair the two losses sum to log(1 + e^{-(r_w - r_l)} + e^{delta - r_w} + e^{r_l - delta}), at
    least dpo's for any delta, and the excess is least at delta = (r_w + r_l) / 2; averaged, that is the mean of the two
    class means. A mean over the pooled rewards (TRL) equals it only for classes of one size. The means run over all
    steps, the current global batch included (as TRL's), so the first step has a centre; while one class is unseen, the
    other's mean alone is the centre. State: the two sums and counts. Source: arXiv 2404.04656, Eq. 12.
    """

    formula: ClassVar[str] = (
        r"r &= \beta h \qquad \delta = \operatorname{sg}\left[\frac{\bar{r}_D + \bar{r}_U}{2}\right] \qquad w = "
        r"\operatorname{clip}\left(\frac{p}{1 - p}, w_{\min}, w_{\max}\right) \\ "
        r"\text{desirable:}\quad \mathcal{L} &= -\log\sigma(r - \delta) \\ "
        r"\text{undesirable:}\quad \mathcal{L} &= -w \log\sigma(-(r - \delta))"
    )
    when: ClassVar[str] = (
        "Pick it for answers with a thumb up or down, the more so when the good and the bad come from different "
        "prompts."
    )

    beta: float = option(0.01, above=0, doc="scale of the implicit reward; 0.01 in the paper, 0.1 in TRL")
    clip: tuple[float, float] = option((0.5, 10.0), doc="bounds of the undesirable completions' weights")

    def check(self) -> None:
        try:
            low, high = (float(bound) for bound in self.clip)
        except (TypeError, ValueError):
            low = high = 0.0
        if not 0 < low <= high < float("inf"):
            raise ConfigError(f"method `bco`: `clip` is {self.clip!r}", mend="give two bounds, 0 < low <= high")
        object.__setattr__(self, "clip", (low, high))

    def initial_state(self) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.float64) for name in STATE}

    def observe(self, view: Singles) -> dict[str, Tensor]:
        before = {**self.initial_state(), **view.state}
        batch = split_by_label(view.completions, self.beta * view.completions.sum_log_ratio)
        return {name: before[name] + added for name, added in zip(STATE, batch, strict=True)}

    def loss(self, view: Singles) -> dict[str, Term]:
        completions = view.completions
        shifted = self.beta * completions.sum_log_ratio - self._centre(view)
        desirable, weight = completions.label, completions.weight
        low, high = self.clip
        clipped = torch.where(desirable | (weight == 0), weight, weight.clamp(low, high))
        values = -logsigmoid(torch.where(desirable, shifted, -shifted))
        return {"loss": Term(values, "completion", weight=clipped)}

    def _centre(self, view: Singles) -> Tensor:
        total = self.observe(view)
        means = [total[f"{kind}_sum"] / total[f"{kind}_count"].clamp(min=1) for kind in ("desirable", "undesirable")]
        seen = [total[f"{kind}_count"].clamp(max=1) for kind in ("desirable", "undesirable")]
        return (means[0] + means[1]) / (seen[0] + seen[1])
