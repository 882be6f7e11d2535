"""ELR."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from align.methods.base import Method, Term, method, option
from align.methods.stages import logistic
from align.scoring.views import Pairs

LEAST = 1e-4


@method(
    "elr",
    paper="2007.00151",
    view="pairs",
    needs={"ref_logp", "key"},
    claim=("gold_reward", "up", "flipped", "dpo"),
)
class ELR(Method):
    """Early-learning regularisation of dpo: each pair is held near what the policy thought of it on average so far.

        z = beta * (h_w - h_l),   p = (sigmoid(z), sigmoid(-z)), within [1e-4, 1 - 1e-4]
        t <- m t + (1 - m) stop_gradient(p), for each pair, from (0, 0)
        loss = -log sigmoid(z) + lambda * log(1 - <t, p>)

    One value per pair [P] for each term, in nats; the second is at least lambda log(1e-4). The sign is plus: minimising
    it raises <t, p>, so a pair that was learnt the other way first is pulled away from its label. The target is renewed
    before the loss reads it, as in the authors' code; with `update: after` the first visit is dpo. After n visits t
    sums to 1 - m^n; `bias_correction` divides by that, and the second term is then log(1 - t s(z) - (1 - t) s(-z)) of
    one number t. It acts from the second epoch on. State: the keys of the pairs met, sorted, and their t, on every rank
    (24 bytes a pair). Source: arXiv 2007.00151, Eqs. 6 and 9, and the authors' code; for pairs the classes are the two
    orders.
    """

    formula: ClassVar[str] = (
        r"z &= \beta (h_w - h_l) \qquad p = \operatorname{clip}(\sigma(z), 10^{-4}, 1 - 10^{-4}) \\ "
        r"t_1 &\leftarrow m t_1 + (1 - m) \operatorname{sg}[p] \qquad t_2 \leftarrow m t_2 + (1 - m) "
        r"\operatorname{sg}[1 - p] \\ "
        r"\mathcal{L} &= -\log\sigma(z) + \lambda \log(1 - t_1 p - t_2 (1 - p))"
    )
    when: ClassVar[str] = (
        "Pick it for two or more epochs on flipped labels: it holds a pair to what the policy thought of it early."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    m: float = option(0.7, at_least=0, below=1, doc="share of the past in a pair's target; 0.9 for asymmetric noise")
    lambda_: float = option(3.0, at_least=0, doc="weight of the regulariser; 1 for asymmetric noise")
    update: Literal["before", "after"] = option("before", doc="whether the target holds the present prediction")
    bias_correction: bool = option(False, doc="targets that sum to 1 from the first visit on")

    def initial_state(self) -> dict[str, Tensor]:
        return {"key": torch.zeros(0, dtype=torch.long), "target": torch.zeros(0, 2, dtype=torch.float64)}

    def observe(self, view: Pairs) -> dict[str, Tensor]:
        own, inverse = self._keys(view).unique(return_inverse=True)
        total = view.weight.new_zeros(len(own), 2, dtype=torch.float64).index_add(0, inverse, self._predicted(view))
        predicted = total / inverse.bincount(minlength=len(own))[:, None]
        before, known, place, key, target = self._recall(view, own)
        renewed = self.m * before + (1 - self.m) * predicted
        target = target.index_copy(0, place[known], renewed[known])
        key, order = torch.cat([key, own[~known]]).sort()
        return {"key": key, "target": torch.cat([target, renewed[~known]])[order]}

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        z = self.beta * pairs.delta
        target = self._recall(pairs, self._keys(pairs))[0]
        if self.update == "before":
            target = self.m * target + (1 - self.m) * self._predicted(pairs)
        if self.bias_correction:
            target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        p = torch.sigmoid(z).clamp(LEAST, 1 - LEAST)
        target = target.to(p.dtype)
        alike = target[:, 0] * p + target[:, 1] * (1 - p)
        return {"preference": Term(logistic(z), "pair"), "elr": Term(torch.log1p(-alike), "pair", self.lambda_)}

    def _predicted(self, pairs: Pairs) -> Tensor:
        """p of each pair without gradient, float64 [P, 2]."""
        p = torch.sigmoid(self.beta * pairs.delta.detach().double()).clamp(LEAST, 1 - LEAST)
        return torch.stack([p, 1 - p], -1)

    def _recall(self, view: Pairs, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The targets of these keys (0 where unknown), whether each is known, its place; and the whole memory."""
        memory = {**self.initial_state(), **view.state}
        key, target = memory["key"].to(own.device), memory["target"].to(own.device)
        place = torch.searchsorted(key, own)
        found = torch.nn.functional.pad(key, (0, 1), value=-1)[place]
        held = torch.nn.functional.pad(target, (0, 0, 0, 1))[place]
        known = found == own
        return torch.where(known[:, None], held, 0.0), known, place, key, target

    @staticmethod
    def _keys(pairs: Pairs) -> Tensor:
        """A number in [0, 2**63) of each pair, from those of its completions."""
        return (pairs.chosen.key * 0x5851F42D4C957F2D + pairs.rejected.key) & 0x7FFFFFFFFFFFFFFF
