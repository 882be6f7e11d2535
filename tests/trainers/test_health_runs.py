"""Small online runs that fall ill on purpose, each monitor by a real cause, and one that stays well."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.core.progress import Progress, silent
from align.data.rollouts import RolloutGroup
from align.feedback.base import Verdict
from align.methods import METHODS
from align.sampling.hf import HFSampler
from align.testing.tiny import EOS_ID, tiny_model, tiny_tokenizer
from align.trainers import OnlineConfig, OnlineTrainer, checkpoints
from align.trainers.health import LIMITS, Finding, Health, HealthOptions

LONGEST = 16
PROMPTS = [{"prompt": f"say the number {number}"} for number in range(48)]
HELD_OUT = [{"prompt": f"count to {number}"} for number in range(16)]
WINDOWS = {"window": 4, "eval_window": 2}


class Scored:
    """A reward that is a function of an answer's ids."""

    gives = "reward"
    key: Mapping[str, Any] = {}

    def __init__(self, name: str, function: Callable[[np.ndarray], float]) -> None:
        self.name, self.function = name, function

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        return [Verdict([self.function(one.ids) for one in group.answers], asked=len(group)) for group in groups]


def counts(ids: np.ndarray) -> float:
    """The proxy: the share of tokens of a class of one in seven. One such token, again and again, is its maximum."""
    return float((ids % 7 == 3).mean())


def gold(ids: np.ndarray) -> float:
    """What is meant: different tokens of that class."""
    return len({int(one) for one in ids if one % 7 == 3}) / LONGEST


def ending_model(share: float, seed: int = 1) -> Any:
    """A tiny model that ends an answer with about this probability at every token after these prompts."""
    model = tiny_model(seed=seed)
    prompts = tiny_tokenizer()([row["prompt"] for row in PROMPTS[::6] + HELD_OUT[::4]]).input_ids
    rng = torch.Generator().manual_seed(seed)
    states = []
    with torch.no_grad():
        for prompt in prompts:
            answers = torch.randint(8, 320, (16, LONGEST), generator=rng)
            ids = torch.cat([torch.tensor(prompt).expand(16, -1), answers], 1)
            states.append(model.model(ids).last_hidden_state[:, len(prompt) - 1 :].flatten(0, 1).double())
        flat = torch.cat(states)
        logits = flat @ model.lm_head.weight.double().T
        logits[:, EOS_ID] = -torch.inf
        wanted = torch.logsumexp(logits, 1) + np.log(share / (1 - share))
        model.lm_head.weight[EOS_ID] = torch.linalg.lstsq(flat, wanted[:, None]).solution[:, 0].float()
    return model


class Stale:
    """A sampler that weights never reach."""

    def __init__(self, model: Any) -> None:
        self.own = HFSampler(copy.deepcopy(model).eval(), tiny_tokenizer())
        self.capabilities = self.own.capabilities

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        return self.own.sample(*args, **kwargs)

    def sync(self, policy: Any) -> None:
        """Does nothing: that is its fault."""


class Watched(Health):
    """Keeps what was said."""

    def __init__(self, options: HealthOptions) -> None:
        super().__init__(options)
        self.said: list[Finding] = []
        self.seen: list[Mapping[str, float]] = []

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        found = super().observe(step, metrics)
        self.said += found
        self.seen.append(metrics)
        return found

    def column(self, name: str) -> np.ndarray:
        return np.array([one[name] for one in self.seen if name in one])

    def kinds(self) -> list[str]:
        return sorted(one.kind for one in self.said)


def online(
    folder: Path,
    reward: Scored,
    method: str = "grpo",
    options: Mapping[str, Any] | None = None,
    health: Mapping[str, Any] | None = None,
    judge: Scored | None = None,
    model: Any = None,
    **arguments: Any,
) -> OnlineTrainer:
    given: dict[str, Any] = {
        "learning_rate": 1e-2,
        "global_batch_size": 8,
        "max_steps": 30,
        "max_new_tokens": LONGEST,
        "max_length": 64,
        "logging_steps": 50,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "best_metric": None,
        "eval_every": 2 if judge else None,
    }
    run = OnlineTrainer(
        ending_model(0.15) if model is None else model,
        METHODS.get(method)(**{"num_generations": 4, **(options or {})}),
        OnlineConfig(output_dir=str(folder), **{**given, **arguments}),
        PROMPTS,
        HELD_OUT if judge else None,
        processing_class=tiny_tokenizer(),
        feedback=reward,
        eval_feedback=[judge] if judge else (),
    )
    run.health = Watched(HealthOptions(**{**WINDOWS, **(health or {})}))
    return run


HACKED = ["entropy", "kl", "over_optimisation", "repetition", "repetition", "spread"]
SHRUNK, GROWN, STALE = ["length"], ["length", "truncation"], ["ess", "mismatch"]
"""What each run is told of."""

PROXY, GOLD = Scored("proxy", counts), Scored("gold", gold)


def test_a_hacked_reward(tmp_path: Path) -> None:
    """Almost no KL term, a large learning rate: first more good tokens, which gold wants too, then one of them again
    and again, until all answers are the best there is by the proxy."""
    limits = {"kl_budget": 10.0, "truncation": "off"}
    run = online(tmp_path, PROXY, options={"beta": 1e-4}, health=limits, judge=GOLD, max_steps=44)
    run.train()
    watched: Any = run.health
    assert watched.kinds() == HACKED
    assert all(one.severity == "warn" for one in watched.said) and run.state.global_step == 44
    judged = watched.column("eval_reward/gold")
    assert judged[0] < judged.max() > 2 * judged[-1]
    assert watched.column("rollout/reward")[-1] > 0.95


def test_a_run_that_learns_in_peace(tmp_path: Path) -> None:
    """The same tokens, paid with an end of the answer, under a KL term and a smaller learning rate."""

    def ended(ids: np.ndarray) -> float:
        return counts(ids) + float(ids[-1] == EOS_ID)

    run = online(
        tmp_path,
        Scored("proxy", ended),
        options={"beta": 0.02},
        judge=GOLD,
        learning_rate=2e-3,
        max_steps=32,
        global_batch_size=16,
    )
    run.train()
    watched: Any = run.health
    assert watched.said == []
    rewards = watched.column("rollout/reward")
    assert rewards[-8:].mean() > rewards[:8].mean() + 0.05
    # Nothing was silent for want of numbers: every series and the judge had some.
    assert all(series.count for series in watched.series.values())
    assert len(watched.judged["gold"]) == 16


def test_a_stop_ends_the_run_and_its_numbers_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Paid for brevity, the policy learns to say nothing."""
    brevity = Scored("brevity", lambda ids: -float(len(ids)))
    run = online(
        tmp_path,
        brevity,
        options={"beta": 0.0},
        health={"length": "stop", "spread": "off"},
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
    )
    run.train()
    watched: Any = run.health
    assert watched.kinds() == SHRUNK
    assert watched.said[0].severity == "stop"
    assert "shrank" in watched.said[0].sentence
    assert 4 < run.state.global_step < 10
    assert watched.column("rollout/length")[0] > 3 * watched.column("rollout/length")[-1]
    numbers, _ = checkpoints.load_state(max(tmp_path.glob("checkpoint-*"), key=lambda one: int(one.name[11:])))
    assert numbers["health"]["series"]["length"]["first"] == pytest.approx(watched.column("rollout/length")[:2])


def test_answers_that_grow_until_they_are_cut(tmp_path: Path) -> None:
    size = Scored("size", lambda ids: float(len(ids)))
    model = ending_model(0.3)
    run = online(
        tmp_path, size, options={"beta": 0.0}, health={"spread": "off"}, model=model, learning_rate=1e-3, max_steps=10
    )
    run.train()
    watched: Any = run.health
    assert watched.kinds() == GROWN
    assert "grew" in next(one.sentence for one in watched.said if one.kind == "length")


def test_weights_that_do_not_reach_the_sampler(tmp_path: Path) -> None:
    run = online(tmp_path, PROXY, options={"beta": 0.0}, rollout_minibatches=2, global_batch_size=4, max_steps=12)
    engine = run.engine_for(run.model)
    run.samplers(engine).by_origin["policy"] = Stale(engine.roles.policy)
    run.train()
    watched: Any = run.health
    assert watched.kinds() == STALE
    differences = watched.column("sampler/kl")
    assert differences[0] == pytest.approx(0, abs=1e-6) and differences[-1] > 0.1  # the first weights are those it has


def test_the_runs_set_off_every_monitor() -> None:
    assert {*HACKED, *SHRUNK, *GROWN, *STALE} == set(LIMITS)
