"""MAPL."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from align.methods.base import Method, Term, Unit, method, option
from align.methods.stages import logistic, sum_by
from align.scoring.views import Pairs


@method(
    "mapl",
    paper="2505.12845",
    view="pairs",
    needs={"ref_logp", "contrasts", "scored_prompts"},
    claim=("gold_reward", "up", "style"),
)
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
    in `intra` it does not: a function f(x+) in the reference changes it. `score_prompt_tokens` is Rc-DPO's joint
    pi(x, y): the prompts' tokens, from the first that differs within the row, enter h too, and what cancels in `intra`
    is the unknown of the answer; `inter` stays as it is. lambda_1 = lambda_2 = 0 is dpo. The form of `inter` and the
    weights are derived. Source: arXiv 2505.12845; intra as in Rc-DPO, arXiv 2502.00814.
    """

    formula: ClassVar[str] = (
        r"\mathcal{L} &= -\log\sigma(\beta (h_w - h_l)) + \lambda_1 I + \lambda_2 J \\ "
        r"I &= -\log\sigma(\beta (h(y \mid x_{+}) - h(y \mid x_{-}))) \\ "
        r"J &= -\log\sigma(\beta (h(y_w \mid x_a) - h(y_l \mid x_a) - h(y_w \mid x_b) + h(y_l \mid x_b)))"
    )
    when: ClassVar[str] = (
        "Pick it when prompts state several constraints that code can check, and answers should heed each."
    )

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    lambda_1: float = option(1.0, at_least=0, doc="weight of contrasts of one answer after two prompts")
    lambda_2: float = option(1.0, at_least=0, doc="weight of contrasts of a pair after two prompts")

    score_prompt_tokens: bool = option(False, doc="h of prompt and answer, instead of the answer after the prompt")

    def requires(self) -> frozenset[str]:
        if not self.lambda_1 and not self.lambda_2:
            return frozenset({"ref_logp"})
        return self.needs if self.score_prompt_tokens else self.needs - {"scored_prompts"}

    def cautions(self) -> tuple[str, ...]:
        if self.score_prompt_tokens and not self.lambda_1:
            return ("mapl: `score_prompt_tokens` changes `intra` alone, and `lambda_1` is 0",)
        return ()

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
