"""The runs that `bench.rollouts` compares: what is trained, on which world, and the curve that is measured of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from align.cli.demo_steps import Demo
from align.evaluate.exploitability import gap_of
from align.feedback import FeedbackSpec, open_feedback
from align.methods import METHODS
from align.recipe import loop, loop_run
from align.trainers import OnlineConfig, OnlineTrainer
from align.worlds import WORLDS
from align.worlds.base import as_user
from align.worlds.start import Start, starting_model
from bench.direction import _no_bar
from bench.direction_measure import Held, measure, measured_on

Curve = dict[str, Any]
POINTS = 5
"""Points of a curve, evenly over a run, its end the last."""
HELD_OUT = 400


@dataclass(eq=False)
class Seeded:
    """What all runs of a seed share."""

    number: int
    folder: Path

    def start(self, world: str) -> Path:
        """The starting model of a world, made for this seed."""
        short = {"demonstrations": 4000, "epochs": 3} if world == "twist" else {}  # six words are learnt soon
        return starting_model(WORLDS.get(world)(), Start(seed=self.number, **short))

    def prompts(self, world: str, count: int, split: Any = "train") -> list[str]:
        found: list[str] = WORLDS.get(world)().prompts(count, split, self.number)
        return found

    @cached_property
    def demo(self) -> tuple[Any, Any, Held]:
        """World `style`: its demo (768 training prompts), its starting model and pairs, and what is measured on."""
        demo = Demo(WORLDS.get("style")(), self.folder / "demo", self.number, 768, _no_bar, str)
        demo.folder.mkdir(parents=True, exist_ok=True)
        made = demo.make()
        return demo, made, measured_on(demo, made)

    @cached_property
    def aligned(self) -> Path:
        """World `style`: the starting model after dpo on its pairs, which can rank answers against what it was."""
        demo, made, _ = self.demo
        output: Path = demo.train("dpo", made, ["data.eval=null", "train.num_train_epochs=1"], lambda trainer: None)[0]
        return output / "policy"


@dataclass(frozen=True)
class Run:
    """A key, and what measures it."""

    key: str
    measure: Callable[[Seeded], Curve]


# -- twist: the duality gap at equal samples -------------------------------------------------------------------------

TAU = 0.05
"""Strength of the leash of all; dpo's beta is 4 tau, at which its slope near P = 1/2 is that of ipo's tau."""
STEPS, PROMPTS, SAMPLES = 160, 32, 2
ROUNDS = 10
PREFERENCE = FeedbackSpec(kind="pairwise_function", name="align.worlds.twist:gold_preference")
REWARD = FeedbackSpec(kind="function", name="align.worlds.twist:gold_reward")


def online(
    seeded: Seeded, world: str, method: str, options: Mapping[str, Any], judge: FeedbackSpec, key: str, **changes: Any
) -> Path:
    """Train a method that samples; its checkpoints stand in the folder."""
    given: dict[str, Any] = {
        "learning_rate": 3e-4,
        "global_batch_size": PROMPTS,
        "max_steps": STEPS,
        "max_new_tokens": 12,
        "max_length": 128,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 20,
        "save_total_limit": None,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seeded.number,
        "tokens_per_micro_batch": 4096,
        **changes,
    }
    output = seeded.folder / f"run-{key.replace(' ', '-')}"
    args = OnlineConfig(output_dir=str(output), save_strategy="steps", save_steps=given["max_steps"] / POINTS, **given)
    rows = [{"prompt": as_user(prompt)} for prompt in seeded.prompts(world, 4096 if world == "style" else 2048)]
    trainer = OnlineTrainer(
        str(seeded.start(world)), METHODS.get(method)(**options), args, rows, feedback=open_feedback(judge)
    )
    trainer.train()
    return output


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """(step, policy) of a run, oldest first."""
    steps = {int(one.name.rpartition("-")[2]): one / "policy" for one in output.glob("checkpoint-*")}
    return sorted(steps.items())


def gaps(seeded: Seeded, policies: list[tuple[int, Path]]) -> Curve:
    """Duality gap, shares of the classes and malformed answers at some numbers of samples."""
    world, held = WORLDS.get("twist")(), seeded.prompts("twist", HELD_OUT, "held_out")
    found = [gap_of(policy, world, held, 3, seeded.number) for _, policy in policies]
    return {
        "samples": [samples for samples, _ in policies],
        "gap": [one.gap.value for one in found],
        "shares": [one.shares.tolist() for one in found],
        "malformed": [one.malformed.value for one in found],
    }


def twist(key: str, method: str, options: Mapping[str, Any], judge: FeedbackSpec, seeded: Seeded) -> Curve:
    output = online(seeded, "twist", method, options, judge, key)
    per_step = PROMPTS * SAMPLES
    policies = [(0, seeded.start("twist")), *((step * per_step, one) for step, one in checkpoints(output))]
    return gaps(seeded, policies)


def twist_inpo(seeded: Seeded) -> Curve:
    """INPO in rounds: two samples a prompt and sampled labels, as its proof has it."""
    each = STEPS * PROMPTS // ROUNDS
    output = rounds(
        seeded,
        "inpo",
        {
            "model": {"name": str(seeded.start("twist"))},
            "data": {"prompts": [str(written(seeded, "twist", ROUNDS * each))]},
            "sample": {"n": SAMPLES, "max_new_tokens": 12, "seed": seeded.number},
            "feedback": [{"kind": "pairwise_function", "name": PREFERENCE.name}],
            "pairs": {"rule": "all", "label": "sampled"},
            "method": {"name": "inpo", "eta": 0.25, "tau": TAU},
            "loop": {"preset": "inpo", "rounds": ROUNDS, "prompts": each, "seed": seeded.number},
            "train": training(seeded, 3e-4, 3),
        },
    )
    policies = [(0, seeded.start("twist"))]
    policies += [(number * each * SAMPLES, one) for number, one in policies_of(output)]
    return gaps(seeded, policies)


# -- style: gold reward at equal KL ----------------------------------------------------------------------------------

GOLD = FeedbackSpec(kind="function", name="align.worlds.style:gold_reward")


def style(key: str, method: str, options: Mapping[str, Any], changes: Mapping[str, Any], seeded: Seeded) -> Curve:
    output = online(seeded, "style", method, options, GOLD, key, max_new_tokens=48, max_steps=120, **changes)
    return style_curve(seeded, checkpoints(output))


def style_dpo(seeded: Seeded) -> Curve:
    """Offline: the pairs of the demo, four epochs."""
    demo, made, _ = seeded.demo
    words = ["data.eval=null", f"train.output_dir={seeded.folder / 'run-dpo'}", "train.num_train_epochs=4"]
    words += ["train.save_steps=0.125", "train.save_total_limit=null", "train.lr_scheduler_type=constant_with_warmup"]
    output, _ = demo.train("dpo", made, words, lambda trainer: None)
    return style_curve(seeded, checkpoints(output))


def style_curve(seeded: Seeded, policies: list[tuple[int, Path]]) -> Curve:
    """Gold reward, KL to the start and length, at the start and along a run."""
    _, made, held = seeded.demo
    found = [measure(policy, made.model, held) for policy in (made.model, *(one for _, one in policies))]
    names = {"gold": "gold_reward", "kl": "kl", "length": "length", "entropy": "entropy"}
    steps: Curve = {"step": [0, *(step for step, _ in policies)]}
    return steps | {name: [one[metric] for one in found] for name, metric in names.items()}


# -- cream: consistency and gold reward over rounds ------------------------------------------------------------------


def cream(method: Mapping[str, Any], key: str, seeded: Seeded) -> Curve:
    """Three rounds in which the policy ranks its own answers by what it was taught, trusted wholly or as far as C."""
    _, made, held = seeded.demo
    output = rounds(
        seeded,
        key,
        {
            "model": {"name": str(seeded.aligned)},
            "data": {"prompts": [str(written(seeded, "style", 3 * 320))]},
            "sample": {"max_new_tokens": 48, "seed": seeded.number},
            "method": dict(method),
            "loop": {"preset": "cream", "rounds": 3, "prompts": 320, "base": str(made.model), "seed": seeded.number},
            "train": training(seeded, 7e-5, 1),
        },
    )
    found = [measure(policy, made.model, held) for policy in (seeded.aligned, *(one for _, one in policies_of(output)))]
    records = json.loads((output / "loop.json").read_text(encoding="utf-8"))["rounds"]
    return {
        "consistency": [one["consistency"] for one in records],
        "gold": [one["gold_reward"] for one in found],
        "kl": [one["kl"] for one in found],
        "length": [one["length"] for one in found],
    }


# -- rounds ----------------------------------------------------------------------------------------------------------


def written(seeded: Seeded, world: str, count: int) -> Path:
    """A file of prompts."""
    path = seeded.folder / f"{world}-prompts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": as_user(prompt)} for prompt in seeded.prompts(world, count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def training(seeded: Seeded, rate: float, epochs: int) -> dict[str, Any]:
    return {
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "global_batch_size": PROMPTS,
        "lr_scheduler_type": "cosine",
        "tokens_per_micro_batch": 4096,
        "save_steps": 100000,
        "seed": seeded.number,
    }


def rounds(seeded: Seeded, key: str, sections: Mapping[str, Any]) -> Path:
    """Run a loop in this process; its folder."""
    output = seeded.folder / f"run-{key}"
    path = seeded.folder / f"{key}.yaml"
    path.write_text(yaml.safe_dump({**sections, "output_dir": str(output)}))
    recipe = loop.read(path)
    loop_run.run(recipe, loop_run.InProcess(recipe), print)
    return output


def policies_of(output: Path) -> list[tuple[int, Path]]:
    """(round, policy) of a loop."""
    folders = {int(one.name.rpartition("-")[2]): one / "train" / "policy" for one in output.glob("round-*")}
    return sorted(folders.items())


def _twist(name: str, method: str, judge: FeedbackSpec = PREFERENCE, **options: Any) -> Run:
    return Run(f"twist {name}", partial(twist, f"twist {name}", method, options, judge))


def _style(name: str, method: str, options: Mapping[str, Any], **changes: Any) -> Run:
    return Run(f"style {name}", partial(style, f"style {name}", method, options, changes))


PARTS: dict[str, tuple[Run, ...]] = {
    "twist": (
        _twist("online_dpo reward", "online_dpo", REWARD, beta=4 * TAU),
        _twist("online_dpo hard", "online_dpo", beta=4 * TAU),
        _twist("online_dpo sampled", "online_dpo", beta=4 * TAU, label="sampled"),
        _twist("online_ipo", "online_ipo", tau=TAU),
        _twist("nash_md", "nash_md", tau=TAU, mix=0.125),
        Run("twist inpo", twist_inpo),
    ),
    "style": (
        Run("style dpo", style_dpo),
        _style("online_dpo", "online_dpo", {"beta": 0.1}),
        _style(
            "grpo",
            "grpo",
            {"num_generations": 4, "beta": 0.0, "aggregation": "tok"},
            global_batch_size=16,
        ),
    ),
    "cream": (
        Run("cream cream", partial(cream, {"name": "soft_dpo", "beta": 0.1}, "cream")),
        Run("cream self_rewarding", partial(cream, {"name": "dpo", "beta": 0.1}, "self_rewarding")),
    ),
}
