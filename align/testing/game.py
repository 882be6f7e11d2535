"""A method on a preference game, exactly: its loss on every pair that can be drawn, each with its probability.

A game of n answers (`align.evaluate.games`), one prompt; an answer is a single token, so a policy is n logits. The
views of this module hold all pairs or groups of answers, weighted with the probability of drawing and labelling them:
a method's loss of one is its population objective, and the gradient of it the expected gradient of a step. Everything
is float64. `align.testing.token_tree` does the same for rewards and longer sequences.

Frozen policies are named: `ref`, `old` and `sampler` are columns, every other name is an anchor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from align.core.errors import TrainingError
from align.methods.base import Method, terms_of
from align.scoring.views import Completions, Demonstrations, Groups, Pairs, View
from align.testing.token_tree import mean_one

Label = Literal["sampled", "probability", "likelier"]
_COLUMNS = ("ref", "old", "sampler")
_STEPS = 200


def as_logits(policy: np.ndarray | Tensor) -> Tensor:
    """log of a policy [n], as float64 logits."""
    return torch.as_tensor(np.asarray(policy), dtype=torch.float64).log()


def as_policy(logits: Tensor) -> np.ndarray:
    """The policy of these logits, [n]."""
    return logits.detach().softmax(-1).numpy()


def answers(logits: Tensor, frozen: Mapping[str, np.ndarray], rewards: np.ndarray | None = None) -> Completions:
    """All n answers as completions of one token.

    Args:
        logits: [n], of the policy.
        frozen: name -> [n], the probabilities of a frozen policy.
        rewards: [n] of the answers, where the method reads one.
    """
    n = len(logits)
    columns = {"logp": logits.log_softmax(-1)[:, None], "finished": torch.ones(n, dtype=torch.bool)}
    columns |= {f"{name}_logp": as_logits(frozen[name])[:, None] for name in frozen if name in _COLUMNS}
    columns |= {"key": torch.arange(n), "step": torch.zeros(n, 1, dtype=torch.long)}
    if rewards is not None:
        columns["reward"] = torch.as_tensor(rewards, dtype=torch.float64)
    anchors = {name: as_logits(policy)[:, None] for name, policy in frozen.items() if name not in _COLUMNS}
    return Completions(mask=torch.ones(n, 1, dtype=torch.bool), columns=columns, anchors=anchors)


def pairs_of(
    everything: Completions, P: np.ndarray, drawn: np.ndarray, label: Label = "sampled", **shared: Any
) -> Pairs:
    """The view of pairs, weighted by their probability.

    Args:
        everything: see `answers`; with rewards, the pairs have the difference as their margin.
        P: [n, n], P(i beats j).
        drawn: [n, n], the probability of drawing i first and j second.
        label: `sampled`: i is chosen with probability P(i beats j), else j. `likelier`: the likelier winner is chosen,
            the first one of a tie. `probability`: the first is chosen, with its probability.
        shared: further fields of the view, such as `state`.
    """
    n = len(P)
    i, j = (grid.reshape(-1) for grid in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    chance, weight = P[i, j], drawn[i, j]
    if label == "likelier":
        i, j = np.where(chance >= 0.5, i, j), np.where(chance >= 0.5, j, i)
    elif label == "sampled":
        i, j, weight = np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([weight, weight])
        weight = weight * P[i, j]
        chance = np.ones_like(weight)
    probability = chance if label == "probability" else np.ones_like(weight)
    chosen, rejected = everything.select(torch.from_numpy(i)), everything.select(torch.from_numpy(j))
    margin = chosen.reward - rejected.reward if "reward" in everything.columns else None
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        probability=torch.from_numpy(probability),
        weight=mean_one(torch.from_numpy(weight)),
        margin=margin,
        **shared,
    )


def groups_of(everything: Completions, drawn: np.ndarray, size: int, **shared: Any) -> Groups:
    """All n^size groups of `size` answers, drawn one by one from `drawn` [n]; scores are the answers' rewards."""
    drawn = np.asarray(drawn)
    tuples = np.array(list(itertools.product(range(len(drawn)), repeat=size)))
    flat = everything.select(torch.from_numpy(tuples.reshape(-1)))
    return Groups(
        completions=flat,
        group=torch.arange(len(tuples)).repeat_interleave(size),
        weight=mean_one(torch.from_numpy(drawn[tuples].prod(1))),
        scores=flat.columns.get("reward"),
        **shared,
    )


def demonstrations_of(everything: Completions, data: np.ndarray, **shared: Any) -> Demonstrations:
    """All answers as demonstrations, each with its probability `data` [n]."""
    weight = mean_one(torch.as_tensor(np.asarray(data), dtype=torch.float64))
    columns = {**everything.columns, "weight": weight}
    completions = Completions(mask=everything.mask, columns=columns, anchors=everything.anchors)
    return Demonstrations(completions=completions, **shared)


def expected_loss(method: Method, view: View) -> Tensor:
    """The method's loss of a weighted view, a scalar: an expectation, as the weights have mean 1."""
    return terms_of(method, view).total()


def expected_gradient(method: Method, view: Callable[[Tensor], View], logits: Tensor) -> Tensor:
    """Gradient of the expected loss in the logits, [n]; `view` makes the view of a policy's logits.

    What is drawn is held: no gradient goes through sampling.
    """
    at = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(expected_loss(method, view(at)), at)[0]


def minimiser(method: Method, view: Callable[[Tensor], View], start: Tensor) -> Tensor:
    """Logits [n] of mean 0 at which the expected loss of fixed draws is least, by Newton's method with halved steps.

    Raises:
        TrainingError: it has no minimum near enough to be found.
    """

    def loss(at: Tensor) -> Tensor:
        return expected_loss(method, view(at))

    logits = start.detach() - start.detach().mean()
    flat = torch.ones(len(logits), len(logits), dtype=torch.float64) / len(logits)
    for _ in range(_STEPS):
        slope = expected_gradient(method, view, logits)
        # The loss does not see a constant added to all logits; `flat` makes that direction regular.
        curvature = torch.autograd.functional.hessian(loss, logits) + flat
        direction = torch.linalg.solve(curvature, -slope)
        now, scale = float(loss(logits)), 1.0
        if float(direction.abs().max()) < 1e-11:
            return logits
        downhill = float(slope @ direction)
        while scale > 1e-6 and float(loss(logits + scale * direction)) > now + 0.1 * scale * min(downhill, 0.0):
            scale /= 2
        if scale <= 1e-6:  # float64 does not tell the losses apart any more
            return logits
        logits = logits + scale * direction
        logits = logits - logits.mean()
    raise TrainingError(f"the population loss of `{method.id}` has no minimum within {_STEPS} steps")


def descend(method: Method, view: Callable[[Tensor], View], start: Tensor, rate: float, steps: int) -> Tensor:
    """Logits [n] after `steps` steps of the expected gradient; `view` draws anew from every policy."""
    logits = start.detach().clone()
    for _ in range(steps):
        logits = logits - rate * expected_gradient(method, view, logits)
    return logits
