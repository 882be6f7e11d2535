"""What the demo does: a model from nothing, its completions, pairs by the gold preference, methods, measures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.core.files import atomic_write
from align.core.progress import Progress
from align.core.seeds import derive
from align.data.doctor import Plan, examine
from align.data.tokenise import Tokeniser
from align.evaluate import Evaluation, HeldOut, Settings, Side, evaluate_policy, load_reward, load_side, read_held_out
from align.recipe import library, schema
from align.recipe.run import prepare
from align.sampling import SamplingParams
from align.trainers.loading import load_tokenizer
from align.trainers.progress import RunProgress
from align.worlds import World
from align.worlds.start import Start, starting_model

METHODS = ("dpo", "simpo", "kto", "dpo-lora")
"""Shipped recipes `demo/NAME`."""
COMPLETIONS, HELD_OUT_PAIRS, NEW_TOKENS = 4, 128, 64
Bar = Callable[[int, str, str], AbstractContextManager[Progress]]
"""Total, label, unit -> progress."""


@dataclass(frozen=True)
class Outcome:
    """One aligned model.

    Attributes:
        pairs: that it was trained on. seconds: of training, evaluations within it included. pairs_per_second: passes
            over pairs in these seconds. log: what the run logged.
    """

    method: str
    folder: Path
    pairs: int
    seconds: float
    pairs_per_second: float
    log: list[dict[str, Any]]
    evaluation: Evaluation


@dataclass(frozen=True)
class Made:
    """What the methods start from."""

    model: Path
    pairs: Path
    held_out: Path
    counts: dict[str, int]


@dataclass(frozen=True)
class Demo:
    """One demo.

    Args:
        folder: what it writes stands there.
        prompts: training prompts; each gives at most one pair.
        bar: makes progress bars. say: prints a line.
        start: how the starting model is made; its seed is the demo's.
        evaluated: held-out prompts that the models are measured on.
    """

    world: World
    folder: Path
    seed: int
    prompts: int
    bar: Bar
    say: Callable[[str], None]
    start: Start = field(default_factory=Start)
    evaluated: int = 256

    def make(self) -> Made:
        """The model and the pairs; a model of the same world and seed is taken from the cache."""
        self.say("the starting model: trained from nothing on demonstrations, once, and kept in the cache")
        cached = starting_model(
            self.world, replace(self.start, seed=self.seed), watch=self._watch("training the starting model")
        )
        model = self.folder / "model"
        if not model.exists():
            shutil.copytree(cached, model)
        side = load_side(str(model), "float32", "cpu")
        pairs, counts = self._pairs(side, "train", self.prompts)
        held_out, _ = self._pairs(side, "held_out", HELD_OUT_PAIRS)
        return Made(model, pairs, held_out, counts)

    def _watch(self, label: str) -> Callable[[Any], None]:
        return lambda trainer: RunProgress(lambda total: self.bar(total, label, "steps"), None).attach(trainer)

    def _pairs(self, side: Side, split: Any, count: int) -> tuple[Path, dict[str, int]]:
        prompts = self.world.prompts(count, split, self.seed)
        seed = derive(self.seed, "demo", split) >> 11
        params = SamplingParams(max_new_tokens=NEW_TOKENS, seed=seed)
        with self.bar(count * COMPLETIONS, f"sampling for {split.replace('_', ' ')} pairs", "completions") as progress:
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
            _, drawn = side.sample(asked, [None] * count, COMPLETIONS, params, progress)
        texts = [[" ".join(one.text.split()) for one in own] for own in drawn]
        rows, counts = self.world.pairs(prompts, texts, self.seed)
        path = self.folder / ("pairs.jsonl" if split == "train" else "held_out.jsonl")
        return atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows)), counts

    def align(self, method: str, made: Made) -> Outcome:
        """Train by the shipped recipe of a method, with the demo's model and pairs, and measure."""
        output = self.folder / method
        recipe = schema.load(
            library.find(f"demo/{method}").path,
            [
                f"model.name={made.model}",
                f"data.train=[{made.pairs}]",
                f"data.eval=[{made.held_out}]",
                f"train.output_dir={output}",
                f"train.seed={self.seed}",
            ],
        )
        trainer = prepare(recipe)
        self._watch(f"aligning by {method}")(trainer)
        trainer.train()
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        seconds = float(next(entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry))
        done = made.counts["pairs"] * recipe.train.num_train_epochs
        evaluation = self.measure(output / "policy", made)
        return Outcome(method, output, made.counts["pairs"], seconds, done / seconds, log, evaluation)

    def measure(self, policy: Path, made: Made) -> Evaluation:
        """A policy against the starting model, on held-out prompts, one completion each."""
        baseline = load_side(str(made.model), "float32", "cpu")
        side = load_side(str(policy), "float32", "cpu")
        with self.bar(2 * self.evaluated, f"evaluating {policy.parent.name}", "completions") as progress:
            return evaluate_policy(
                side,
                baseline,
                self._held_out(baseline.tokenizer),
                policy.parent / "evaluation",
                reward=load_reward(f"align.worlds.{self.world.id}:gold_reward"),
                settings=Settings(sampling=SamplingParams(max_new_tokens=NEW_TOKENS, seed=self.seed)),
                progress=progress,
            )

    def _held_out(self, tokenizer: Any) -> HeldOut:
        prompts = self.world.prompts(HELD_OUT_PAIRS + self.evaluated, "held_out", self.seed)[HELD_OUT_PAIRS:]
        rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
        return read_held_out(rows, tokenizer)

    def data_report(self, made: Made) -> dict[str, Any]:
        """What the data doctor says of the pairs."""
        tokenise = Tokeniser(load_tokenizer(str(made.model)), "pairs", 128)
        streams = {"train": [str(made.pairs)], "eval": [str(made.held_out)]}
        return examine(streams, Plan(view="pairs", tokenise=tokenise)).report

    def run(self, methods: tuple[str, ...] = METHODS) -> tuple[Made, list[Outcome]]:
        """The whole demo."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made = self.make()
        return made, [self.align(method, made) for method in methods]
