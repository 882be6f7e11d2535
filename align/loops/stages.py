"""The stages of a round as functions over artefacts: sample, judge, pair. Killed and called again, each goes on.

A stage writes a folder of numbered chunks (`data.artefacts`), which mirror those of the stage before: one that is lost
costs itself alone. What is drawn is a function of (seed, chunk, number of the prompt in it).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import align
from align.core.chunks import Numbered
from align.core.errors import CheckpointError, ConfigError, DataError
from align.core.hashing import digest
from align.core.options import check_all, option
from align.core.progress import Progress
from align.core.seeds import derive, generator
from align.data.artefacts import Artefact
from align.data.groups import Group
from align.data.rollout_rows import SCHEMA, from_row, to_row
from align.data.rollouts import Answer, RolloutGroup
from align.data.rows import RowError
from align.data.tokenise import Tokeniser
from align.feedback.accounts import Account as Judged
from align.feedback.accounts import apply
from align.feedback.base import Feedback
from align.loops.account import Account, refuse_nothing
from align.loops.pair_rows import PairLayout, layout_of
from align.sampling.base import Rollout, Sampler, SamplingParams
from align.sampling.reading import Asked, PromptSet
from align.shaping.selection import DATA, PairSpec, Selected, candidates, select, top_share

Watch = Callable[[int], AbstractContextManager[Progress]]
"""Units of work to do -> a context that listens to how many are done."""
_SEEDS = 1 << 53


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """How prompts become answers."""

    n: int = option(4, at_least=1, doc="answers drawn for each prompt")
    temperature: float = option(1.0, at_least=0, doc="0: the likeliest token each time")
    top_p: float = option(1.0, above=0, at_most=1, doc="smallest set of tokens with this much probability; 1: all")
    top_k: int = option(0, at_least=0, doc="so many likeliest tokens; 0: all")
    max_new_tokens: int = option(256, at_least=1, doc="tokens of an answer, its end token included")
    seed: int = option(0, at_least=0, doc="seed of the draws")
    max_prompts: int | None = option(None, at_least=1, doc="the first so many prompts only")
    chunk: int = option(256, at_least=1, doc="prompts of a chunk of work")
    data_answers: bool = option(False, doc="the rows' own answers join the candidates, under the origin `data`")

    def __post_init__(self) -> None:
        check_all(self, "sample")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError(
                f"`sample.temperature` is 0 and `sample.n` is {self.n}",
                why="all answers to a prompt would be the same",
                mend="write `n: 1`, or a temperature above 0",
            )


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """What `sample_stage` needs.

    Attributes:
        sampler: makes the sampler; called where there is something to sample.
        model: the name that answers carry. tokenizer: of the model.
        key: what determines the sampler's numbers: weights, kind, dtype, versions, end tokens.
        prompts: with their ids. chat_template: None or "model" for the tokenizer's own.
        origin: who wrote the answers. iteration: the round.
    """

    sampler: Callable[[], Sampler]
    model: str
    tokenizer: Any
    key: Mapping[str, Any]
    prompts: PromptSet
    spec: SampleSpec
    chat_template: str | None = None
    origin: str = "policy"
    iteration: int = 0


def sample_stage(plan: SamplePlan, folder: str | Path, watch: Watch, restart: bool = False) -> Account:
    """Draw `spec.n` answers to every prompt into an artefact of rollouts.

    Raises:
        CheckpointError: work of other settings was begun there, or the disk is full.
        DataError: some prompts are plain text and some messages.
    """
    asked, spec = plan.prompts.prompts, plan.spec
    layout_of((RolloutGroup(one.row, one.prompt, np.zeros(0, np.int64), ()) for one in asked), _ANY, False)
    key = {
        "command": "sample",
        "recipe": asdict(spec),
        "model": plan.model,
        "sampler": dict(plan.key),
        "prompts": digest([[str(one.row), list(one.ids), _kept(one.columns)[0]] for one in asked]),
        "origin": plan.origin,
        "iteration": plan.iteration,
    }
    made = Artefact(folder, key, len(asked), spec.chunk, SCHEMA, restart)
    given = _GivenAnswers(plan.tokenizer, plan.chat_template) if spec.data_answers else None
    sampler: Sampler | None = None

    def chunk(number: int, progress: Progress) -> tuple[list[dict[str, Any]], Counts]:
        nonlocal sampler
        sampler = sampler or plan.sampler()
        prompts = [asked[item] for item in made.items(number)]
        params = SamplingParams(
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
            seed=derive(spec.seed, "chunk", number) % _SEEDS,
        )
        drawn = sampler.sample([one.ids for one in prompts], spec.n, params, progress)
        return _sampled(plan, prompts, drawn, given)

    left_out = plan.prompts.rejected.report()["reasons"]
    info = {"left_out": {reason: told["count"] for reason, told in left_out.items()}, "read_as": plan.prompts.read_as}
    return _run(made, "sample", info, spec.n, watch, chunk)


Counts = dict[str, Counter[str]]


@dataclass(frozen=True, eq=False)
class JudgePlan:
    """What `judge_stage` needs.

    Attributes:
        samples: folder of the samples. seed: of whatever a judge draws.
        recipe: the `sample` section as it is now, where that should be compared with what was sampled.
    """

    samples: Path
    feedbacks: Sequence[Feedback]
    seed: int = 0
    recipe: SampleSpec | None = None


def judge_stage(
    plan: JudgePlan, folder: str | Path, watch: Watch, restart: bool = False, retry_missing: bool = False
) -> Account:
    """Ask every feedback about every answer; an artefact of rollouts with their feedback, chunk by chunk as sampled.

    What a feedback does not say is missing, and counted with the reason; it costs no other row.

    Args:
        retry_missing: do chunks again of which something is missing; a feedback with a cache is asked for that alone.

    Raises:
        CheckpointError: there are no finished samples, or they were made by another `sample` section.
        DataError: a feedback said nothing about any answer.
    """
    samples = Artefact.open(plan.samples, "run `align sample` first, to its end")
    _same_recipe(samples, plan.recipe)
    keys = [{"name": one.name, "gives": one.gives, **one.key} for one in plan.feedbacks]
    key = {"command": "judge", "samples": samples.content, "feedback": _plain(keys), "seed": plan.seed}
    made = Artefact(folder, key, samples.total, samples.size, SCHEMA, restart)
    if retry_missing:
        for number in made.finished:
            if made.account(number).get("lost"):
                made.reopen(number)

    def chunk(number: int, progress: Progress) -> tuple[list[dict[str, Any]], Counts]:
        groups = [from_row(row) for row in samples.read(number)]
        judged, account = apply(plan.feedbacks, groups, derive(plan.seed, "judge") % _SEEDS)
        progress(len(groups))
        return [to_row(group) for group in judged], _judged(account)

    account = _run(made, "judge", {}, 1, watch, chunk)
    for name, asked in account.of("asked").items():
        if asked and not account.of("judged").get(name):
            mend = "see what is wrong with it, then ask again: `align judge RECIPE --retry-missing`"
            raise DataError(f"`{name}` judged nothing", where=account.folder, why=account.said("lost"), mend=mend)
    return account


@dataclass(frozen=True, eq=False)
class PairPlan:
    """What `pairs_stage` needs.

    Attributes:
        source: folder of judged answers, or of samples where the rule asks for no feedback.
        weights: of the rewards by name, where several are added up; None: 1 each.
        recipe: see `JudgePlan`.
    """

    source: Path
    spec: PairSpec
    weights: Mapping[str, float] | None = None
    recipe: SampleSpec | None = None


def pairs_stage(plan: PairPlan, folder: str | Path, watch: Watch, restart: bool = False) -> Account:
    """Make pairs (or demonstrations) of judged answers by a rule; an artefact that `data.train` reads as it is.

    Raises:
        CheckpointError: the stage before is not finished.
        ConfigError: the rule does not go with the feedback.
    """
    source = Artefact.open(plan.source, "run the command before it first, to its end: `align judge` or `align sample`")
    if source.key["command"] == "sample":
        _same_recipe(source, plan.recipe)
    layout = layout_of(_groups(source), plan.spec, source.key["command"] == "judge")
    key = {
        "command": "pairs",
        "source": source.content,
        "recipe": asdict(plan.spec),
        "weights": None if plan.weights is None else dict(plan.weights),
    }
    made = Artefact(folder, key, source.total, source.size, layout.schema, restart)
    pool: list[Selected] = []
    if plan.spec.rule == "top_share" and not made.done:
        pool = top_share([candidates(group, plan.spec, plan.weights) for group in _groups(source)], plan.spec)

    def chunk(number: int, progress: Progress) -> tuple[list[dict[str, Any]], Counts]:
        rows: list[dict[str, Any]] = []
        counts: Counts = {"pairs": Counter(), "lost": Counter(), "left_out": Counter()}
        for item, row in zip(source.items(number), source.read(number), strict=True):
            group = from_row(row)
            one = candidates(group, plan.spec, plan.weights)
            chosen = pool[item] if pool else select(one, plan.spec, generator(plan.spec.seed, "pairs", item))
            rows += layout.rows(group, one, chosen)
            _count(counts, layout, chosen)
            progress(1)
        return rows, counts

    account = _run(made, "pairs", {"layout": layout.form}, 1, watch, chunk)
    refuse_nothing(account, "pairs", "no prompt gives a pair", "look at the rule, or sample more answers of a prompt")
    return account


def _run(
    made: Artefact,
    command: str,
    info: Mapping[str, Any],
    units: int,
    watch: Watch,
    chunk: Callable[[int, Progress], tuple[list[dict[str, Any]], Counts]],
) -> Account:
    """Do the missing chunks of an artefact, and finish it. `units`: of progress for each item."""
    started, tokens = time.monotonic(), 0
    missing = made.missing
    if missing:
        with watch(units * sum(len(made.items(number)) for number in missing)) as progress:
            for number in missing:
                rows, counts = chunk(number, progress)
                made.write(number, rows, {kind: dict(numbers) for kind, numbers in counts.items()})
                tokens += counts.get("answers", Counter())["tokens"]
    told = made.info or made.finish({**info, "command": f"align {command}", "versions": {"align": align.__version__}})
    seconds = time.monotonic() - started
    return Account(str(made.folder), made.total, len(made), len(made) - len(missing), told["counts"], seconds, tokens)


def _groups(source: Numbered) -> Iterator[RolloutGroup]:
    return (from_row(row) for row in source.rows())


def _sampled(
    plan: SamplePlan, prompts: Sequence[Asked], drawn: Sequence[Sequence[Rollout]], given: _GivenAnswers | None
) -> tuple[list[dict[str, Any]], Counts]:
    rows: list[dict[str, Any]] = []
    counts: Counts = {"answers": Counter(), "lost": Counter()}
    for asked, rollouts in zip(prompts, drawn, strict=True):
        answers = [
            Answer(
                ids=one.ids,
                text=one.text,
                finished=one.finished,
                logp=one.logp,
                origin=plan.origin,
                model=plan.model,
                temperature=plan.spec.temperature,
            )
            for one in rollouts
        ]
        for answer in answers:
            counts["answers"].update(sampled=1, finished=answer.finished, tokens=len(answer))
        if given is not None and asked.group is not None:
            own = given(asked.group, counts["lost"])
            counts["answers"].update(data=len(own))
            answers += own
        columns, unfit = _kept(asked.columns)
        counts["lost"].update({f"column `{name}`, which JSON cannot hold": 1 for name in unfit})
        group = RolloutGroup(
            row=asked.row,
            prompt=asked.prompt,
            prompt_ids=np.array(asked.ids, dtype=np.int64),
            answers=tuple(answers),
            columns=columns,
            tools=asked.tools,
            iteration=plan.iteration,
        )
        rows.append(to_row(group))
    return rows, counts


class _GivenAnswers:
    """The answers that stand in a row: `data` for demonstrations and winners, `data_rejected` for the others."""

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        self.tokenise = Tokeniser(tokenizer, "demonstrations", None, "last", chat_template=chat_template)

    def __call__(self, group: Group, lost: Counter[str]) -> list[Answer]:
        losers = {pair.loser for pair in group.preferences}
        answers = []
        for index, completion in enumerate(group.completions):
            if len(completion.segments) > 1:
                lost["answer of the data with several turns"] += 1
                continue
            plain = replace(completion, label=None, reward=None, rank=None)
            try:
                (tokens,) = self.tokenise(replace(group, completions=(plain,), preferences=())).completions
            except RowError as error:
                lost[f"answer of the data ({error.reason})"] += 1
                continue
            origin = f"{DATA}_rejected" if index in losers or completion.label is False else DATA
            answers.append(Answer(tokens.ids, completion.text, tokens.finished, None, origin, completion.model))
        return answers


def _kept(columns: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The columns that JSON can hold, and the names of the others."""
    kept, unfit = {}, []
    for name, value in columns.items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            unfit.append(name)
    return kept, unfit


def _plain(value: Any) -> Any:
    """As JSON gives it back; what JSON does not know as text."""
    return json.loads(json.dumps(value, default=str))


def _judged(account: Judged) -> Counts:
    """Of each feedback: what was asked for, what came, and why the rest is missing."""
    counts: Counts = {"asked": Counter(), "judged": Counter(), "lost": Counter()}
    for name, one in account.counts.items():
        counts["asked"][name] += one.asked
        counts["judged"][name] += one.judged
        counts["lost"].update({f"of `{name}`: {reason}": number for reason, number in one.missing.items()})
    return counts


def _count(counts: Counts, layout: PairLayout, chosen: Selected) -> None:
    made = len(chosen.singles) if layout.single else len(chosen.pairs)
    counts["pairs"]["demonstrations" if layout.single else "pairs"] += made
    counts["pairs"]["swapped"] += sum(pair.swapped for pair in chosen.pairs)
    counts["left_out"].update(chosen.left_out)
    if chosen.lost:
        counts["lost"][chosen.lost] += 1


def _same_recipe(samples: Artefact, recipe: SampleSpec | None) -> None:
    """Refuse samples of another `sample` section than the recipe has now."""
    if recipe is None:
        return
    then, now = samples.key.get("recipe", {}), asdict(recipe)
    changed = [f"`sample.{name}` was {then.get(name)!r}, is {value!r}" for name, value in now.items()]
    changed = [line for line, (name, value) in zip(changed, now.items(), strict=True) if then.get(name) != value]
    if changed:
        raise CheckpointError(
            "the samples were drawn with other settings",
            where=str(samples.folder),
            why="; ".join(changed),
            mend="give the settings they were drawn with, or sample again: `align sample`",
        )


_ANY = PairSpec(rule="random")
