"""Training and evaluation metrics as (sum, count), reduced over ranks once per log line."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from align.methods.base import Method, Terms
from align.scoring.token_view import first_token_delta
from align.scoring.views import Completions, Lists, Pairs, Singles, View

Measured = dict[str, tuple[Tensor, float]]


def implicit_reward(method: Method, completions: Completions) -> Tensor:
    """The reward a method gives a completion, [N]: beta * h with a reference, beta * log pi(y|x)/|y| without."""
    own = getattr(method, "implicit_reward", None)
    if own is not None:
        return own(completions)
    beta = float(getattr(method, "beta", 1.0))
    if "ref_logp" in completions.columns:
        return beta * completions.sum_log_ratio
    return beta * completions.mean_logp


def measure(method: Method, view: View) -> Measured:
    """TRL's names where TRL has one (`rewards/chosen`, `logps/rejected`, ...), and what the method measures itself."""
    with torch.no_grad():
        return {**_of_view(method, view), **method.measure(view)}


def _of_view(method: Method, view: View) -> Measured:
    if isinstance(view, Pairs):
        return _pairs(method, view)
    if isinstance(view, Lists):
        return _completions(view.completions, "")
    if isinstance(view, Singles):
        return _singles(method, view)
    return {}


def _pairs(method: Method, view: Pairs) -> Measured:
    chosen, rejected = implicit_reward(method, view.chosen), implicit_reward(method, view.rejected)
    count = float(len(view))
    measured: Measured = {
        "rewards/chosen": (chosen.sum(), count),
        "rewards/rejected": (rejected.sum(), count),
        "rewards/margins": ((chosen - rejected).sum(), count),
        "rewards/accuracies": ((chosen > rejected).float().sum(), count),
    }
    measured |= _completions(view.chosen, "/chosen") | _completions(view.rejected, "/rejected")
    if "ref_logp" in view.chosen.columns:
        measured["displacement"] = ((view.chosen.sum_log_ratio < 0).float().sum(), count)
        measured |= _token_view(view)
    return measured


def _token_view(view: Pairs) -> Measured:
    """Log-ratios in nats, in all and per token, and where the difference of a pair's answers comes from."""
    measured: Measured = {}
    for name, one in (("chosen", view.chosen), ("rejected", view.rejected)):
        ratio = one.sum_log_ratio.sum()
        measured[f"log_ratio/{name}"] = (ratio, float(len(view)))
        measured[f"log_ratio_per_token/{name}"] = (ratio, float(one.mask.sum()))
    first = first_token_delta(view)
    measured["log_ratio/first_token_margin"] = (first.sum(), float(len(view)))
    measured["log_ratio/later_tokens_margin"] = ((view.delta - first).sum(), float(len(view)))
    return measured


def _singles(method: Method, view: Singles) -> Measured:
    measured = _completions(view.completions, "")
    if "label" not in view.completions.columns or "ref_logp" not in view.completions.columns:
        return measured
    reward, label = implicit_reward(method, view.completions), view.completions.label
    for name, where in (("chosen", label), ("rejected", ~label)):
        measured[f"rewards/{name}"] = (reward[where].sum(), float(where.sum()))
    return measured


def _completions(completions: Completions, suffix: str) -> Measured:
    count, tokens = float(len(completions)), float(completions.mask.sum())
    measured: Measured = {
        f"logps{suffix}": (completions.sum_logp.sum(), count),
        f"logps_per_token{suffix}": (completions.sum_logp.sum(), tokens),
        f"length{suffix}": (completions.length.sum(), count),
    }
    if "ref_logp" in completions.columns and not suffix:
        measured["log_ratio"] = (completions.sum_log_ratio.sum(), count)
    return measured


class Meter:
    """Adds (sum, count) on the rank; one reduction per log line."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float | Tensor]] = {}

    def add(self, measured: Mapping[str, tuple[Tensor, float]]) -> None:
        for name, (total, count) in measured.items():
            held = self.sums.setdefault(name, [0.0, 0.0])
            held[0] = held[0] + total.detach().double()
            held[1] = held[1] + count

    def add_terms(self, terms: Terms) -> None:
        """Each term of a loss of several, as its own mean."""
        if len(terms) > 1:
            self.add({f"terms/{name}": (t.scale * t.values.sum(), terms.counts[name]) for name, t in terms.items()})

    def copy(self) -> dict[str, list[float | Tensor]]:
        """`sums` as they stand, without waiting for the device."""
        return {name: list(pair) for name, pair in self.sums.items()}

    def state_dict(self) -> dict[str, list[float]]:
        return {name: [float(total), float(count)] for name, (total, count) in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.sums = {name: list(pair) for name, pair in state.items()}

    def reduced(self, world: int) -> dict[str, list[float]]:
        """`state_dict` summed over ranks. A collective where `world` > 1."""
        held = self.state_dict()
        return _reduce(held, world) if world > 1 else held

    def drain(self, world: int) -> dict[str, float]:
        """Means over all ranks, and an empty meter. A collective where `world` > 1: every rank must call it."""
        held = self.reduced(world)
        self.sums = {}
        return {name: total / count for name, (total, count) in sorted(held.items()) if count}


def _reduce(held: Mapping[str, list[float]], world: int) -> dict[str, list[float]]:
    # Ranks may hold different names (a share without any undesirable completion), so names travel with the numbers.
    gathered: list[dict[str, list[float]]] = [{}] * world
    torch.distributed.all_gather_object(gathered, dict(held))
    total: dict[str, list[float]] = {}
    for one in gathered:
        for name, (value, count) in one.items():
            pair = total.setdefault(name, [0.0, 0.0])
            pair[0] += value
            pair[1] += count
    return total
