"""What methods on pairs share: soft labels, optimal transport on the line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from align.core.errors import ConfigError
from align.methods.base import Method, Term, option
from align.methods.stages import sum_by
from align.scoring.views import Pairs


@dataclass(frozen=True, kw_only=True)
class SoftLabels(Method):
    """A method whose labels are probabilities: its options for them, and the column that they are read from."""

    beta: float = option(0.1, above=0, doc="strength of the KL leash")
    T: float = option(1.0, above=0, doc="temperature of the labels: p = sigmoid(d / T), d the log-odds or the margin")
    label: Literal["probability", "margin"] = option("probability", doc="what of the data p is made of")

    def requires(self) -> frozenset[str]:
        return frozenset({"ref_logp", "ties", self.label})

    def label_probability(self, pairs: Pairs) -> Tensor:
        """P(y_w > y_l), [P]: sigmoid(margin / T) of the data's score differences, or their probability at T.

        A probability p is taken as sigmoid(d) of a score difference d, so T = 1 leaves it as it is, and 0 and 1 stay.
        """
        if self.label == "probability":
            return torch.sigmoid(torch.logit(pairs.probability) / self.T)
        if pairs.margin is None:
            raise ConfigError(
                f"method `{self.id}`: some pairs have no `margin`", mend="supply scores, or use probabilities"
            )
        return torch.sigmoid(pairs.margin / self.T)


def matched(first: Tensor, second: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal transport on the line between `first` and `second` [n], each element carrying its `mass` [n].

    Returns:
        Indices into `first` and into `second`, long [2 n], and the mass [2 n] that goes from one to the other. With
        equal masses each element meets the one of its own rank.
    """
    orders = [values.argsort(stable=True) for values in (first, second)]
    ends = [mass.double().index_select(0, order).cumsum(0) for order in orders]
    cuts = torch.cat(ends).sort().values
    starts = torch.cat([cuts.new_zeros(1), cuts[:-1]])
    middle = (starts + cuts) / 2
    places = [torch.searchsorted(end, middle).clamp(max=len(mass) - 1) for end in ends]
    owner, partner = (order.index_select(0, place) for order, place in zip(orders, places, strict=True))
    return owner, partner, (cuts - starts).to(first.dtype)


def dominance(first: Tensor, second: Tensor, mass: Tensor, loss: Callable[[Tensor], Tensor]) -> Term:
    """`loss` of first - second over the optimal transport between them, by element of `first`, [n], masses included."""
    owner, partner, moved = matched(first, second, mass)
    values = moved * loss(first.index_select(0, owner) - second.index_select(0, partner))
    total = sum_by(values, owner, len(first))
    return Term(total, "pair", weight=torch.ones_like(total))
