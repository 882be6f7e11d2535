"""Everything of a run but training: data, the first micro-batch at step zero, and what a step will be made of."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Sequence
from typing import Any

from align.core.errors import AlignError, DataError, TrainingError
from align.core.registry import METHODS
from align.data.doctor import Examination, Plan, Watch, examine, unwatched
from align.recipe import provenance, rules
from align.recipe.advice import Facts
from align.recipe.run import arguments, build, model_path, streams
from align.recipe.sections import Eval, Recipe

ROWS, SAMPLE = 200_000, 5_000
"""Rows read of each stream, and rows of them whose tokens are counted, evenly spaced."""
_BATCHES = 20
LOOKED_AT = 4
"""Prompts that are sampled for, and judged by nobody, where a method samples."""
_KNOWN_AT_ZERO = {
    "dpo": ("log 2", lambda options: math.log(2)),
    "ipo": ("1 / (4 tau^2)", lambda options: 1 / (4 * options["tau"] ** 2)),
}
"""Method -> the loss where policy and reference are equal (2305.18290; 2310.12036)."""


@dataclasses.dataclass
class Checked:
    """What a check found.

    Attributes:
        data: the data report, as `align.data.doctor.examine` gives it.
        run: learning rate, steps, epochs, rows and units a step, micro-batches, gain of sharing prompts.
        model: parameters, back end, step zero; None where the model was not looked at.
        facts: numbers of the data that advice on a recipe may ask for.
        failed: what would stop the run at its start (no row left, step zero), kept so that the rest can be shown first.
    """

    data: dict[str, Any]
    run: dict[str, Any]
    model: dict[str, Any] | None
    facts: Facts
    failed: AlignError | None = None


def check(recipe: Recipe, *, with_model: bool = True, watch: Watch = unwatched) -> Checked:
    """Look at all that a run needs; write nothing into its output folder and train nothing.

    Args:
        recipe: checked and resolved.
        with_model: load the model and score one micro-batch; else only the tokenizer is loaded.
        watch: told of progress.

    Raises:
        AlignError: whatever would stop the run before its first step, but bad rows, which the report counts.
    """
    from align.trainers.data import tokeniser_for
    from align.trainers.loading import load_tokenizer

    method = rules.build_method(METHODS.get(recipe.method.name), recipe.method.options)
    provenance.check_output(recipe, rules.Uses.of(method), clean=False)
    with tempfile.TemporaryDirectory(prefix="align-check-") as folder:
        apart = _apart(recipe, folder)
        args = arguments(apart)
        tokenizer = load_tokenizer(model_path(recipe), args.trust_remote_code)
        tokenise = tokeniser_for(tokenizer, method, args)
        needs = frozenset() if method.rollouts() else method.requires()
        plan = Plan(tokenise.view, needs, recipe.data.pairs, ROWS, SAMPLE, tokenise)
        named = {"train": streams(recipe.data.trained)}
        if recipe.data.eval:
            named["eval"] = streams(recipe.data.eval)
        found = examine(named, plan, watch)
        side = _train_side(recipe, found, tokenise, method)
        run = _run(recipe, method, args, side, found)
        checked = Checked(found.report, run, None, _facts(recipe, found.report, tokenizer))
        if not found.shapes["train"]:
            checked.failed = _nothing_left(found.report["streams"]["train"])
        elif with_model:
            with watch(1, "scoring one micro-batch", "micro-batches") as advance:
                _look_at_model(checked, apart, method, side)
                advance(1)
    return checked


def _apart(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with what a check must not touch taken out: the output folder, trackers, the reference's cache."""
    reference = recipe.reference
    if reference.kind == "cached":
        reference = dataclasses.replace(reference, kind="auto", cache_dir=None)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, eval=()),
        train=dataclasses.replace(recipe.train, output_dir=folder, report_to="none", resume="never"),
        eval=Eval(every=None),
        reference=reference,
    )


# -- data and steps ---------------------------------------------------------------------------------------------------


def _train_side(recipe: Recipe, found: Examination, tokenise: Any, method: Any) -> Any:
    """The training data as a run has them, without a second look."""
    from align.data.mixture import mixture_of
    from align.data.prepare import PreparedData
    from align.data.rejected import RejectedLog
    from align.data.stream import GroupDataset
    from align.trainers.data import DataSide

    opened = found.opened["train"]
    dataset = GroupDataset([one.source for one in opened], [one.reader for one in opened], tokenise)
    mixture = mixture_of([len(one.source) for one in opened], [stream.weight for stream in recipe.data.trained])
    prepared = PreparedData(dataset, "", {}, RejectedLog(None, 1.0), mixture)
    units = 1
    if method.view == "singles" and method.rollouts() is None:
        units = max((len(answers) for _, answers in found.shapes["train"]), default=1)
    return DataSide(prepared, units)


def _run(recipe: Recipe, method: Any, args: Any, side: Any, found: Examination) -> dict[str, Any]:
    """What the run will be made of, in numbers."""
    rows = side.rows_per_step(recipe.train.global_batch_size)
    per_epoch = len(side.prepared.sampler(rows, recipe.train.seed, recipe.data.shuffle))
    steps = recipe.train.max_steps or math.ceil(recipe.train.num_train_epochs * per_epoch)
    return {
        "method": recipe.method.name,
        "options": dict(recipe.method.options),
        "learning_rate": recipe.train.learning_rate,
        "lr_scheduler_type": recipe.train.lr_scheduler_type,
        "warmup_steps": args.get_warmup_steps(steps),
        "steps": steps,
        "steps_per_epoch": per_epoch,
        "epochs": round(steps / per_epoch, 3),
        "global_batch_size": recipe.train.global_batch_size,
        "rows_per_step": rows,
        **_batches(_shapes(found, method, args), rows, method, args, recipe.train.seed),
    }


def _shapes(found: Examination, method: Any, args: Any) -> Sequence[tuple[int, tuple[int, ...]]]:
    """(prompt, answers) in tokens of the sampled rows; what is sampled counts as long as it may become."""
    asked = method.rollouts()
    if asked is None:
        return found.shapes["train"]
    answers = 1 if asked.select == "first" else sum(draw.count for draw in asked.draws)
    return [(prompt, (args.max_new_tokens,) * answers) for prompt, _ in found.shapes["train"]]


def _batches(
    shapes: Sequence[tuple[int, tuple[int, ...]]], rows: int, method: Any, args: Any, seed: int
) -> dict[str, Any]:
    """Micro-batches and tokens of a step, from batches drawn among the sampled rows."""
    from align.scoring.assemble import columns_needed
    from align.scoring.batching import plan, predicted_gain
    from align.trainers.base import budget_of

    if not shapes:
        return {}
    drawn = random.Random(seed)
    mismatched = "mismatched" in columns_needed(method).data
    budget, world = budget_of(args), _ranks()
    counts, tokens = [], []
    for _ in range(_BATCHES):
        batch = [drawn.choice(shapes) for _ in range(rows)]
        costs = [prompt + sum(answers) for prompt, answers in batch]
        if mismatched:  # each answer is scored after another row's prompt too
            costs = [cost + sum(batch[place - 1][1]) for place, cost in enumerate(costs)]
        counts.append(len(plan(costs, world, budget)[0]))
        tokens.append(sum(costs))
    return {
        "tokens_per_micro_batch": budget,
        "ranks": world,
        "micro_batches_per_step": {"mean": sum(counts) / _BATCHES, "most": max(counts)},
        "tokens_per_step": round(sum(tokens) / _BATCHES),
        "longest_row": max(prompt + sum(answers) for prompt, answers in shapes),
        "sharing_gain": round(predicted_gain(shapes), 3),
    }


def _ranks() -> int:
    """Processes that `align train` starts here: one for each device."""
    import torch

    return max(1, torch.accelerator.device_count()) if torch.accelerator.is_available() else 1


def _facts(recipe: Recipe, report: dict[str, Any], tokenizer: Any) -> Facts:
    """What advice on a recipe may ask for."""
    train = report["streams"]["train"]
    labels = train["labels"] or {}
    return Facts(
        rows=train["rows"]["total"],
        too_long=train["lengths"]["truncation"]["too_long"]["share"],
        chat_template=recipe.data.chat_template != "model" or bool(getattr(tokenizer, "chat_template", None)),
        desirable=labels["desirable"]["count"] if labels else None,
        undesirable=labels["undesirable"]["count"] if labels else None,
    )


def _nothing_left(stream: dict[str, Any]) -> DataError:
    """The error of a set of which no row can be trained on."""
    reasons = [*stream["reasons"], *stream["lengths"]["reasons"]]
    return DataError(
        f"none of the {stream['rows']['read']:,} rows can be trained on",
        where=", ".join(source["name"] for source in stream["sources"]),
        why="; ".join(f"{one['count']} x {one['reason']}" for one in reasons[:5]),
        mend="mend the rows, or how they are read (`winner`, `columns`, `max_length`)",
    )


# -- the model --------------------------------------------------------------------------------------------------------


def _look_at_model(checked: Checked, recipe: Recipe, method: Any, side: Any) -> None:
    """Build the trainer as a run does, and score the first micro-batch of its first step."""
    from align.trainers.data import RunData

    trainer = build(recipe, method, model=_loaded_once(recipe, method), train=RunData(side, None))
    engine = trainer.engine_for(trainer.model)
    trainer.model.train()  # as in a step: dropout that was left in shows as a policy that differs from its reference
    checked.model = {
        "name": recipe.model.name,
        "dtype": recipe.model.dtype,
        "device": str(engine.device),
        "parameters": {name: _parameters(role) for name, role in engine.roles.roles.items()},
        "backend": engine.backend.name,
        "backend_reason": engine.backend.reason,
        "reference": trainer.reference.kind if trainer.reference is not None else None,
    }
    rows = side.prepared.sampler(side.rows_per_step(recipe.train.global_batch_size), recipe.train.seed)
    groups = _first_groups(side.dataset, rows)
    if method.rollouts() is not None:
        checked.model |= {"step_zero": None, "sampled": trainer.look(engine, groups[:LOOKED_AT])}
        return
    checked.model["step_zero"], checked.failed = _step_zero(trainer, engine, groups) if groups else (None, None)


def _loaded_once(recipe: Recipe, method: Any) -> Any:
    """The model, where the reference is a copy of it: it is then read from disk once, not twice. None elsewhere."""
    if not rules.Uses.of(method).reference or recipe.model.peft is not None or recipe.reference.model is not None:
        return None
    import torch

    from align.trainers.loading import load_model

    return load_model(model_path(recipe), torch.float32, recipe.model.trust_remote_code)


def _parameters(role: Any) -> dict[str, int]:
    every = list(role.parameters())
    return {
        "trainable": sum(one.numel() for one in every if one.requires_grad),
        "all": sum(one.numel() for one in every),
    }


def _first_groups(dataset: Any, sampler: Any) -> list[Any]:
    """The usable rows of the first step that has any."""
    from align.data.stream import Hole

    for rows in sampler:
        groups = [item for item in dataset.__getitems__(rows) if not isinstance(item, Hole)]
        if groups:
            return groups
    return []


def _step_zero(trainer: Any, engine: Any, groups: list[Any]) -> tuple[dict[str, Any], TrainingError | None]:
    """The loss of one micro-batch, its known value where policy equals reference, and how equal they are."""
    import torch

    from align.core.seeds import derive
    from align.methods.base import finish
    from align.trainers.guards import check_step_zero

    seed = derive(trainer.args.seed, "step", 0)
    micro = engine.share(engine.ready(groups, seed)).micros[0]
    with torch.no_grad():
        outputs = engine.outputs(micro)
        losses = {"loss": outputs}
        if trainer.expect_equal:
            losses["loss_if_equal"] = _as_equal(outputs)
        values = {}
        for name, columns in losses.items():
            view = engine.view(micro.groups, columns, trainer.method_state, seed)
            values[name] = float(finish(trainer.method.loss(view), view).total())
        view = engine.view(micro.groups, outputs, trainer.method_state, seed)
    parts = engine.completions_of(view)
    mask = torch.cat([part.mask for part in parts])
    logp = torch.cat([part.logp for part in parts])
    found: dict[str, Any] = {
        "rows": len(micro.groups),
        "row_ids": [str(group.row) for group in micro.groups],
        "answers": int(mask.shape[0]),
        "scored_tokens": int(mask.sum()),
        "nats_per_token": -float(torch.where(mask, logp, 0.0).sum() / mask.sum()),
        **values,
        **_known_value(trainer, view),
    }
    if trainer.column is None:
        return found, None
    reference = torch.cat([part.column("ref_logp") for part in parts])
    found["expected_equal"] = trainer.expect_equal
    found["largest_difference"] = float(torch.where(mask, logp - reference, 0.0).sum(-1).abs().max())
    try:
        check_step_zero({"logp": logp, "ref_logp": reference}, mask, engine.roles.dtype, trainer.expect_equal)
    except TrainingError as error:
        return found, error
    return found, None


def _as_equal(outputs: dict[str, Any]) -> dict[str, Any]:
    """The outputs as they would be if the reference gave exactly what the policy gives."""
    import torch

    equal = dict(outputs)
    for name, value in outputs.items():
        if name == "ref_logp":
            equal[name] = outputs["logp"]
        elif name.startswith("kl_"):
            equal[name] = torch.zeros_like(value)
    return equal


def _known_value(trainer: Any, view: Any) -> dict[str, Any]:
    """The loss by its formula; weights of rows would scale it."""
    weighted = any(bool((weight != 1).any()) for weight in view.weights().values())
    if trainer.method.id not in _KNOWN_AT_ZERO or not trainer.expect_equal or weighted:
        return {}
    formula, value = _KNOWN_AT_ZERO[trainer.method.id]
    return {"known_value": value(trainer.method.describe()), "known_formula": formula}
