"""Rounds: sample, judge, pair, train, evaluate, then take the new policy or go back to the best so far.

A loop's folder is its only state, so the same call after a kill goes on in the middle of any stage:

    round-1/samples, judged, pairs     artefacts of the stages, in chunks: a finished chunk is never done again
    round-1/data                       what is trained on, where that is not `pairs` as they are
    round-1/train                      an ordinary run; `policy` is what it made
    round-1/policy                     the round's policy where weights are extrapolated
    round-1/evaluation, round.json     measures, roles, counts and the decision; no clock, no machine
    loop.json, policy                  all rounds so far, and the policy that was taken last
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from align.core.errors import CheckpointError, TrainingError
from align.core.files import atomic_write
from align.loops.options import Accept

Stage = Literal["sample", "judge", "pairs", "data", "train", "promote", "evaluate"]
STAGES: tuple[Stage, ...] = ("sample", "judge", "pairs", "data", "train", "promote", "evaluate")
FOLDERS: Mapping[str, str] = {
    "sample": "samples",
    "judge": "judged",
    "pairs": "pairs",
    "data": "data",
    "train": "train",
    "promote": "policy",
    "evaluate": "evaluation",
}
ROUND, LOOP, TRAINED = "round.json", "loop.json", "done.json"


@dataclass(frozen=True)
class Roles:
    """Who plays what in a round; models are folders or hub ids.

    Attributes:
        policy: samples the candidates, and is `policy` in feedback.
        start: weights that the training starts from.
        reference: of the loss; None: the starting weights.
        initial: what the loop started from. before: the iterate before `policy`; None in the first round.
        trained: what the training of the accepted round before made, before its weights were extrapolated.
    """

    policy: str
    start: str
    reference: str | None
    initial: str
    before: str | None
    trained: str


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1. folder: of what it writes. earlier: (pairs of an earlier round, share of them trained on too).
    """

    number: int
    folder: Path
    roles: Roles
    earlier: tuple[tuple[Path, float], ...] = ()

    def place(self, stage: Stage) -> Path:
        return self.folder / FOLDERS[stage]

    @property
    def train_data(self) -> Path:
        """What the round trains on."""
        own = self.place("data")
        return own if own.is_dir() else self.place("pairs")

    @property
    def made(self) -> Path:
        """The policy that the round made, accepted or not."""
        own = self.place("promote")
        return own if own.is_dir() else self.place("train") / "policy"


@dataclass(frozen=True)
class Record:
    """What is known of a round that is over.

    Attributes:
        policy: folder of what it made. trained: the same before its weights were extrapolated.
        metrics: `reward`, `win_rate`, `accuracy` (None where not measured), `kl`, `tokens`, ...
        counts: of each stage: kept, missing, dropped by reason.
        accepted: whether later rounds start from it. why: in words.
    """

    number: int
    policy: str
    trained: str
    metrics: Mapping[str, float | None]
    counts: Mapping[str, Any]
    accepted: bool
    why: str
    roles: Mapping[str, Any] = field(default_factory=dict)


class Runner(Protocol):
    """How stages are run: in this process, or each in one of its own. Both write the same artefacts."""

    def stages(self, one: Round) -> Sequence[Stage]:
        """The stages that this round has, in order."""

    def run(self, stage: Stage, one: Round) -> None:
        """Do a stage, or what is left of it."""

    def finished(self, stage: Stage, one: Round) -> bool:
        """Whether nothing of a stage is left to do."""

    def counts(self, one: Round) -> Mapping[str, Any]:
        """What the stages kept, missed and dropped."""

    def metrics(self, one: Round) -> Mapping[str, float | None]:
        """What the evaluation measured; empty without one."""

    def baseline(self, one: Round) -> Mapping[str, float | None]:
        """The same measures of the initial model."""


@dataclass(frozen=True)
class Plan:
    """What the engine itself needs to know; see `Loop` for what the options mean."""

    output: Path
    initial: str
    rounds: int
    reference: Literal["initial", "previous"]
    init: Literal["previous", "initial"] = "previous"
    earlier: tuple[float, ...] = ()
    accept: Accept | None = None
    max_kl: float | None = None


def run_rounds(plan: Plan, runner: Runner, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """Run a loop, or what is left of it; return the policy that was taken last, None where every round was rolled back.

    Raises:
        AlignError: whatever stops a stage.
    """
    history = read_records(plan.output)
    while (stop := stopped(plan, history)) is None:
        one = next_round(plan, history)
        say(f"round {one.number} of {plan.rounds}: sampling from {told(one.roles.policy, plan.output)}")
        for stage in runner.stages(one):
            if not runner.finished(stage, one):
                runner.run(stage, one)
        record = judge_round(plan, one, runner, history)
        atomic_write(one.folder / ROUND, _json(asdict(record)))
        history.append(record)
        _summarise(plan, history)
        say(record.why)
    say(stop)
    _summarise(plan, history)
    return _taken(plan, history)


def next_round(plan: Plan, history: Sequence[Record]) -> Round:
    """The round after those of `history`, with its roles."""
    number = len(history) + 1
    taken = [record for record in history if record.accepted]
    iterates = [plan.initial, *(str(plan.output / record.policy) for record in taken)]
    policy = iterates[-1]
    start = policy if plan.init == "previous" else plan.initial
    reference = policy if plan.reference == "previous" else plan.initial
    roles = Roles(
        policy=policy,
        start=start,
        reference=None if reference == start else reference,
        initial=plan.initial,
        before=iterates[-2] if len(iterates) > 1 else None,
        trained=str(plan.output / taken[-1].trained) if taken else plan.initial,
    )
    earlier = tuple(
        (plan.output / f"round-{number - back}" / FOLDERS["pairs"], share)
        for back, share in enumerate(plan.earlier, 1)
        if number > back and share > 0
    )
    return Round(number, plan.output / f"round-{number}", roles, earlier)


def judge_round(plan: Plan, one: Round, runner: Runner, history: Sequence[Record]) -> Record:
    """Whether a round's policy is taken, and what is known of it."""
    metrics = dict(runner.metrics(one))
    accepted, why = True, f"round {one.number} is taken: every round is"
    if plan.accept is not None:
        name = plan.accept.metric
        taken = [record for record in history if record.accepted]
        best = taken[-1].metrics.get(name) if taken else runner.baseline(one).get(name)
        accepted, why = decide(plan.accept, metrics.get(name), best, one.number)
    output = plan.output
    return Record(
        number=one.number,
        policy=told(str(one.made), output),
        trained=told(str(one.place("train") / "policy"), output),
        metrics=metrics,
        counts=dict(runner.counts(one)),
        accepted=accepted,
        why=why,
        roles={name: told(value, output) if value else value for name, value in asdict(one.roles).items()},
    )


def decide(accept: Accept, value: float | None, best: float | None, number: int) -> tuple[bool, str]:
    """(whether a round is taken, a sentence). `best` is the metric of the last policy that was taken.

    Raises:
        TrainingError: the metric could not be measured.
    """
    name = accept.metric.replace("_", " ")
    if value is None or best is None:
        raise TrainingError(
            f"round {number} has no {name} to accept it by",
            why="the evaluation did not measure it" if value is None else "the initial model's was not measured",
            mend="give `loop.evaluation.reward` (or pairs, for accuracy), or leave `loop.accept` out",
        )
    gain = value - best
    if gain >= accept.min_gain:
        return True, f"round {number} is taken: {name} {value:.4g}, {gain:+.4g} over the best before"
    return False, (
        f"round {number} is rolled back: {name} {value:.4g} is {gain:+.4g} over the best before, and "
        f"{accept.min_gain:g} is asked for; the next round starts from the best so far"
    )


def stopped(plan: Plan, history: Sequence[Record]) -> str | None:
    """Why the loop is over, in words; None where it goes on."""
    if len(history) >= plan.rounds:
        return f"all {plan.rounds} rounds are done"
    patience = plan.accept.patience if plan.accept is not None else None
    if patience is not None and len(history) >= patience and not any(one.accepted for one in history[-patience:]):
        return f"stopped after round {len(history)}: {patience} rounds in a row were rolled back"
    kl = history[-1].metrics.get("kl") if history else None
    if plan.max_kl is not None and kl is not None and history[-1].accepted and kl >= plan.max_kl:
        return f"stopped after round {len(history)}: KL to the initial model is {kl:.4g} nats, at most {plan.max_kl:g}"
    return None


def read_records(output: Path) -> list[Record]:
    """The rounds that are over, in order.

    Raises:
        CheckpointError: a record cannot be read.
    """
    found: list[Record] = []
    while (file := output / f"round-{len(found) + 1}" / ROUND).is_file():
        try:
            found.append(Record(**json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                "the record of a round cannot be read",
                where=str(file),
                why=str(error),
                mend="restore it, or remove it and the round is evaluated again",
            ) from error
    return found


def told(model: str, output: Path) -> str:
    """A model as records name it: from the loop's folder where it lies there, so that records do not depend on it."""
    path = Path(model)
    return path.relative_to(output).as_posix() if path.is_relative_to(output) else model


def _taken(plan: Plan, history: Sequence[Record]) -> Path | None:
    taken = [record for record in history if record.accepted]
    return plan.output / taken[-1].policy if taken else None


def _summarise(plan: Plan, history: Sequence[Record]) -> None:
    """`loop.json`, and `policy`, which is a link: no second copy of the weights."""
    taken = [record for record in history if record.accepted]
    content = {
        "rounds": [{"round": one.number, "accepted": one.accepted, **one.metrics} for one in history],
        "policy": taken[-1].policy if taken else None,
        "stopped": stopped(plan, history),
    }
    atomic_write(plan.output / LOOP, _json(content))
    if taken:
        fresh = plan.output / ".policy.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(taken[-1].policy)
        os.replace(fresh, plan.output / "policy")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=str) + "\n"
