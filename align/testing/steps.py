"""One optimiser step of a method on a tiny model, by the packed engine and by a golden twin that shares none of it.

The golden twin scores one sequence at a time by the model's plain forward, puts the whole global batch into one view
and calls backward once. It is slow and obviously right.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.core.seeds import generator
from align.data.groups import ROLES, Preference, RowId, TokenCompletion, TokenGroup
from align.data.marks import mark_differences
from align.data.partners import add_mismatched
from align.methods.base import Method, finish
from align.reference import Frozen
from align.scoring.assemble import ANCHOR, columns_needed, make_view
from align.scoring.backends import Name, prepare
from align.scoring.value import ValueModel
from align.testing.rows import ORIGINS, contrast_roles
from align.trainers.engine import VALUE, Engine
from align.trainers.metrics import Meter
from align.trainers.roles import RoleModule
from align.trainers.step import PackedStep

Gradients = dict[str, Tensor]


def random_groups(
    view: str, count: int, seed: int = 0, vocab: int = 320, longest: int = 12, needs: Collection[str] = ()
) -> list[TokenGroup]:
    """Groups of random token ids for a view: pairs, labelled or rewarded singles, scored lists, demonstrations.

    With `samples`, `baseline` or `contrasts` among `needs`, each group has one to three samples, a demonstration, or
    contrasts of prompts too; with `role`, `margin` or `old_logp`, what these say.
    """
    rng = generator(seed, "groups", view)
    branches = {"pairs": 2, "lists": 4, "groups": 4}.get(view, 1)
    groups = []
    for row in range(count):
        size = int(rng.integers(2, branches + 1)) if branches > 2 else branches
        rewards = rng.permutation(size) / max(size - 1, 1) if size > 1 else rng.random(1)
        completions = []
        for index in range(size):
            length = int(rng.integers(1, longest + 1))
            mask = np.ones(length, dtype=bool)
            mask[: int(rng.integers(0, 2)) * (length > 3)] = False
            completions.append(
                TokenCompletion(
                    ids=rng.integers(3, vocab, length).astype(np.int64),
                    mask=mask,
                    step=np.zeros(length, dtype=np.int64),
                    label=bool((row + index) % 2) if view == "singles" else None,
                    reward=float(rewards[index]),
                    weight=float(1.0 if row % 3 else 0.5),
                    step_rewards=(float(rewards[index]) - 0.4,) if "token_reward" in needs else None,
                    role=ORIGINS[(row + index) % 2] if "role" in needs else "",
                    columns=_columns(needs, generator(seed, "columns", row, index), length, vocab),
                )
            )
        margin = 0.25 * (row % 5) if "margin" in needs else None
        weight = 1.0 if row % 3 else 0.5
        preferences = (Preference(0, 1, margin=margin, weight=weight),) if view == "pairs" else ()
        roles = [ROLES["samples"]] * int(rng.integers(1, 4)) if "samples" in needs else []
        roles += [ROLES["baseline"]] * ("baseline" in needs)
        roles += contrast_roles(row % 3, 1) if "contrasts" in needs else []
        for role in roles:
            ids = rng.integers(3, vocab, int(rng.integers(1, longest + 1))).astype(np.int64)
            scored = np.arange(len(ids)) >= (len(ids) // 2 if ":" in role else 0)
            completions.append(TokenCompletion(ids, scored, np.zeros(len(ids), np.int64), role=role))
        prompt = rng.integers(3, vocab, int(rng.integers(1, longest + 1))).astype(np.int64)
        group = TokenGroup(RowId("random", row), prompt, tuple(completions), preferences)
        groups.append(mark_differences(group) if "marked" in needs else group)
    return groups


def _columns(needs: Collection[str], rng: np.random.Generator, length: int, vocab: int) -> dict[str, np.ndarray]:
    """What rollouts bring along, of numbers of their own, so that the other draws stay as they are.

    Log-probs are near those of a random model: ratios fall inside and outside a clip.
    """
    noise = {name: rng.normal(size=length) for name in ("old_logp", "sampler_logp", "advantage")}
    made = {name: -np.log(vocab) + 0.3 * noise[name] for name in ("old_logp", "sampler_logp")}
    return {name: column for name, column in {**made, "advantage": noise["advantage"]}.items() if name in needs}


def with_contexts(groups: Sequence[TokenGroup], method: Method, seed: int = 0, vocab: int = 320) -> list[TokenGroup]:
    """The groups with random prompts of other lengths for the method's `contexts`."""
    rng = generator(seed, "contexts")
    return [
        replace(group, contexts={name: rng.integers(3, vocab, int(rng.integers(2, 14))) for name in method.contexts()})
        for group in groups
    ]


def role_module(model: nn.Module, method: Method, seed: int = 0) -> RoleModule:
    """The roles a method trains, on copies of `model`; the value head gets random weights so that it matters."""
    roles: dict[str, nn.Module] = {"policy": copy.deepcopy(model)}
    if VALUE in method.requires():
        value = ValueModel(copy.deepcopy(model))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for parameter in value.head.parameters():
                parameter.normal_(0, 0.1)
        roles[VALUE] = value
    return RoleModule(roles)


def engine_for(
    method: Method, roles: RoleModule, reference: nn.Module | None, budget: int, backend: Name = "tree", **place: Any
) -> Engine:
    """An engine around unwrapped roles, on the CPU. Anchors of other policies are `guide_of(reference)`."""
    prepared = prepare(roles.policy, backend, probe=False)
    if VALUE in roles.roles:
        prepare(roles.roles[VALUE], prepared.name, probe=False)
    column = None
    if reference is not None:
        prepare(reference, prepared.name, probe=False)
        column = Frozen(reference)
    engine = Engine(
        place.pop("module", roles), roles, method, prepared, torch.device("cpu"), budget, column=column, **place
    )
    if engine.needed.live_reference:
        engine.live = reference
    if reference is not None:
        names = {full.removeprefix(ANCHOR) for full in engine.needed.anchors} - set(method.contexts())
        for name in sorted(names):
            guide = guide_of(reference)
            prepare(guide, prepared.name, probe=False)
            engine.guides = {**engine.guides, name: Frozen(guide, name=name)}
    return engine


def guide_of(model: nn.Module) -> nn.Module:
    """A frozen policy that differs from `model`: its matrices are scaled."""
    guide = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in guide.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.1)
    return guide.eval().requires_grad_(False)


def packed_step(
    engine: Engine,
    accelerator: Any,
    groups: Sequence[TokenGroup],
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> tuple[float, Gradients, dict[str, Tensor]]:
    """Loss, gradients by parameter name and next state of one step; gradients are cleared before and after."""
    engine.roles.zero_grad()
    start = engine.method.initial_state() if state is None else state
    result = PackedStep(engine, accelerator, Meter()).run(engine.ready(groups, seed), start, seed)
    gradients = {name: p.grad.clone() for name, p in engine.roles.named_parameters() if p.grad is not None}
    engine.roles.zero_grad()
    return float(result.loss), gradients, result.state


def golden_step(
    method: Method,
    roles: RoleModule,
    reference: nn.Module | None,
    groups: Sequence[TokenGroup],
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> tuple[float, Gradients]:
    """The same by one-sequence-at-a-time scoring, one view of everything and one backward."""
    roles.zero_grad()
    needed = columns_needed(method)
    groups = add_mismatched(list(groups), seed) if "mismatched" in needed.data else list(groups)
    branches = [(g, b) for g in groups for b in (*g.completions, *g.mismatched)]
    width = max(len(branch) for _, branch in branches)
    guide = None if reference is None or not needed.anchors else guide_of(reference)
    scored = []
    for group, branch in branches:
        one = _score(roles, reference, group.prompt, branch, needed.outputs, width)
        for full in needed.anchors:
            other = group.contexts.get(full.removeprefix(ANCHOR))
            prompt, frozen = (group.prompt, guide) if other is None else (other, reference)
            one[full] = _frozen_logp(frozen, prompt, branch, width)
        scored.append(one)
    outputs = {name: torch.stack([one[name] for one in scored]) for name in needed.outputs}
    view = make_view(method.view, groups, outputs, state=state or method.initial_state(), seed=seed)
    total = finish(method.loss(view), view).total()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in roles.named_parameters() if p.grad is not None}
    roles.zero_grad()
    return float(total.detach()), gradients


def _score(
    roles: RoleModule,
    reference: nn.Module | None,
    prompt: np.ndarray,
    branch: TokenCompletion,
    names: frozenset[str],
    width: int,
) -> dict[str, Tensor]:
    ids = torch.from_numpy(np.concatenate([prompt, branch.ids]))[None]
    at = slice(len(prompt) - 1, len(prompt) + len(branch) - 1)
    mask = torch.from_numpy(branch.mask)
    target = torch.from_numpy(branch.ids)[:, None]
    logits = _logits(roles.policy, ids)[at]
    policy = logits.log_softmax(-1)
    found = {"logp": policy.gather(1, target)[:, 0], "logit": logits.gather(1, target)[:, 0]}
    found |= {"logsumexp": logits.logsumexp(-1), "entropy": -(policy.exp() * policy).sum(-1)}
    came_along = branch.columns.get("old_logp")
    found["old_logp"] = found["logp"].detach() if came_along is None else torch.from_numpy(came_along).float()
    found |= {"log_sum_sq": policy.exp().square().sum(-1).log(), "log_max": policy.max(-1).values}
    if reference is not None:
        with torch.no_grad():
            other = _log_probs(reference, ids)[at]
        found["ref_logp"] = other.gather(1, target)[:, 0]
        found["cross_entropy"] = -(other.exp() * policy).sum(-1)
        found["kl_ref_policy"] = (other.exp() * (other - policy)).sum(-1)
        found["kl_policy_ref"] = (policy.exp() * (policy - other)).sum(-1)
    outputs = {
        name: nn.functional.pad(torch.where(mask, value, 0.0), (0, width - len(value)))
        for name, value in found.items()
        if name in names
    }
    if VALUE in names:
        outputs[VALUE] = _values(roles.roles[VALUE], ids, len(prompt), len(branch), width)
    return outputs


def _frozen_logp(model: Any, prompt: np.ndarray, branch: TokenCompletion, width: int) -> Tensor:
    ids = torch.from_numpy(np.concatenate([prompt, branch.ids]))[None]
    with torch.no_grad():
        logp = _log_probs(model, ids)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    return nn.functional.pad(torch.where(torch.from_numpy(branch.mask), logp, 0.0), (0, width - len(branch)))


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].float()


def _log_probs(model: Any, ids: Tensor) -> Tensor:
    return _logits(model, ids).log_softmax(-1)


def _values(value: Any, ids: Tensor, prompt: int, length: int, width: int) -> Tensor:
    hidden = value.trunk(input_ids=ids, use_cache=False).last_hidden_state[0]
    states = value.head(hidden)[prompt - 1 : prompt + length, 0]
    return nn.functional.pad(states, (0, width + 1 - len(states)))


def relative_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest ||g - g'|| / ||g'|| over parameters.

    A parameter whose gradient is below 1e-4 of the whole gradient's norm is compared with that floor: its own norm is
    rounding (a key bias has no gradient at all: a softmax does not see it).
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"gradients of different parameters: {sorted(found.keys() ^ wanted.keys())}")
    whole = float(torch.stack([g.double().norm() for g in wanted.values()]).norm())
    floor = max(1e-4 * whole, 1e-12)
    return max(
        float((found[name] - g).double().norm()) / max(float(g.double().norm()), floor) for name, g in wanted.items()
    )


def whole_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """||g - g'|| / ||g'|| of the whole gradient."""
    if found.keys() != wanted.keys():
        raise ValueError(f"gradients of different parameters: {sorted(found.keys() ^ wanted.keys())}")
    gap = torch.stack([(found[name] - g).double().norm() for name, g in wanted.items()]).norm()
    return float(gap / torch.stack([g.double().norm() for g in wanted.values()]).norm())
