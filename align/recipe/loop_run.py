"""The stages of a recipe's rounds, run in this process or each in one of its own; the artefacts are the same."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import yaml

from align.core.errors import ConfigError, DataError, TrainingError
from align.core.files import MANIFEST, atomic_write, verify_manifest
from align.core.progress import Progress, silent
from align.core.seeds import derive, generator
from align.data.prepare import open_sources
from align.loops.mix import make_data
from align.loops.rounds import TRAINED, Plan, Roles, Round, Stage, next_round, read_records, run_rounds
from align.loops.stages import judge_stage, pairs_stage, sample_stage
from align.loops.weights import extrapolate
from align.recipe import provenance, rules
from align.recipe.collect import Collect
from align.recipe.loop import ROLES, LoopRecipe
from align.recipe.run import model_path, prepare, streams
from align.recipe.sections import Recipe, Stream
from align.recipe.stages import judge_plan, pair_plan, sample_plan

RECIPE = "recipe.yaml"
Watch = Callable[[int, str, str], AbstractContextManager[Progress]]
"""Total, label, unit -> progress."""
_SEEDS = 1 << 31


def unwatched(total: int, label: str, unit: str) -> AbstractContextManager[Progress]:
    """Nobody looks."""
    return nullcontext(silent)


class InProcess:
    """Stages one after the other in this process.

    Args:
        recipe: of the loop. watch: progress of the stages.
    """

    def __init__(self, recipe: LoopRecipe, watch: Watch = unwatched) -> None:
        self.recipe, self.watch = recipe, watch
        self.plan: Plan = recipe.plan(model_path(recipe.train))

    def stages(self, one: Round) -> Sequence[Stage]:
        """See `Runner`."""
        loop, found = self.recipe.loop, list[Stage](["sample"])
        if self.recipe.collect.feedback:
            found.append("judge")
        found.append("pairs")
        if one.earlier or loop.consistency is not None:
            found.append("data")
        found.append("train")
        if loop.extrapolate or self.recipe.train.model.peft is not None:
            found.append("promote")
        if loop.evaluation is not None:
            found.append("evaluate")
        return found

    def run(self, stage: Stage, one: Round) -> None:
        """See `Runner`."""
        {
            "sample": self._sample,
            "judge": self._judge,
            "pairs": self._pairs,
            "data": self._data,
            "train": self._train,
            "promote": self._promote,
            "evaluate": self._evaluate,
        }[stage](one)

    def finished(self, stage: Stage, one: Round) -> bool:
        """See `Runner`. By the file that a stage writes last."""
        last = {"train": TRAINED, "evaluate": "result.json"}.get(stage, MANIFEST)
        return (one.place(stage) / last).is_file()

    def _sample(self, one: Round) -> None:
        plan = dataclasses.replace(sample_plan(self.collect(one)), iteration=one.number)
        sample_stage(plan, one.place("sample"), lambda total: self.watch(total, "sampling", "answers"))

    def _judge(self, one: Round) -> None:
        plan = judge_plan(self.collect(one))
        judge_stage(plan, one.place("judge"), lambda total: self.watch(total, "judging", "prompts"))

    def _pairs(self, one: Round) -> None:
        plan = pair_plan(self.collect(one))
        pairs_stage(plan, one.place("pairs"), lambda total: self.watch(total, "pairing", "prompts"))

    def _data(self, one: Round) -> None:
        make_data(one, self.recipe.loop.seed, self.recipe.loop.consistency)

    def _train(self, one: Round) -> None:
        trainer = prepare(self.training(one))
        trainer.train()
        if trainer.stopped_by_signal:
            raise _stopped(one)
        trained(one)

    def _promote(self, one: Round) -> None:
        made = one.place("train") / "policy"
        if self.recipe.loop.extrapolate:
            extrapolate(made, one.roles.trained, self.recipe.loop.extrapolate, one.place("promote"))
            return
        from align.trainers.merge import merge_adapter

        trust = self.recipe.train.model.trust_remote_code
        merge_adapter(made, one.place("promote"), base=one.roles.start, dtype="float32", trust_remote_code=trust)

    def _evaluate(self, one: Round) -> None:
        from align.evaluate import save_result

        save_result(evaluation_of(self.recipe, one, self.watch), one.place("evaluate"))

    def collect(self, one: Round) -> Collect:
        """The recipe of a round that samples, judges and pairs."""
        own, loop = self.recipe.collect, self.recipe.loop
        if own.model is None or own.pairs is None:
            raise ConfigError("the recipe has no `model` or no `pairs`", mend="add `model: {name: ...}`")

        def seed(of: int) -> int:
            return derive(of, "round", one.number) % _SEEDS

        prompts = prompts_of(own.data.prompts, self.plan.rounds, one, loop.take or "same", loop.prompts, loop.seed)
        return dataclasses.replace(
            own,
            output_dir=str(one.folder),
            model=dataclasses.replace(own.model, name=one.roles.policy, revision=None),
            data=dataclasses.replace(own.data, prompts=prompts),
            sample=dataclasses.replace(own.sample, seed=seed(own.sample.seed)),
            pairs=dataclasses.replace(own.pairs, seed=seed(own.pairs.seed)),
            feedback=tuple(played(entry, one.roles, loop.base) for entry in own.feedback),
        )

    def training(self, one: Round) -> Recipe:
        """The recipe of a round's training."""
        recipe, roles = self.recipe.train, one.roles
        reference = recipe.reference
        if self.recipe.uses.reference:
            reference = dataclasses.replace(reference, model=roles.reference)
        if self.recipe.uses.previous and roles.start != roles.policy:
            reference = dataclasses.replace(reference, previous=roles.policy)
        return dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, name=roles.start, revision=None),
            data=dataclasses.replace(recipe.data, train=(Stream(name=str(one.train_data)),)),
            reference=reference,
            train=dataclasses.replace(
                recipe.train,
                output_dir=str(one.place("train")),
                seed=derive(recipe.train.seed, "round", one.number) % _SEEDS,
            ),
        )

    def counts(self, one: Round) -> Mapping[str, Any]:
        """See `Runner`."""
        found: dict[str, Any] = {}
        for stage in self.stages(one):
            if stage in ("sample", "judge", "pairs"):
                found[stage] = verify_manifest(one.place(stage), hashes=False)["counts"]
            elif stage == "data":
                info = verify_manifest(one.place(stage), hashes=False)
                found[stage] = {name: info[name] for name in ("rows", "consistency") if name in info}
        return found

    def metrics(self, one: Round) -> Mapping[str, float | None]:
        """See `Runner`."""
        return self._measured(one)[0]

    def baseline(self, one: Round) -> Mapping[str, float | None]:
        """See `Runner`."""
        return self._measured(one)[1]

    def _measured(self, one: Round) -> tuple[dict[str, float | None], dict[str, float | None]]:
        file = one.place("evaluate") / "result.json"
        found = measured(json.loads(file.read_text())) if file.is_file() else ({}, {})
        data = one.place("data") / MANIFEST
        if self.recipe.loop.consistency is not None and data.is_file():
            found[0]["consistency"] = verify_manifest(one.place("data"), hashes=False)["consistency"]["mean"]
        found[0]["dropped"] = dropped(one)
        return found


class ByProcess(InProcess):
    """Each stage that loads a model in a process of its own, whose memory is free again when it ends.

    Args:
        recipe: of the loop, whose folder holds `recipe.yaml`.
        lock: file that is locked while the loop runs; a stage that outlives it holds on to it.
    """

    def __init__(self, recipe: LoopRecipe, watch: Watch = unwatched, lock: IO[str] | None = None) -> None:
        super().__init__(recipe, watch)
        self.lock = lock

    def run(self, stage: Stage, one: Round) -> None:
        """See `Runner`.

        Raises:
            TrainingError: the process failed; what it said stands on stderr.
        """
        if stage in ("pairs", "data"):  # no model, and no memory to speak of
            super().run(stage, one)
            return
        command = [sys.executable, "-m", "align", "loop", "--stage", stage, str(self.recipe.output / RECIPE)]
        if stage == "train":
            file = one.folder / "train.yaml"
            atomic_write(file, rules.to_yaml(self.training(one), self.recipe.uses))
            command = [sys.executable, "-m", "align", "train", str(file)]
        code = _wait(command, () if self.lock is None else (self.lock.fileno(),))
        if code:
            raise TrainingError(
                f"the stage `{stage}` of round {one.number} ended with exit code {code}",
                where=" ".join(command),
                why="what it said stands above",
                mend="mend that; the same command goes on in the middle of the stage",
            )
        if stage == "train":
            trained(one)


def _wait(command: Sequence[str], keep: Sequence[int]) -> int:
    # `keep` are files that the child holds open too.
    with subprocess.Popen(command, pass_fds=keep, stdin=subprocess.DEVNULL) as child:
        try:
            return child.wait()
        except BaseException:  # an interrupt: the child saves what it has, and must not stay behind
            child.terminate()
            child.wait()
            raise


def run(
    recipe: LoopRecipe, runner: InProcess | None = None, say: Callable[[str], None] = lambda line: None
) -> Path | None:
    """Run a loop, or what is left of it; the policy that was taken last, or None.

    Raises:
        ConfigError: the folder holds a loop of another recipe.
        AlignError: whatever stops a stage.
    """
    runner = runner or InProcess(recipe)
    claim(recipe)
    return run_rounds(runner.plan, runner, say)


def run_stage(recipe: LoopRecipe, stage: Stage, watch: Watch = unwatched) -> None:
    """Do one stage of the round that a loop is in."""
    runner = InProcess(recipe, watch)
    runner.run(stage, next_round(runner.plan, read_records(recipe.output)))


def claim(recipe: LoopRecipe) -> None:
    """Write the recipe into the loop's folder, or see that it is the one that is there.

    Raises:
        ConfigError: it is another recipe, or the folder holds something else.
    """
    file, now = recipe.output / RECIPE, yaml.safe_load(recipe.yaml())
    if not file.is_file():
        if recipe.output.is_dir() and any(not entry.name.startswith(".") for entry in recipe.output.iterdir()):
            raise ConfigError(
                "`output_dir` is used and holds no loop", where=str(recipe.output), mend="name a new folder"
            )
        atomic_write(file, recipe.yaml())
        return
    changed = provenance.differences(yaml.safe_load(file.read_text(encoding="utf-8")), now)
    if recipe.loop.prompts is not None or recipe.loop.take != "disjoint":
        changed.pop("loop.rounds", None)  # more of them, or fewer, change none that is done
    if changed:
        lines = [f"`{key}`: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
        raise ConfigError(
            "the loop in this folder has another recipe",
            where=str(recipe.output),
            why="; ".join(lines),
            mend="name another `output_dir`; a loop that goes on may change `loop.rounds` and how training is logged",
        )
    atomic_write(file, recipe.yaml())


def trained(one: Round) -> None:
    """Note that a round's training is over."""
    if not (one.place("train") / "policy").is_dir():
        raise _stopped(one)
    atomic_write(one.place("train") / TRAINED, json.dumps({"round": one.number}) + "\n")


def _stopped(one: Round) -> TrainingError:
    return TrainingError(
        f"the training of round {one.number} was stopped", mend="the same command goes on from its last checkpoint"
    )


def played(entry: Any, roles: Roles, base: str | None) -> Any:
    """A feedback whose models are a round's: the words of `ROLES` become folders.

    Where there is no iterate before the policy, an implicit reward of `before` is the initial model's log-likelihood
    per token, CREAM's first comparison (arXiv 2410.12735).
    """
    if roles.before is None and getattr(entry, "model", None) == "before":
        return dataclasses.replace(entry, model=roles.initial, reference=None, beta=None, length_normalised=True)
    names = {"policy": roles.policy, "before": roles.before, "initial": roles.initial, "base": base or roles.initial}
    given = {key: getattr(entry, key, None) for key in ("model", "reference")}
    return dataclasses.replace(entry, **{key: names[name] for key, name in given.items() if name in ROLES})


def prompts_of(
    named: Sequence[Stream], rounds: int, one: Round, take: str, count: int | None, seed: int
) -> tuple[Stream, ...]:
    """The streams of a round's prompts; which rows they are is written beside it.

    Raises:
        DataError: too few prompts.
    """
    sources = [opened.source for opened in open_sources(streams(named))]
    rows = [(place, number) for place, source in enumerate(sources) for number in range(len(source))]
    each = count or (len(rows) // rounds if take == "disjoint" else len(rows))
    asked = each * rounds if take == "disjoint" else each
    if not each or asked > len(rows):
        raise DataError(
            f"{rounds} rounds of {each} prompts with `take: {take}`"
            if take == "disjoint"
            else f"{each} prompts a round",
            where=", ".join(stream.name for stream in named),
            why=f"there are {len(rows)} rows",
            mend="lower `loop.prompts` or `loop.rounds`, or write `take: fresh`",
        )
    order = generator(seed, "prompts", *([one.number] if take == "fresh" else [])).permutation(len(rows))
    first = (one.number - 1) * each if take == "disjoint" else 0
    chosen = [rows[place] for place in sorted(order[first : first + each].tolist())]
    found = []
    for place, stream in enumerate(named):
        ids = [str(sources[place].row_id(number)) for owner, number in chosen if owner == place]
        if ids:
            file = one.folder / f"prompts-{place}.json"
            atomic_write(file, json.dumps(ids, indent=0, ensure_ascii=False) + "\n")
            found.append(dataclasses.replace(stream, only=str(file)))
    return tuple(found)


def evaluation_of(recipe: LoopRecipe, one: Round, watch: Watch) -> Any:
    """The round's policy against the initial model on held-out prompts."""
    from align.evaluate import Settings, evaluate_policy, load_reward, load_side, read_held_out
    from align.sampling.base import SamplingParams
    from align.worlds import WORLDS

    held, model = recipe.loop.evaluation, recipe.train.model
    if held is None:
        raise ConfigError("there is no `loop.evaluation`", mend="add it")
    world = WORLDS.get(held.world)() if held.world else None
    name = world.reward_name if world is not None else held.reward
    sides = [
        load_side(folder, model.dtype, trust_remote_code=model.trust_remote_code)
        for folder in (str(one.made), one.roles.initial)
    ]
    data: Any = held.data
    if data is None and world is not None:
        data = [
            {"prompt": [{"role": "user", "content": prompt}]}
            for prompt in world.prompts(held.max_prompts, "held_out", held.seed)
        ]
    positions = [side.positions for side in sides if side.positions is not None]
    rows = read_held_out(
        data,
        sides[0].tokenizer,
        max_prompts=held.max_prompts,
        positions=min(positions, default=None),
        max_new_tokens=held.max_new_tokens,
        seed=held.seed,
        split=held.split,
    )
    sampling = SamplingParams(max_new_tokens=held.max_new_tokens, temperature=held.temperature, seed=held.seed)
    with watch(2 * held.n * len(rows.prompts), "evaluating", "completions") as progress:
        return evaluate_policy(
            sides[0],
            sides[1],
            rows,
            one.place("evaluate"),
            reward=load_reward(name) if name else None,
            settings=Settings(n=held.n, sampling=sampling),
            progress=progress,
        )


def measured(result: Mapping[str, Any]) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """(measures of the policy, of the initial model) from a `result.json`; None where not measured."""

    def value(*keys: str) -> float | None:
        found: Any = result
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, (int, float)) and math.isfinite(found) else None

    policy = {
        "reward": value("policy", "reward", "value"),
        "win_rate": value("wins", "rate", "value"),
        "accuracy": value("pairs", "accuracy", "value"),
        "kl": value("kl", "k1", "value"),
        "tokens": value("policy", "tokens", "value"),
        "unfinished": value("policy", "unfinished", "value"),
    }
    initial = {
        "reward": value("baseline", "reward", "value"),
        "win_rate": None if policy["win_rate"] is None else 0.5,
        "accuracy": value("pairs", "baseline_accuracy", "value"),
        "tokens": value("baseline", "tokens", "value"),
        "unfinished": value("baseline", "unfinished", "value"),
    }
    return policy, initial


def dropped(one: Round) -> float:
    """Share of a round's prompts that gave nothing to train on."""
    folder = one.place("pairs")
    lost = sum(verify_manifest(folder, hashes=False)["counts"].get("lost", {}).values())
    return float(lost / json.loads((folder / "key.json").read_text())["total"])


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Any:
    """A loop's folder for this process alone. A stage of a loop that was killed is waited for.

    Raises:
        ConfigError: another loop runs there.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            if owner.isdigit() and _alive(int(owner)):
                raise ConfigError(
                    "another loop runs in this folder",
                    where=str(folder),
                    why=f"process {owner}",
                    mend="wait for it, or name another `output_dir`",
                ) from None
            say("a stage of a loop that was killed is still at work; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
