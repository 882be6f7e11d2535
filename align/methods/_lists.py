"""What the methods on lists share: the scores, pairs within a list and their losses, KL within a list."""

from __future__ import annotations

import warnings

from torch import Tensor

from align.core.errors import ConfigError
from align.methods.stages import sum_by
from align.scoring.views import Lists


def scores_of(lists: Lists) -> Tensor:
    """psi, [N], higher is better."""
    if lists.scores is None:
        raise ConfigError("the lists have no `scores`", mend="supply scores or ranks")
    return lists.scores


def unit_scores(lists: Lists, consequence: str) -> Tensor:
    """psi, [N], with a warning (once) where they are not in [0, 1], as the ranking losses' papers have them."""
    scores = scores_of(lists)
    if len(scores) and not 0 <= float(scores.min()) <= float(scores.max()) <= 1:
        warnings.warn(f"scores outside 0 to 1: {consequence}; give win shares or ranks", stacklevel=3)
    return scores


def per_list(losses: Tensor, owner: Tensor, lists: Lists, reduction: str) -> Tensor:
    """The sum, or the mean, of each list's pair `losses` [M], [G]; 0 for a list without pairs."""
    total = sum_by(losses, owner, len(lists))
    if reduction == "sum":
        return total
    return total / sum_by(losses.new_ones(len(owner)), owner, len(lists)).clamp(min=1)


def kl_by(first: Tensor, second: Tensor, lists: Lists) -> Tensor:
    """KL within each list of log-probabilities [N] from `first` to `second`, [G]."""
    return sum_by(first.exp() * (first - second), lists.group, len(lists))
