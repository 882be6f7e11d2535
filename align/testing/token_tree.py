"""The solvable token tree: a decision problem so small that everything about it is known exactly, in float64.

Every sequence of `depth` tokens is a leaf with a reward; a reference policy is random at every prefix. Backward
induction gives the KL-regularised optimum: the soft value V* and the policy pi* that every method is, in its own way,
after. A tabular policy (a row of logits and a value per prefix) is differentiable, and the views of this module hold
all that can be drawn from the tree with its exact probability, so a method's loss of one is its population objective.

Shapes: A tokens, D tokens to a leaf, S = 1 + A + ... + A^(D-1) prefixes ordered by length and then by their tokens,
L = A^D leaves ordered by their tokens. Source of the soft Bellman equations: arXiv 2404.12358, Section 4.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from align.methods.base import Method, finish
from align.scoring.views import VIEWS, Completions, Demonstrations, Lists, Pairs, Singles, View
from align.testing.bare import replayed_detach

LISTS = 40
STEP = 1e-3
"""Length of an exact-gradient step, in logits."""


@dataclass(frozen=True, eq=False)
class Tabular:
    """A policy and a value given by a table.

    Attributes:
        logits: float64 [S, A], of the next token after each prefix.
        value: float64 [S], V of each prefix; a leaf's is 0.
    """

    logits: Tensor
    value: Tensor

    @property
    def logp(self) -> Tensor:
        """log pi(a | s), [S, A]."""
        return self.logits.log_softmax(-1)

    def parameters(self) -> list[Tensor]:
        return [self.logits, self.value]

    def tracked(self) -> Tabular:
        """A copy whose tables are leaf tensors that ask for a gradient."""
        return Tabular(*(table.clone().requires_grad_() for table in self.parameters()))

    def moved(self, direction: list[Tensor], by: float) -> Tabular:
        """The tables plus `by` times `direction` (one tensor per parameter), without gradient."""
        return Tabular(*(p.data + by * d for p, d in zip(self.parameters(), direction, strict=True)))


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A random reference policy and random rewards of the leaves.

    Attributes:
        reference: the reference policy, with value 0 everywhere.
        rewards: float64 [L].
        beta: strength of the KL leash, in units of the reward.
        depth: D, tokens of every leaf.
        anchors: names of further frozen policies, each the reference with noise on its logits.
    """

    reference: Tabular
    rewards: Tensor
    beta: float
    depth: int
    anchors: tuple[str, ...] = ()

    @classmethod
    def random(cls, seed: int = 0, *, beta: float = 0.5, depth: int = 3, tokens: int = 3) -> TokenTree:
        """Reference logits and rewards are standard normal."""
        drawn = torch.Generator().manual_seed(seed)
        prefixes = sum(tokens**t for t in range(depth))
        logits = torch.randn(prefixes, tokens, generator=drawn, dtype=torch.float64)
        rewards = torch.randn(tokens**depth, generator=drawn, dtype=torch.float64)
        return cls(Tabular(logits, torch.zeros(prefixes, dtype=torch.float64)), rewards, beta, depth)

    @property
    def size(self) -> int:
        """A, the number of tokens that may follow a prefix."""
        return self.reference.logits.shape[1]

    @property
    def tokens(self) -> Tensor:
        """Each leaf's tokens, long [L, D]."""
        powers = self.size ** torch.arange(self.depth - 1, -1, -1)
        return torch.arange(len(self.rewards))[:, None] // powers % self.size

    @property
    def prefixes(self) -> Tensor:
        """The prefix before each token of each leaf, long [L, D]."""
        powers = self.size ** torch.arange(self.depth, 0, -1)
        return torch.arange(len(self.rewards))[:, None] // powers + self._starts

    @property
    def _starts(self) -> Tensor:
        """Index of the first prefix of each length 0..D-1, long [D]."""
        return torch.tensor([sum(self.size**i for i in range(t)) for t in range(self.depth)])

    def solve(self) -> Tabular:
        """pi* (its logits are log-probabilities) and V*, by backward induction.

        Q*(s, a) = V*(s a), or the reward where `s a` is a leaf
        V*(s) = beta log sum_a pi_ref(a|s) exp(Q*(s, a) / beta)
        pi*(a|s) = pi_ref(a|s) exp((Q*(s, a) - V*(s)) / beta)
        """
        reference, after = self.reference.logp, self.rewards
        logp, value = [], []
        for start in self._starts.flip(0).tolist():
            q = after.reshape(-1, self.size)
            ref = reference[start : start + len(q)]
            after = self.beta * torch.logsumexp(ref + q / self.beta, -1)
            logp.append(ref + (q - after[:, None]) / self.beta)
            value.append(after)
        return Tabular(torch.cat(logp[::-1]), torch.cat(value[::-1]))

    def tilted(self, tilt: Tensor, base: Tensor | None = None) -> Tabular:
        """The policy proportional to base(y) exp(tilt(y)) over leaves; `tilt` and `base` (log) are [L], value 0.

        `base` is the reference's `leaf_logp` by default.
        """
        after = (self.leaf_logp(self.reference) if base is None else base) + tilt
        logits = []
        for _ in range(self.depth):
            logits.append(after.reshape(-1, self.size).log_softmax(-1))
            after = after.reshape(-1, self.size).logsumexp(-1)
        return Tabular(torch.cat(logits[::-1]), torch.zeros_like(self.reference.value))

    def leaf_logp(self, policy: Tabular) -> Tensor:
        """log pi(y) of every leaf, [L]."""
        return policy.logp[self.prefixes, self.tokens].sum(-1)

    def expected_reward(self, policy: Tabular) -> Tensor:
        """E_{y ~ policy} r(y), a scalar."""
        return (self.leaf_logp(policy).exp() * self.rewards).sum()

    def beats(self) -> Tensor:
        """Bradley-Terry P(row beats column) = sigmoid(r(row) - r(column)), [L, L]."""
        return torch.sigmoid(self.rewards[:, None] - self.rewards)

    def completions(self, policy: Tabular) -> Completions:
        """All L leaves as completions of D tokens, with every column that a frozen or trained role can supply.

        The sampler and the old policy are the reference; `token_reward` is the leaf's reward at its last token, the
        advantage what it is above the sampler's mean.
        """
        s, a = self.prefixes, self.tokens
        logp, ref = policy.logp, self.reference.logp
        terminal = self.rewards.new_zeros(len(self.rewards), 1)
        by_prefix = {
            "cross_entropy": -(ref.exp() * logp).sum(-1),
            "kl_ref_policy": (ref.exp() * (ref - logp)).sum(-1),
            "kl_policy_ref": (logp.exp() * (logp - ref)).sum(-1),
            "entropy": -(logp.exp() * logp).sum(-1),
            "log_sum_sq": (2 * logp).logsumexp(-1),
            "log_max": logp.max(-1).values,
            "logsumexp": policy.logits.logsumexp(-1),
        }
        columns = {name: table[s] for name, table in by_prefix.items()}
        columns |= {"logp": logp[s, a], "logit": policy.logits[s, a]}
        columns |= dict.fromkeys(("ref_logp", "old_logp", "sampler_logp"), ref[s, a])
        columns["value"] = torch.cat([policy.value[s], terminal], -1)
        columns["token_reward"] = torch.cat([torch.zeros_like(ref[s, a])[:, 1:], self.rewards[:, None]], -1)
        columns["reward"] = self.rewards
        gained = self.rewards - self.expected_reward(self.reference)
        columns["advantage"] = gained[:, None].expand(s.shape)
        columns["key"] = torch.arange(len(s))
        columns["step"] = torch.zeros_like(self.tokens)
        columns["finished"] = torch.ones(len(s), dtype=torch.bool)
        others = {name: random_policy(self, seed, 0.3).logp[s, a] for seed, name in enumerate(self.anchors)}
        return Completions(mask=torch.ones_like(s, dtype=torch.bool), columns=columns, anchors=others)


def population(method: Method, tree: TokenTree, policy: Tabular, state: Mapping[str, Tensor] | None = None) -> View:
    """The view of `method`'s kind that holds the whole population; `state` is the method's initial one by default."""
    shared: dict[str, Any] = {"state": method.initial_state() if state is None else state}
    names = sorted(name.removeprefix("anchor.") for name in method.requires() if name.startswith("anchor."))
    tree = replace(tree, anchors=tuple(names))
    if method.view == "pairs":
        needs = method.requires()
        asked = {name: name in needs for name in ("samples", "contrasts", "role")}
        return pairs(tree, policy, **asked, **shared)
    if method.view == "singles":
        if method.rollouts() is not None:
            return own_answers(tree, policy, **shared)
        return singles(tree, policy, samples="samples" in method.requires(), **shared)
    if method.view == "demonstrations":
        return demonstrations(tree, policy, **shared)
    return lists(tree, policy, method.view, **shared)


def pairs(
    tree: TokenTree,
    policy: Tabular,
    *,
    samples: bool = False,
    contrasts: bool = False,
    role: bool = False,
    **shared: Any,
) -> Pairs:
    """All P = L (L - 1) ordered pairs of distinct leaves, with weights pi_ref(w) pi_ref(l) P(w beats l).

    The baseline is the best leaf. With `samples`, each pair has every leaf once as a sample: the frozen policy that
    they come from is uniform. With `role`, each pair stands there twice: the policy wrote its winner, or its loser.
    """
    everything, n = tree.completions(policy), len(tree.rewards)
    sampler = tree.leaf_logp(tree.reference).exp()
    chosen, rejected = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    if role:
        chosen, rejected = chosen.repeat(2), rejected.repeat(2)
    weight = mean_one((sampler[:, None] * sampler * tree.beats())[chosen, rejected])
    differ = tree.tokens[chosen] != tree.tokens[rejected]
    made = Pairs(
        chosen=_marked(everything.select(chosen), differ),
        rejected=_marked(everything.select(rejected), differ),
        probability=torch.ones_like(weight),
        weight=weight,
        margin=(tree.rewards[chosen] - tree.rewards[rejected]),
        baseline=everything.select(torch.full_like(chosen, int(tree.rewards.argmax()))),
        **shared,
    )
    if role:
        half = len(made) // 2
        first, second = (("policy",) * half + ("reference",) * half, ("reference",) * half + ("policy",) * half)
        made = replace(made, chosen=replace(made.chosen, role=first), rejected=replace(made.rejected, role=second))
    if contrasts:
        made = _contrasted(made, everything, chosen, rejected)
    if not samples:
        return made
    drawn = everything.select(torch.arange(n).repeat(len(made)))
    return replace(made, samples=drawn, sample_pair=torch.arange(len(made)).repeat_interleave(n))


def _contrasted(made: Pairs, everything: Completions, chosen: Tensor, rejected: Tensor) -> Pairs:
    """Each pair with a contrast of each kind: its leaves stand for one answer after two prompts."""
    roles = ("intra:0:+", "intra:0:-", "inter:0:+", "inter:0:-")
    leaves = torch.stack([chosen, rejected, chosen, rejected], 1).reshape(-1)
    drawn = replace(everything.select(leaves), role=roles * len(made))
    return replace(made, contrasts=drawn, contrast_pair=torch.arange(len(made)).repeat_interleave(len(roles)))


def _marked(completions: Completions, marked: Tensor) -> Completions:
    return replace(completions, columns={**completions.columns, "marked": marked})


def singles(tree: TokenTree, policy: Tabular, *, samples: bool = False, **shared: Any) -> Singles:
    """Every leaf twice, N = 2 L: desirable with weight sigmoid(r), and undesirable with weight sigmoid(-r).

    The sampler is uniform over leaves, so that means that methods take without weights over `mismatched` (the next
    leaf) are exact too. Rows of both labels carry the leaf's reward. With `samples`, each has every leaf as a sample.
    """
    everything, n = tree.completions(policy), len(tree.rewards)
    leaves = torch.arange(n).repeat(2)
    label = torch.arange(2 * n) < n
    weight = mean_one(torch.sigmoid(torch.where(label, 1.0, -1.0) * tree.rewards[leaves]))
    own = everything.select(leaves)
    own = replace(own, columns={**own.columns, "label": label, "weight": weight})
    made = Singles(completions=own, mismatched=everything.select((leaves + 1) % n), **shared)
    if not samples:
        return made
    drawn = everything.select(torch.arange(n).repeat(2 * n))
    return replace(made, samples=drawn, sample_of=torch.arange(2 * n).repeat_interleave(n))


def own_answers(tree: TokenTree, policy: Tabular, **shared: Any) -> Singles:
    """Every leaf with weight pi(y) of the policy itself, no gradient: what a policy gradient samples.

    The reward is the probability of beating a draw of the reference.
    """
    everything = tree.completions(policy)
    wins = tree.beats() @ tree.leaf_logp(tree.reference).exp()
    weight = mean_one(tree.leaf_logp(policy).detach().exp())
    return Singles(
        completions=replace(everything, columns={**everything.columns, "reward": wins, "weight": weight}), **shared
    )


def demonstrations(tree: TokenTree, policy: Tabular, **shared: Any) -> Demonstrations:
    """Every leaf with weight pi*(y): an expert's answers."""
    everything = tree.completions(policy)
    weight = mean_one(tree.leaf_logp(tree.solve()).exp())
    columns = {**everything.columns, "weight": weight}
    return Demonstrations(completions=replace(everything, columns=columns), **shared)


def lists(tree: TokenTree, policy: Tabular, kind: str = "lists", *, seed: int = 0, **shared: Any) -> Lists:
    """`LISTS` random sets of 3 or 4 leaves, weighted by the reference's probability of drawing them.

    A score is the mean probability of beating the others of the set, as in arXiv 2402.01878. `kind` is a view's name.
    """
    rng, beats, sampler = random.Random(seed), tree.beats(), tree.leaf_logp(tree.reference).exp()
    sets = [torch.tensor(rng.sample(range(len(tree.rewards)), rng.choice((3, 4)))) for _ in range(LISTS)]
    sizes = torch.tensor([len(own) for own in sets])
    order = [rank_of(tree.rewards[own]) for own in sets]
    cls: Any = VIEWS[kind]
    return cls(
        completions=tree.completions(policy).select(torch.cat(sets)),
        group=torch.arange(LISTS).repeat_interleave(sizes),
        weight=mean_one(torch.stack([sampler[own].prod() for own in sets])),
        scores=torch.cat([(beats[own][:, own].sum(-1) - 0.5) / (len(own) - 1) for own in sets]),
        ranks=torch.cat(order),
        **shared,
    )


def rank_of(scores: Tensor) -> Tensor:
    """1 for the highest of `scores` [K], and so on; long [K]."""
    return 1 + (scores[:, None] < scores).sum(-1)


def mean_one(weight: Tensor) -> Tensor:
    """Weights scaled to a mean of 1: a loss divides by a count, and so becomes an expectation."""
    return weight * (len(weight) / weight.sum())


def objective(method: Method, tree: TokenTree, policy: Tabular, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """The method's loss of the whole population, a scalar."""
    view = population(method, tree, policy, state)
    return finish(method.loss(view), view).total()


def gradient(
    method: Method, tree: TokenTree, policy: Tabular, state: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Gradient of `objective` in the policy's logits [S, A] and values [S]; zeros where there is none."""
    at = policy.tracked()
    return gradient_of(objective(method, tree, at, state), at)


def gradient_of(loss: Tensor, at: Tabular) -> list[Tensor]:
    """Gradient of `loss` in the tables of `at`, which ask for one; zeros where there is none."""
    found = torch.autograd.grad(loss, at.parameters(), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(at.parameters(), found, strict=True)]


def norm(direction: list[Tensor]) -> float:
    """Euclidean length over all tables."""
    return float(torch.cat([part.reshape(-1) for part in direction]).norm())


def random_policy(tree: TokenTree, seed: int, spread: float = 0.7) -> Tabular:
    """The reference with normal noise on its logits, and normal values."""
    drawn = torch.Generator().manual_seed(seed + 7919)
    noise = [torch.randn(p.shape, generator=drawn, dtype=p.dtype) for p in tree.reference.parameters()]
    return tree.reference.moved(noise, spread)


def state_on(method: Method, tree: TokenTree, seed: int) -> Mapping[str, Tensor]:
    """A state that two steps on the population, under other policies, have left."""
    state: Mapping[str, Tensor] = method.initial_state()
    for step in (1, 2):
        view = population(method, tree, random_policy(tree, seed + 1000 * step), state)
        state = {name: x.detach() for name, x in method.observe(view).items()}
    return state


def step_lowers_objective(method: Method, seed: int, held: bool = False) -> str:
    """One exact-gradient step of length `STEP` lowers the population objective; returns what is wrong, or nothing.

    The state is held; what the method computes from the batch without gradient (kto's anchor) is computed anew. With
    `held` it may stay as it was where the step goes up with it: for a weight without gradient (wpo's), which may grow
    more than the loss that it weighs falls. A gradient turned round passes then, so this is for such methods alone.
    """
    tree = TokenTree.random(seed)
    policy, state = random_policy(tree, seed), state_on(method, tree, seed)
    slope = gradient(method, tree, policy, state)
    if norm(slope) == 0:
        return "the loss has no gradient at all"
    stepped = policy.moved(slope, -STEP / norm(slope))
    before, after = (float(objective(method, tree, p, state)) for p in (policy, stepped))
    if after < before:
        return ""
    wrong = f"a step of {STEP} against the gradient takes the population objective from {before:.12g} to {after:.12g}"
    if not held:
        return wrong
    stops: list[Tensor] = []
    with replayed_detach(stops, replay=False):
        held_before = float(objective(method, tree, policy, state).data)
    with replayed_detach(stops, replay=True):
        held_after = float(objective(method, tree, stepped, state).data)
    return "" if stops and held_after < held_before else wrong


def differences_on_tree(method: Method, seed: int, coordinates: int = 6) -> str:
    """Autograd equals central differences on some coordinates and in a random direction; what is wrong, or nothing.

    What the method holds without gradient stays put, as in `align.testing.bare.finite_differences`.
    """
    tree, step = TokenTree.random(seed), 1e-5
    policy, state = random_policy(tree, seed).tracked(), state_on(method, tree, seed)
    stops: list[Tensor] = []
    with replayed_detach(stops, replay=False):
        loss = objective(method, tree, policy, state)
    slope = gradient_of(loss, policy)
    allowed = 1e-5 * norm(slope) + 1e-9 * max(1.0, abs(float(loss.data)))
    for direction in _directions(policy, seed, coordinates):
        sides = []
        for by in (step, -step):
            with replayed_detach(stops, replay=True):
                sides.append(float(objective(method, tree, policy.moved(direction, by), state)))
        numeric = (sides[0] - sides[1]) / (2 * step)
        exact = float(sum((g * d).sum() for g, d in zip(slope, direction, strict=True)))
        if abs(numeric - exact) > allowed:
            return f"autograd gives {exact:.9g}, finite differences {numeric:.9g}"
    return ""


def _directions(policy: Tabular, seed: int, coordinates: int) -> list[list[Tensor]]:
    """The value of the empty prefix, `coordinates` random logits, and one random direction of length 1."""
    drawn = torch.Generator().manual_seed(seed + 104729)
    logits, value = (torch.zeros_like(p.data) for p in policy.parameters())
    picked = torch.randperm(logits.numel(), generator=drawn)[:coordinates]
    unit = torch.eye(logits.numel(), dtype=logits.dtype)
    single = [[unit[i].view_as(logits), value] for i in picked.tolist()]
    root = torch.zeros_like(value)
    root[0] = 1.0
    mixed = [torch.randn(p.shape, generator=drawn, dtype=p.dtype) for p in (logits, value)]
    return [[logits, root], *single, [part / norm(mixed) for part in mixed]]
