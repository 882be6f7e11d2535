"""A method on a preference game, exactly: its loss on every pair that can be drawn, each with its probability.

A game of n answers (`align.evaluate.games`), one prompt; an answer is a single token, so a policy is n logits. The
views of this module hold all pairs or groups of answers, weighted with the probability of drawing and labelling them:
a method's loss of one is its population objective, and the gradient of it the expected gradient of a step. Everything
is float64. `align.testing.token_tree` does the same for rewards and longer sequences.

Frozen policies are named: `ref`, `old` and `sampler` are columns, every other name is an anchor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from align.core.errors import ConfigError, TrainingError
from align.evaluate.games import geometric_mixture
from align.methods.base import Draw, Method, terms_of
from align.scoring.views import Completions, Demonstrations, Groups, Pairs, Singles, View
from align.shaping import base as shaping
from align.shaping.base import ShapingStage
from align.testing.token_tree import mean_one

Label = Literal["sampled", "hard", "prob"]
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
    everything: Completions,
    P: np.ndarray,
    drawn: np.ndarray,
    label: Label = "sampled",
    roles: tuple[str, str] = ("policy", "policy"),
    **shared: Any,
) -> Pairs:
    """The view of pairs, weighted by their probability.

    Args:
        everything: see `answers`; with rewards, a pair's margin is their difference.
        P: [n, n], P(i beats j).
        drawn: [n, n], the probability of drawing i first and j second.
        label: as in `align.methods.base.Rollouts`. `sampled`: i is chosen with probability P(i beats j), else j;
            `hard`: the likelier winner is chosen, a tie is left out; `prob`: the likelier winner is, with its P.
        roles: who wrote the first and the second.
        shared: further fields of the view, such as `state`.
    """
    n = len(P)
    i, j = (grid.reshape(-1) for grid in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    if label == "sampled":
        first = np.repeat([True, False], n * n)
        i, j = np.tile(i, 2), np.tile(j, 2)
        weight = drawn[i, j] * np.where(first, P[i, j], P[j, i])
    else:
        first = P[i, j] >= 0.5
        weight = drawn[i, j] * (1.0 if label == "prob" else P[i, j] != 0.5)
    chosen, rejected = np.where(first, i, j), np.where(first, j, i)
    chance = P[chosen, rejected] if label == "prob" else np.ones(len(chosen))
    rewards = everything.columns.get("reward")
    return Pairs(
        chosen=_written(everything, chosen, np.where(first, *roles)),
        rejected=_written(everything, rejected, np.where(first, *roles[::-1])),
        probability=torch.from_numpy(chance),
        weight=mean_one(torch.from_numpy(weight)),
        margin=None if rewards is None else rewards[torch.from_numpy(chosen)] - rewards[torch.from_numpy(rejected)],
        **shared,
    )


def _written(everything: Completions, index: np.ndarray, roles: np.ndarray) -> Completions:
    return replace(everything.select(torch.from_numpy(index)), role=tuple(roles.tolist()))


def firsts_of(everything: Completions, P: np.ndarray, drawn: np.ndarray, **shared: Any) -> Singles:
    """The first of every two answers, weighted by `drawn` [n, n], that of i and then j; `reward` is P(i beats j)."""
    n = len(P)
    i, j = (grid.reshape(-1) for grid in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    own = everything.select(torch.from_numpy(i))
    columns = {**own.columns, "reward": torch.from_numpy(P[i, j]), "weight": mean_one(torch.from_numpy(drawn[i, j]))}
    return Singles(completions=replace(own, columns=columns), **shared)


def groups_of(
    everything: Completions,
    P: np.ndarray,
    laws: Sequence[np.ndarray],
    stages: Sequence[ShapingStage] = (),
    **shared: Any,
) -> Groups:
    """All groups of one answer from each of `laws` ([n] each), weighted by their probability.

    Scores are the answers' rewards; where these have none, how often an answer beats the others of its group on average
    (spo). With `stages`, `advantage` is what they make of them, group by group.
    """
    tuples = np.array(list(itertools.product(range(len(P)), repeat=len(laws))))
    weight = np.prod([law[tuples[:, place]] for place, law in enumerate(laws)], axis=0)
    own = everything.select(torch.from_numpy(tuples.reshape(-1)))
    if "reward" not in own.columns:
        against = P[tuples[:, :, None], tuples[:, None, :]].sum(2) - 0.5
        peers = torch.from_numpy(against.reshape(-1) / (len(laws) - 1))
        own = replace(own, columns={**own.columns, "reward": peers})
    group = np.arange(len(tuples)).repeat(len(laws))
    if stages:
        columns = {**own.columns, "advantage": torch.from_numpy(_advantages(own, group, stages))}
        own = replace(own, columns=columns)
    return Groups(
        completions=own,
        group=torch.from_numpy(group),
        weight=mean_one(torch.from_numpy(weight)),
        scores=own.columns.get("reward"),
        **shared,
    )


def _advantages(own: Completions, group: np.ndarray, stages: Sequence[ShapingStage]) -> np.ndarray:
    """What stages that look at one group at a time make of the rewards, [N, 1]."""
    n = len(own)
    ratio = (own.old_logp - own.ref_logp).numpy() if "ref_logp" in own.columns else None
    ones = np.ones(n, dtype=bool)
    batch = shaping.Batch(
        group=group,
        reward=own.reward.numpy(),
        length=np.ones(n, dtype=np.int64),
        finished=ones,
        mask=ones[:, None],
        advantage=np.zeros((n, 1)),
        train=ones,
        log_ratio=ratio,
    )
    return shaping.run(stages, batch).advantage


def demonstrations_of(everything: Completions, data: np.ndarray, **shared: Any) -> Demonstrations:
    """All answers as demonstrations, each with its probability `data` [n]."""
    weight = mean_one(torch.as_tensor(np.asarray(data), dtype=torch.float64))
    return Demonstrations(completions=replace(everything, columns={**everything.columns, "weight": weight}), **shared)


def live(
    method: Method, P: np.ndarray, frozen: Mapping[str, np.ndarray], rewards: np.ndarray | None = None
) -> Callable[[Tensor], View]:
    """The views of an online method's steps: logits -> everything that it might sample and be told there.

    What is drawn, judged and selected is what `method.rollouts()` declares; the old policy and the sampler are the
    present one.

    Args:
        frozen: name -> [n]; with `ref` where the method draws from the reference.
        rewards: [n], for a method whose feedback is a reward; see `groups_of` where there are none.

    Raises:
        ConfigError: the method declares no rollouts.
    """
    asked = method.rollouts()
    if asked is None:
        raise ConfigError(f"method `{method.id}` samples nothing before a step", mend="make its view of fixed draws")

    def view(logits: Tensor) -> View:
        policy = as_policy(logits)
        everything = answers(logits, {**frozen, "old": policy, "sampler": policy}, rewards)
        writers = [(draw.origin, _law(draw, policy, frozen)) for draw in asked.draws for _ in range(draw.count)]
        if asked.select == "group":
            stages = [shaping.make(stage.id, stage.options) for stage in asked.shaping]
            return groups_of(everything, P, [law for _, law in writers], stages)
        (one, first), (other, second) = writers[:2]
        drawn = np.outer(first, second)
        if asked.select == "first":
            return firsts_of(everything, P, drawn)
        return pairs_of(everything, P, drawn, asked.label, (one, other))

    return view


def _law(draw: Draw, policy: np.ndarray, frozen: Mapping[str, np.ndarray]) -> np.ndarray:
    """The distribution of a draw's answers, [n]; of one token, so that token by token is as a whole."""
    if draw.origin == "policy":
        return policy
    return geometric_mixture(policy, frozen["ref"], 1.0 if draw.origin == "reference" else draw.mix)


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
        direction, singular = torch.linalg.solve_ex(curvature, -slope)
        if int(singular):
            break
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
    raise TrainingError(
        f"the population loss of `{method.id}` has no minimum",
        why=f"{_STEPS} steps of Newton's method do not end, or the loss has become flat",
    )


def stationary(method: Method, view: Callable[[Tensor], View], start: Tensor) -> Tensor:
    """Logits [n] of mean 0 at which the expected gradient of live draws is 0, by Newton's method from near it.

    Draws move with the policy, so this is where steps of the method end, and no minimum of anything.

    Raises:
        TrainingError: it is not found.
    """
    logits, n, by = start.detach() - start.detach().mean(), len(start), 1e-5
    unit, flat = torch.eye(n, dtype=torch.float64), torch.ones(n, n, dtype=torch.float64) / n
    for _ in range(_STEPS):
        slope = expected_gradient(method, view, logits)
        if float(slope.abs().max()) < 1e-12:
            return logits
        sides = [
            (expected_gradient(method, view, logits + by * e) - expected_gradient(method, view, logits - by * e))
            / (2 * by)
            for e in unit
        ]
        logits = logits + torch.linalg.solve(torch.stack(sides, dim=1) + flat, -slope)
        logits = logits - logits.mean()
    raise TrainingError(f"no point found at which `{method.id}` stops", mend="start nearer to it")


def descend(method: Method, view: Callable[[Tensor], View], start: Tensor, rate: float, steps: int) -> Tensor:
    """Logits [n] after `steps` steps of the expected gradient; `view` draws anew from every policy."""
    logits = start.detach().clone()
    for _ in range(steps):
        logits = logits - rate * expected_gradient(method, view, logits)
    return logits
