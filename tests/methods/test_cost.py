"""What a step costs beyond the model: nothing extra in the model, and a loss of microseconds a pair."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from align.methods import METHODS, Method, method
from align.methods.evaluate import make_bare_view
from align.scoring.assemble import columns_needed
from align.testing.rows import random_rows, tracked
from align.testing.steps import engine_for, packed_step, random_groups, role_module
from align.testing.tiny import tiny_model

MODELS = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
BUDGET = 30
"""Tokens a micro-batch: several of them, so that a second pass over them would be counted."""

MS_PER_100 = 1.0
SLOW_MACHINE = 5
"""How much slower than stated a machine may be before the test fails."""


def plain(name: str) -> bool:
    """Whether a method reads nothing beyond log-probs of policy and reference, and what the rows say."""
    needed = columns_needed(METHODS.get(name)())
    extra = needed.previous | needed.value | needed.anchors | (needed.data & {"mismatched", "samples", "baseline"})
    return needed.engine == {"logp"} and not extra


PLAIN = [name for name in METHODS.entries() if plain(name)]


@method("plainest", view="pairs", needs={"ref_logp"})
class OnPairs(Method):
    """The log-ratio itself; what any loss of a view must at least score."""

    def loss(self, view: Any) -> Tensor:
        return view.delta


@method("plainest", view="singles", needs={"ref_logp"})
class OnSingles(Method):
    """As above."""

    def loss(self, view: Any) -> Tensor:
        return view.completions.sum_log_ratio


@method("plainest", view="demonstrations", needs={"ref_logp"})
class OnDemonstrations(OnSingles):
    """As above."""


@method("plainest", view="lists", needs={"ref_logp"})
class OnLists(Method):
    """As above."""

    def loss(self, view: Any) -> Tensor:
        return view.weight.new_zeros(len(view)).index_add(0, view.group, view.completions.sum_log_ratio.to(view.weight))


BASE = {cls.view: cls for cls in (OnPairs, OnSingles, OnDemonstrations, OnLists)}


@dataclass
class Count:
    """Forwards of a model's trunk, tokens in them, and positions that reach its head."""

    forwards: int = 0
    tokens: int = 0
    positions: int = 0
    handles: list[Any] = field(default_factory=list, compare=False)

    def watch(self, model: Any) -> Count:
        def trunk(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = kwargs.get("input_ids", args[0] if args else None)
            self.forwards, self.tokens = self.forwards + 1, self.tokens + given.numel()

        def head(module: nn.Module, args: Any) -> None:
            self.positions += args[0].shape[:-1].numel()

        self.handles.append(model.model.register_forward_hook(trunk, with_kwargs=True))
        self.handles.append(model.lm_head.register_forward_pre_hook(head))
        return self


def cost(made: Method, budget: int = BUDGET) -> tuple[Count, Count]:
    """What one step asks of the policy and of the reference, on the same groups for every method of a view."""
    reference = copy.deepcopy(MODELS[1]).requires_grad_(False)
    roles = role_module(MODELS[0], made)
    # Columns of rollouts come with the groups; further answers would be a cost of their own.
    needs = made.requires() - {"samples", "contrasts", "baseline"}
    groups = random_groups(made.view, 4, seed=3, needs=needs)
    engine = engine_for(made, roles, reference if columns_needed(made).reference else None, budget)
    counts = Count().watch(roles.policy), Count().watch(reference)
    packed_step(engine, Accelerator(cpu=True), groups)
    return counts


@pytest.fixture(scope="module")
def least() -> dict[str, tuple[Count, Count]]:
    return {}


@pytest.mark.parametrize("name", PLAIN)
def test_a_method_without_extra_needs_scores_what_dpo_scores(name: str, least: dict[str, tuple[Count, Count]]) -> None:
    made: Method = METHODS.get(name)()
    coupled = made.coupling == "batch"
    # A coupled method has a pass without gradient before it, unless the batch is one micro-batch.
    budget = 1 << 20 if coupled else BUDGET
    view = f"{made.view} {budget}"
    if view not in least:
        least[view] = cost(METHODS.get("dpo")() if made.view == "pairs" else BASE[made.view](), budget)
    policy, reference = cost(made, budget)
    wanted, wanted_reference = least[view]
    assert wanted.positions and wanted.forwards > (0 if coupled else 1)
    assert policy == wanted
    assert reference == (wanted_reference if columns_needed(made).reference else Count())


def test_dpo_itself_scores_the_least_there_is_to_score() -> None:
    assert cost(METHODS.get("dpo")()) == cost(OnPairs())
    scored = sum(int(one.mask.sum()) for group in random_groups("pairs", 4, seed=3) for one in group.completions)
    policy, _ = cost(METHODS.get("dpo")())
    assert policy.positions == scored


def test_a_method_that_asks_for_more_is_seen() -> None:
    kto, others = cost(METHODS.get("kto")()), cost(OnSingles())
    assert all(
        more.positions > less.positions and more.tokens > less.tokens for more, less in zip(kto, others, strict=True)
    )
    kl, without = cost(METHODS.get("tdpo")()), cost(OnPairs())
    assert kl[1] != without[1]


def milliseconds(made: Method, units: int = 100, longest: int = 64) -> float:
    """Median processor time of `loss` on `units` rows in float32, the graph for the backward pass included."""
    rows, _ = tracked(random_rows(made, units, seed=5, longest=longest), torch.float32)
    view = make_bare_view(made.view, rows, requires=made.requires(), state=made.initial_state(), dtype=torch.float32)
    times = []
    for _ in range(15):
        started = time.thread_time()
        made.loss(view)
        times.append(time.thread_time() - started)
    return 1e3 * statistics.median(times)


@pytest.mark.parametrize("name", PLAIN)
def test_the_loss_of_100_units_takes_a_millisecond(name: str) -> None:
    assert milliseconds(METHODS.get(name)()) <= MS_PER_100 * SLOW_MACHINE
