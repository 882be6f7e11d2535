"""PS-KD."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.scoring.views import Demonstrations, wide


@method(
    "ps_kd", paper="2006.12000", view="demonstrations", needs={"cross_entropy"}, claim=("entropy", "up", "style", "sft")
)
class PSKD(Method):
    """SFT whose targets are mixed, more with every epoch, with what the policy predicted an epoch ago.

        a = alpha_T (e + 1) / E in epoch e = 1 .. E - 1, and 0 in epoch 0
        loss = -(1 - a) log pi(y_t) - a sum_v p_prev(v) log pi(v)

    Nats per token; values [N, T], the mean over all scored tokens of the global batch. p_prev is the policy as it was
    when the epoch began, over the whole vocabulary: a frozen copy, renewed at each epoch's end (`reference: ema` makes
    it an average instead, for runs without epochs). The gradient in the logits is pi - q with q the mixed target: where
    p_prev was sure of y_t it keeps its size, where it was not it shrinks. a = 0, or a one-hot p_prev, is sft, and so is
    a run of one epoch. State: `epoch` and `epochs`, which the trainer writes.
    Source: arXiv 2006.12000, Eqs. 5 and 8, and the authors' code.
    """

    formula: ClassVar[str] = (
        r"a &= \alpha_T \frac{e + 1}{E} \qquad H_t = -\sum_v p_{\mathrm{prev}}(v) \log\pi(v) \\ "
        r"\mathcal{L}_t &= -(1 - a) \log\pi(y_t) + a H_t"
    )
    when: ClassVar[str] = (
        "Pick it for several epochs of sft when calibration matters or demonstrations are of mixed quality."
    )

    alpha_T: float = option(0.8, at_least=0, below=1, doc="share of the prediction in the targets of the last epoch")
    teacher: ClassVar[str] = "previous_epoch"

    def initial_state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in (("epoch", 0.0), ("epochs", 1.0))}

    def loss(self, view: Demonstrations) -> dict[str, Term]:
        completions = view.completions
        nll, soft = -wide(completions.logp), wide(completions.cross_entropy)
        share = self._share(view).to(nll)
        return {"loss": Term(torch.where(completions.mask, (1 - share) * nll + share * soft, 0.0), Unit("token"))}

    def _share(self, view: Demonstrations) -> Tensor:
        told = {**self.initial_state(), **view.state}
        epoch, epochs = told["epoch"], told["epochs"]
        return torch.where(epoch > 0, self.alpha_T * (epoch + 1) / epochs, 0.0)

    def measure(self, view: Demonstrations) -> dict[str, tuple[Tensor, float]]:
        return {"ps_kd/share": (self._share(view), 1.0)}
