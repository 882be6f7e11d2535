"""TGDPO."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, method, option
from align.methods.stages import logistic
from align.scoring.views import Completions, Pairs, wide


@method(
    "tgdpo", paper="2506.14574", view="pairs", needs={"ref_logp", "anchor.guide"}, claim=("gold_reward", "up", "style")
)
class TGDPO(Method):
    """DPO with a beta of its own for every token, from the token rewards of a policy that was trained before.

        r_t = beta_guide * (log pi_guide(y_t) - log pi_ref(y_t)), no gradient
        f_w = max(floor, 1 + alpha r_t),   f_l = max(floor, 1 - alpha r_t)
        loss = -log sigmoid(beta * (sum_t f_w h_t(y_w) - sum_t f_l h_t(y_l)))

    One value per pair [P], in nats; log 2 at the reference whatever the guide. A token's gradient is dpo's for the same
    margin times f. alpha 0, or the reference as its own guide, is dpo. Without the floor a token with r_t < -1/alpha
    (chosen) would be pushed the wrong way. `beta_guide` null is `beta`, as in the paper. The guide, a finished run of
    dpo or simpo, shares the tokenizer; a length-normalised one has a larger r_t: lower `alpha`.
    Source: arXiv 2506.14574 and the authors' code; the floor is ours.
    """

    formula: ClassVar[str] = (
        r"r_t(y) &= \operatorname{sg}[\beta_g (\log\pi_g(y_t) - \log\pi_{\mathrm{ref}}(y_t))] \\ "
        r"f_t(y_w) &= \max(f_{\min}, 1 + \alpha r_t(y_w)) \qquad f_t(y_l) = \max(f_{\min}, 1 - \alpha r_t(y_l)) \\ "
        r"\mathcal{L} &= -\log\sigma\left(\beta \left(\sum_t f_t(y_w) h_t(y_w) - \sum_t f_t(y_l) "
        r"h_t(y_l)\right)\right)"
    )
    when: ClassVar[str] = (
        "Pick it when a policy was trained on the pairs before and can say which tokens may move further."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    alpha: float = option(0.5, at_least=0, doc="weight of the guide's token rewards")
    beta_guide: float | None = option(None, above=0, doc="scale of the guide's reward, its own beta; null: `beta`")
    floor: float = option(0.0, at_least=0, at_most=1, doc="least factor of a token; 0 stops a token, never turns it")

    def loss(self, pairs: Pairs) -> Tensor:
        return logistic(self.beta * (self._guided(pairs.chosen, 1.0) - self._guided(pairs.rejected, -1.0)))

    def measure(self, pairs: Pairs) -> dict[str, tuple[Tensor, float]]:
        parts = [(pairs.chosen, self._factor(pairs.chosen, 1.0)), (pairs.rejected, self._factor(pairs.rejected, -1.0))]
        held = torch.stack([one.sum((factor <= self.floor).float()).sum() for one, factor in parts]).sum()
        return {"tgdpo/tokens_at_floor": (held, float(pairs.counts()["token"]))}

    def _guided(self, completions: Completions, sign: float) -> Tensor:
        return completions.sum(self._factor(completions, sign) * completions.log_ratio)

    def _factor(self, completions: Completions, sign: float) -> Tensor:
        scale = self.beta if self.beta_guide is None else self.beta_guide
        reward = scale * (wide(completions.anchor("guide")) - wide(completions.ref_logp)).detach()
        return (1 + sign * self.alpha * reward).clamp(min=self.floor)
