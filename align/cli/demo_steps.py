"""What the demo does: a model from nothing, its completions, pairs by the gold preference, methods, measures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from align.core.files import atomic_write
from align.core.progress import Progress
from align.core.seeds import derive
from align.data.doctor import Plan, examine
from align.data.tokenise import Tokeniser
from align.evaluate import Evaluation, HeldOut, Settings, Side, evaluate_policy, load_reward, load_side, read_held_out
from align.recipe import extends, library, schema
from align.recipe.run import prepare
from align.recipe.sections import Recipe
from align.sampling import SamplingParams
from align.trainers.loading import load_tokenizer
from align.trainers.progress import RunProgress
from align.worlds import World
from align.worlds.rows import KINDS
from align.worlds.start import Start, starting_model

METHODS = ("dpo", "simpo", "kto", "dpo-lora")
"""What the demo runs unless told otherwise; any shipped recipe `demo/NAME` can be named."""
HELD_OUT: Final = "held_out"
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
    """What the methods start from.

    Attributes:
        model: the starting model. counts: of the training pairs, as `World.pairs` gives them.
        answers: split -> (prompts, the starting model's completions of each).
    """

    model: Path
    counts: dict[str, int]
    answers: dict[str, tuple[list[str], list[list[str]]]]


def names() -> tuple[str, ...]:
    """What the demo can run."""
    folders = (one.name.split("/") for one in library.shipped())
    return tuple(rest for folder, *below in folders if folder == "demo" for rest in ("/".join(below),))


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
        answers = {"train": self._answers(side, "train", self.prompts)}
        answers[HELD_OUT] = self._answers(side, HELD_OUT, HELD_OUT_PAIRS)
        made = Made(model, self.world.pairs(*answers["train"], self.seed)[1], answers)
        self.file(made, "pairs", "train")
        self.file(made, "pairs", HELD_OUT)
        return made

    def _watch(self, label: str) -> Callable[[Any], None]:
        return lambda trainer: RunProgress(lambda total: self.bar(total, label, "steps"), None).attach(trainer)

    def _answers(self, side: Side, split: Any, count: int) -> tuple[list[str], list[list[str]]]:
        prompts = self.world.prompts(count, split, self.seed)
        seed = derive(self.seed, "demo", split) >> 11
        params = SamplingParams(max_new_tokens=NEW_TOKENS, seed=seed)
        with self.bar(count * COMPLETIONS, f"sampling for {split.replace('_', ' ')} pairs", "completions") as progress:
            asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
            _, drawn = side.sample(asked, [None] * count, COMPLETIONS, params, progress)
        return prompts, [[" ".join(one.text.split()) for one in own] for own in drawn]

    def file(self, made: Made, kind: str, split: str) -> Path:
        """A data set of `align.worlds.rows`, written on first use: `KIND.jsonl`, `held_out.jsonl` or
        `held_out_KIND.jsonl`."""
        stem = kind if split == "train" else HELD_OUT + (f"_{kind}" if kind != "pairs" else "")
        path = self.folder / f"{stem}.jsonl"
        if not path.exists():
            rows = KINDS[kind](self.world, *made.answers[split], self.seed)
            atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    def recipe(self, method: str, made: Made, overrides: Sequence[str] = ()) -> Recipe:
        """The shipped recipe of a method, with the demo's model and data in place of those it names."""
        path = library.find(f"demo/{method}").path
        given = [f"model.name={made.model}", f"train.output_dir={self.folder / method}", f"train.seed={self.seed}"]
        for key, split in (("train", "train"), ("eval", HELD_OUT)):
            files = [self.file(made, kind, split) for kind in kinds(method, key)]
            given.append(f"data.{key}=[{', '.join(map(str, files))}]")
        guide = Path(_named(method).get("reference", {}).get("guide") or "")
        if guide.parts:
            given.append(f"reference.guide={self.folder / guide.parent.name / guide.name}")
            self._guide(guide.parent.name, made)
        return schema.load(path, [*given, *overrides])

    def _guide(self, method: str, made: Made) -> None:
        """The model that guides another method's training."""
        if not (self.folder / method / "policy").exists():
            self.say(f"a model trained by {method} is the guide, and is made first")
            self.train(method, made)

    def align(self, method: str, made: Made) -> Outcome:
        """Train by the shipped recipe of a method, with the demo's model and pairs, and measure."""
        output, log = self.train(method, made)
        seconds = float(next(entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry))
        epochs = schema.load(output / "recipe.yaml", []).train.num_train_epochs
        done = made.counts["pairs"] * epochs
        evaluation = self.measure(output / "policy", made)
        return Outcome(method, output, made.counts["pairs"], seconds, done / seconds, log, evaluation)

    def train(
        self,
        method: str,
        made: Made,
        overrides: Sequence[str] = (),
        watch: Callable[[Any], None] | None = None,
    ) -> tuple[Path, list[dict[str, Any]]]:
        """Train: (folder of the run, what it logged)."""
        recipe = self.recipe(method, made, overrides)
        trainer = prepare(recipe)
        (watch or self._watch(f"aligning by {method}"))(trainer)
        trainer.train()
        output = Path(recipe.train.output_dir)
        return output, [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]

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
                reward=load_reward(self.world.reward_name),
                settings=Settings(sampling=SamplingParams(max_new_tokens=NEW_TOKENS, seed=self.seed)),
                progress=progress,
            )

    def _held_out(self, tokenizer: Any) -> HeldOut:
        prompts = self.world.prompts(HELD_OUT_PAIRS + self.evaluated, HELD_OUT, self.seed)[HELD_OUT_PAIRS:]
        rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
        return read_held_out(rows, tokenizer)

    def data_report(self, made: Made) -> dict[str, Any]:
        """What the data doctor says of the pairs."""
        tokenise = Tokeniser(load_tokenizer(str(made.model)), "pairs", 128)
        streams = {"train": [str(self.file(made, "pairs", "train"))], "eval": [str(self.file(made, "pairs", HELD_OUT))]}
        return examine(streams, Plan(view="pairs", tokenise=tokenise)).report

    def run(self, methods: tuple[str, ...] = METHODS) -> tuple[Made, list[Outcome]]:
        """The whole demo."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made = self.make()
        return made, [self.align(method, made) for method in methods]


def kinds(method: str, key: str = "train") -> list[str]:
    """Which data sets of `align.worlds.rows` the recipe of a method reads, for `train` or `eval`."""
    return [_kind(name) for name in _named(method)["data"][key]]


def _named(method: str) -> dict[str, Any]:
    """What the recipe of a method says, unchecked: the files that it names need not be there."""
    return dict(extends.read(library.find(f"demo/{method}").path).plain())


def _kind(name: str) -> str:
    stem = Path(name).stem
    return (stem.removeprefix(HELD_OUT).lstrip("_") or "pairs") if stem.startswith(HELD_OUT) else stem
