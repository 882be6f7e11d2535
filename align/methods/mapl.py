"""MAPL."""

from __future__ import annotations

import torch
from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.methods.stages import logistic, sum_by
from align.scoring.views import Pairs


@method("mapl", paper="2505.12845", view="pairs", needs={"ref_logp", "contrasts"}, claim=("gold_reward", "up", "style"))
class MAPL(Method):
    """Multi-Level Aware Preference Learning: dpo, and preferences between prompts for fixed answers.

        loss = dpo + lambda_1 * intra + lambda_2 * inter
        intra = -log sigmoid(beta * (h(y|x+) - h(y|x-)))
        inter = -log sigmoid(beta * ((h(y_w|x_a) - h(y_l|x_a)) - (h(y_w|x_b) - h(y_l|x_b))))

    One value per pair [P] for each term, in nats: the mean over the pair's own contrasts of a kind, and over the pairs
    that have one. x+ states constraints that y satisfies, x- some that it does not; after x_a the preference must be
    stronger than after x_b. `align.data.constraints` makes the prompts, the same number of constraints on each side:
    prompts that are longer on one side alone teach that longer prompts win. (1 + lambda_1 + lambda_2) log 2 at the
    reference, log 2 for each contrast of equal prompts. In `inter` the unknown beta log Z(x) of both prompts cancels,
    in `intra` it does not: a function f(x+) in the reference changes it. Prompt tokens are not scored (Rc-DPO's joint
    pi(x, y) would score them). lambda_1 = lambda_2 = 0 is dpo. The form of `inter` and the weights are derived.
    Source: arXiv 2505.12845; intra as in Rc-DPO, arXiv 2502.00814.
    """

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    lambda_1: float = option(1.0, at_least=0, doc="weight of contrasts of one answer after two prompts")
    lambda_2: float = option(1.0, at_least=0, doc="weight of contrasts of a pair after two prompts")

    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp", "contrasts"} if self.lambda_1 or self.lambda_2 else {"ref_logp"})

    def loss(self, pairs: Pairs) -> dict[str, Term]:
        terms = {"preference": Term(logistic(self.beta * pairs.delta), "pair")}
        for kind, weight in (("intra", self.lambda_1), ("inter", self.lambda_2)):
            if weight:
                values, has = self._contrasts(pairs, kind)
                terms[kind] = Term(values, Unit("pair", where=has), weight)
        return terms

    def _contrasts(self, pairs: Pairs, kind: str) -> tuple[Tensor, Tensor]:
        """Mean loss over each pair's contrasts of this kind [P], and whether it has any, bool [P]."""
        size, none = len(pairs), pairs.delta.new_zeros(len(pairs))
        if pairs.contrasts is None or pairs.contrast_pair is None:
            return none, none.bool()
        place: dict[tuple[int, str], int] = {}
        rows, signs, contrast = [], [], []
        for row, (role, pair) in enumerate(zip(pairs.contrasts.role, pairs.contrast_pair.tolist(), strict=True)):
            own, number, sign = role.split(":")
            if own == kind:
                rows.append(row)
                signs.append(1.0 if sign == "+" else -1.0)
                contrast.append(place.setdefault((pair, number), len(place)))
        h = pairs.contrasts.sum_log_ratio[rows]
        signed = h * torch.tensor(signs, dtype=h.dtype, device=h.device)
        margin = sum_by(signed, torch.tensor(contrast, dtype=torch.long, device=h.device), len(place))
        owner = torch.tensor([pair for pair, _ in place], dtype=torch.long, device=h.device)
        count = sum_by(torch.ones_like(margin), owner, size)
        return sum_by(logistic(self.beta * margin), owner, size) / count.clamp(min=1), count > 0
