"""From a checked recipe to the plans of the stages: what is loaded is loaded here, and as late as it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from align.core.errors import ConfigError
from align.core.hashing import digest
from align.feedback import FeedbackContext, open_feedback
from align.feedback.implicit import FrozenPolicy
from align.loops.account import Account
from align.loops.opening import Opening, opening
from align.loops.stages import JudgePlan, PairPlan, SamplePlan, Watch, judge_stage, pairs_stage, sample_stage
from align.recipe.collect import Collect
from align.recipe.run import streams
from align.recipe.sections import Model
from align.sampling.loading import load
from align.sampling.reading import read_streams

JUDGEMENTS = "judgements"
"""Folder of judges' replies, in `output_dir`."""


def run(
    recipe: Collect,
    command: str,
    watch: Watch,
    restart: bool = False,
    retry_missing: bool = False,
    note: Callable[[str], None] | None = None,
) -> Account:
    """Do what is left to do of a command: `sample`, `judge` or `pairs`.

    Args:
        restart: throw away work of other settings. retry_missing: see `judge_stage`.
        note: takes a line for people.

    Raises:
        AlignError: whatever stops it, with what to do about it.
    """
    folder = recipe.folder(command)
    if command == "sample":
        plan = sample_plan(recipe)
        if note is not None:
            _tell(plan, note)
        return sample_stage(plan, folder, watch, restart)
    if command == "judge":
        return judge_stage(judge_plan(recipe), folder, watch, restart, retry_missing)
    return pairs_stage(pair_plan(recipe), folder, watch, restart)


def _tell(plan: SamplePlan, note: Callable[[str], None]) -> None:
    note(f"{len(plan.prompts.prompts):,} prompts")
    for reason, told in plan.prompts.rejected.report()["reasons"].items():
        note(f"left out: {told['count']} x {reason} ({', '.join(told['rows'])})")


def sample_plan(recipe: Collect) -> SamplePlan:
    """Read the prompts and find the model; nothing is loaded but its tokenizer.

    Raises:
        DataError: no prompts, or too many bad rows. ModelError: no such model.
    """
    data, spec = recipe.data, recipe.sample
    model = _model(recipe)
    found = read_streams(streams(data.prompts), spec.max_prompts)
    template = _template(recipe)
    opened = opening(
        model.name,
        recipe.sampler,
        folder=_folder(model),
        chat_template=template,
        trust_remote_code=model.trust_remote_code,
        chats=any(not isinstance(one.prompt, str) for one in found.prompts),
    )
    room = None if opened.positions is None else opened.positions - spec.max_new_tokens
    found = found.encode(opened.encoder, room)
    found.rejected.max_bad_fraction = data.max_bad_fraction
    found.rejected.check()
    return SamplePlan(opened.open, opened.name, opened.tokenizer, opened.key, found, spec, template)


def judge_plan(recipe: Collect) -> JudgePlan:
    """Who judges. Replies of judges are kept in OUTPUT_DIR/judgements, so that none is paid for twice.

    Raises:
        ConfigError: a function, file or server that cannot be used. ModelError: no such model.
    """
    context = FeedbackContext(
        policy=partial(_policy, recipe),
        sampler=lambda: _opened(recipe).open(),
        tokenizer=lambda: _opened(recipe).tokenizer,
        chat_template=_template(recipe),
        weights=lambda: digest(dict(_opened(recipe).key)),
    )
    kept = str(Path(recipe.output_dir).expanduser() / JUDGEMENTS)
    specs = [replace(one, cache=kept) if one.kind == "judge" and one.cache is None else one for one in recipe.feedback]
    feedbacks = [open_feedback(spec, context) for spec in specs]
    return JudgePlan(recipe.folder("sample"), feedbacks, recipe.sample.seed, recipe.sample)


def _policy(recipe: Collect) -> FrozenPolicy:
    """The model of the recipe as it scores its own answers."""
    model = _model(recipe)
    loaded = load(_folder(model) or model.name, None, recipe.sampler.dtype, None, model.trust_remote_code)
    return FrozenPolicy.of(loaded.model)


def _opened(recipe: Collect) -> Opening:
    model = _model(recipe)
    return opening(
        model.name,
        recipe.sampler,
        folder=_folder(model),
        chat_template=_template(recipe),
        trust_remote_code=model.trust_remote_code,
    )


def _model(recipe: Collect) -> Model:
    if recipe.model is None:
        raise ConfigError("the section `model` is missing", mend="add `model: {name: ...}`")
    return recipe.model


def _folder(model: Model) -> str | None:
    """Where a revision was fetched to."""
    if model.revision is None:
        return None
    from huggingface_hub import snapshot_download

    return snapshot_download(model.name, revision=model.revision)


def _template(recipe: Collect) -> str | None:
    named = recipe.data.chat_template
    return None if named == "model" else str(Path(named).expanduser())


def pair_plan(recipe: Collect) -> PairPlan:
    """The rule, over what was judged, or over the samples where the recipe asks nobody."""
    if recipe.pairs is None:
        raise ConfigError("the section `pairs` is missing", mend="add `pairs: {rule: best_worst}`")
    source = recipe.folder("judge" if recipe.feedback else "sample")
    weights = {one.name: one.weight for one in recipe.feedback if not one.held_out}
    return PairPlan(source, recipe.pairs, weights or None, recipe.sample)
