"""The battery's second half: a method in real steps of a tiny model, and in a run that is stopped and resumed."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from align.core.progress import Progress, silent
from align.data.groups import TokenGroup
from align.data.rollouts import RolloutGroup
from align.feedback import Verdict
from align.methods.base import Method
from align.scoring.assemble import columns_needed
from align.testing.steps import (
    Gradients,
    engine_for,
    golden_step,
    packed_step,
    random_groups,
    relative_difference,
    role_module,
    with_contexts,
)
from align.testing.tiny import random_pairs, save_tiny, tiny_model
from align.trainers import AlignConfig, OnlineConfig, OnlineTrainer, PreferenceTrainer
from align.trainers.references import GUIDE

EVERYTHING = 1 << 20
TOLERANCE = 1e-5
CUTS = (("tree", 60), ("tree", 1), ("sdpa", 60), ("padded", 90))


class Bench:
    """A method's roles, reference and groups on one tiny model; the reference differs from the policy."""

    def __init__(self, method: Method, seed: int = 0, count: int = 11) -> None:
        needed = columns_needed(method)
        policy, other = tiny_model("qwen3", seed=seed + 1), tiny_model("qwen3", seed=seed + 2)
        self.method, self.seed = method, seed
        self.accelerator = Accelerator(cpu=True)
        self.reference: nn.Module | None = None
        if needed.reference or needed.live_reference:
            self.reference = other.eval().requires_grad_(False)
        self.roles = role_module(policy, method)
        groups = random_groups(method.view, count, seed=seed + 3, needs=method.requires())
        self.groups = with_contexts(groups, method, seed)

    def step(
        self, groups: Sequence[TokenGroup] | None = None, budget: int = EVERYTHING, backend: Any = "tree"
    ) -> tuple[float, Gradients, dict[str, torch.Tensor]]:
        engine = engine_for(self.method, self.roles, self.reference, budget, backend)
        return packed_step(engine, self.accelerator, self.groups if groups is None else groups, seed=self.seed)


def golden(method: Method, seed: int) -> str:
    """The packed step has the loss and the gradient of one-sequence-at-a-time scoring."""
    bench = Bench(method, seed)
    wanted_loss, wanted = golden_step(method, bench.roles, bench.reference, bench.groups, seed=seed)
    loss, found, _ = bench.step()
    return _compare(loss, found, wanted_loss, wanted, "one sequence at a time")


def packing(method: Method, seed: int) -> str:
    """Neither budget nor back end nor order changes the gradient."""
    bench = Bench(method, seed)
    wanted_loss, wanted, _ = bench.step()
    shuffled = list(bench.groups)
    random.Random(seed).shuffle(shuffled)
    for backend, budget in CUTS:
        for groups in (bench.groups, shuffled):
            loss, found, _ = bench.step(groups, budget, backend)
            problem = _compare(loss, found, wanted_loss, wanted, f"{backend} with {budget} tokens a micro-batch")
            if problem:
                return problem
    return ""


def resume(method: Method, seed: int) -> str:
    """A run that is stopped and resumed ends with the weights of one that is not, bit for bit (CPU)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(save_tiny(folder / "model"))
        whole = _run(method, model, folder / "whole", seed)
        _run(method, model, folder / "cut", seed, stop=2)
        resumed = _run(method, model, folder / "cut", seed)
        ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
        different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
        return f"after a resume `{different[0]}` differs" if different else ""


MODEL_CHECKS: dict[str, Callable[[Method, int], str]] = {"golden step": golden, "packing": packing, "resume": resume}


def _compare(loss: float, found: Gradients, wanted_loss: float, wanted: Gradients, what: str) -> str:
    if abs(loss - wanted_loss) > TOLERANCE * max(1.0, abs(wanted_loss)):
        return f"loss {loss:.8g}, {wanted_loss:.8g} by {what}"
    gap = relative_difference(found, wanted)
    return f"a gradient differs by {gap:.2g} from that by {what}" if gap > TOLERANCE else ""


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def rows_for(method: Method, seed: int) -> list[dict[str, Any]]:
    """Pairs, with the further answers that the method reads: two samples, a demonstration."""
    rows, others = (random_pairs(12, seed=drawn) for drawn in (seed, seed + 1))
    needs = method.requires()
    for row, other in zip(rows, others, strict=True):
        row |= {"samples": [other["chosen"], other["rejected"]]} if "samples" in needs else {}
        row |= {"baseline": other["chosen"]} if "baseline" in needs else {}
        row |= {"probability": 0.6 + 0.05 * (len(row["chosen"]) % 8)} if "probability" in needs else {}
        row |= {"margin": 0.2 * (len(row["chosen"]) % 8)} if "margin" in needs else {}
        row |= {"chosen_reward": 0.7, "rejected_reward": 0.1 * (len(row["chosen"]) % 5)} if "reward" in needs else {}
        row |= {"chosen_step_rewards": [0.7], "rejected_step_rewards": [-0.2]} if "token_reward" in needs else {}
        asked = {"better": row["prompt"] + " Be brief.", "worse": row["prompt"] + " Write in verse."}
        kinds = [{"kind": "intra", "completion": row["chosen"], **asked}, {"kind": "inter", **asked}]
        row |= {"contrasts": kinds} if "contrasts" in needs else {}
    return rows


class _ByLength:
    """Rewards an answer for the words it has, for runs that sample."""

    name = "words"
    gives: Literal["reward"] = "reward"
    key: Mapping[str, Any] = MappingProxyType({})

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        return [Verdict([len(one.text.split()) / 8 for one in group.answers], asked=len(group)) for group in groups]


def _run(method: Method, model: str, out: Path, seed: int, stop: int | None = None) -> PreferenceTrainer:
    given: dict[str, Any] = {
        "output_dir": str(out),
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 100,
        "tokens_per_micro_batch": 150,
        "seed": seed,
        "disable_tqdm": True,
        "use_cpu": True,
        "guide_model": str(save_tiny(out.parent / "guide", seed=5)) if GUIDE in method.requires() else None,
    }
    callbacks = None if stop is None else [_Stop(stop)]
    rows = rows_for(method, seed)
    trainer: PreferenceTrainer
    if method.rollouts() is None:
        trainer = PreferenceTrainer(model, method, AlignConfig(**given), rows, callbacks=callbacks)
    else:
        # Three steps a batch of rollouts, so that the stop falls into one.
        args = OnlineConfig(**given, max_new_tokens=6, rollout_minibatches=3)
        prompts = [{"prompt": row["prompt"]} for row in rows]
        trainer = OnlineTrainer(model, method, args, prompts, callbacks=callbacks, feedback=_ByLength())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer
