"""What holds between the sections of a recipe: options nobody reads, paths that are not there, resolved defaults."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import AlignError, ConfigError, MissingExtra, suggestion
from align.core.options import declared
from align.recipe.sections import Recipe, Stream
from align.recipe.streams import round_faults, stream_faults
from align.sampling import spec

_PAIR_METRICS = ("accuracy", "margin", "rewards/accuracies", "rewards/margins")
_DATA_FILES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".gz", ".zst")

_USUAL_OPTIMISERS = frozenset(
    {
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "rmsprop",
        "sgd",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    }
)


@dataclass(frozen=True, slots=True)
class Uses:
    """What the chosen method, with its options, reads."""

    view: str
    reference: bool
    value: bool
    guide: bool = False
    needs: frozenset[str] = frozenset()
    online: bool = False
    previous: bool = False

    @classmethod
    def of(cls, method: Any) -> Uses:
        needs = method.requires()
        return cls(
            view=method.view,
            reference=any(name in ("ref_logp", "cross_entropy") or name.startswith("kl_") for name in needs),
            value="value" in needs,
            guide="anchor.guide" in needs,
            needs=needs,
            online=method.rollouts() is not None,
            previous="anchor.previous" in needs,
        )


def build_method(cls: type, values: Mapping[str, Any]) -> Any:
    """A method from options by field name or public name (`lambda` for `lambda_`)."""
    fields = {name: field.name for name, field, *_ in declared(cls)}
    return cls(**{fields.get(name, name): value for name, value in values.items()})


def unused(recipe: Recipe, uses: Uses) -> dict[str, str]:
    """`section.key` -> why nothing reads it in this recipe."""
    found: dict[str, str] = {}
    if uses.view != "pairs" or uses.online:
        found["data.pairs"] = f"`{recipe.method.name}` reads {'prompts' if uses.online else uses.view}, not pairs"
    found |= _unused_streams(recipe, uses)
    if not uses.value:
        found |= dict.fromkeys(
            ("train.value_learning_rate", "train.value_max_grad_norm"), f"`{recipe.method.name}` has no value role"
        )
    found |= _unused_reference(recipe, uses)
    if recipe.train.max_steps is not None:
        found["train.num_train_epochs"] = "`train.max_steps` says how long the run is"
    if recipe.train.lr_scheduler_type == "constant":
        found["train.warmup_steps"] = "`constant` has no warm-up; `constant_with_warmup` has"
    if not recipe.data.eval:
        found |= dict.fromkeys(("eval.every", "eval.best", "eval.patience"), "there is no `data.eval`")
    elif recipe.eval.every is None:
        found |= dict.fromkeys(("data.eval", "eval.best"), "`eval.every` is null")
    if recipe.rounds is not None and not recipe.rounds.bootstrap:
        found |= dict.fromkeys(("rounds.samples", "rounds.max_new_tokens"), "`rounds.bootstrap` is 0")
    if recipe.rounds is not None and recipe.rounds.count == 2:
        found["rounds.ensemble"] = "two rounds have no margins before the last"
    if recipe.eval.best is None:
        found.setdefault("eval.patience", "there is no `eval.best` to be patient about")
    return found


_ONLINE = ("rollout", "sampler", "feedback", "shaping", "health")
"""Sections of methods that sample."""
_THE_TRAINERS = {
    "sampler.dtype": "a run samples in its own `model.dtype`",
    "sampler.device": "a run samples where it trains",
    "sampler.max_model_len": "`data.max_length` says it",
}


def _unused_streams(recipe: Recipe, uses: Uses) -> dict[str, str]:
    """Streams and sections that belong to the other kind of method, and a sampler's options of another kind."""
    found: dict[str, str] = {}
    name = recipe.method.name
    if uses.online:
        found["data.train"] = f"`{name}` samples its own answers; its prompts are `data.prompts`"
        found["data.score"] = f"`{name}` samples its own answers, and all of one is scored"
    else:
        found |= dict.fromkeys(("data.prompts", *_ONLINE), f"`{name}` trains on data that are there")
    if recipe.sampler is not None:
        found |= {f"sampler.{option}": why for option, why in spec.unused(recipe.sampler).items()} | _THE_TRAINERS
    return found


def _unused_reference(recipe: Recipe, uses: Uses) -> dict[str, str]:
    keys = {name: f"reference.{name}" for name, *_ in declared(type(recipe.reference))}
    if not uses.reference:
        return dict.fromkeys(keys.values(), f"`{recipe.method.name}` reads no reference")
    kind = recipe.reference.kind
    found = {}
    if not uses.guide:
        found[keys["guide"]] = f"`{recipe.method.name}` has no guide"
    if not uses.previous:
        found[keys["previous"]] = f"`{recipe.method.name}` reads no previous policy"
    if kind != "cached":
        found[keys["cache_dir"]] = f"it is read with `kind: cached`, not `{kind}`"
    if kind != "ema":
        found |= dict.fromkeys((keys["decay"], keys["every"]), f"it is read with `kind: ema`, not `{kind}`")
    if kind in ("adapter_off", "ema"):
        found[keys["model"]] = f"with `kind: {kind}` the reference comes from the policy"
    return found


def check(recipe: Recipe, given: Mapping[str, str], uses: Uses | None) -> Iterator[AlignError]:
    """Yield the faults that show only between sections. `given`: what was written -> where."""
    if uses is not None:
        for key, why in unused(recipe, uses).items():
            if key in given:
                yield ConfigError(f"`{key}` is unused", where=given[key], why=why, mend="remove it")
        if uses.guide and recipe.reference.guide is None:
            yield ConfigError(
                f"`{recipe.method.name}` needs a trained policy as its guide",
                where=given.get("method.name", ""),
                mend="set `reference.guide`, for example to a finished dpo run's `policy` folder",
            )
        yield from _best(recipe, given, uses)
    if recipe.reference.kind == "adapter_off" and recipe.model.peft is None:
        yield ConfigError(
            "`reference.kind: adapter_off` without an adapter",
            where=given.get("reference.kind", ""),
            mend="add `model.peft`, or use `frozen`",
        )
    yield from _quantization(recipe, given)
    if recipe.rounds is not None and uses is not None:
        yield from round_faults(recipe, given, uses.view, uses.needs)
    yield from _missing(recipe, uses, given)
    for key, streams in (
        ("data.train", recipe.data.train),
        ("data.prompts", recipe.data.prompts),
        ("data.eval", recipe.data.eval),
    ):
        yield from _streams(key, streams, given)
    yield from _paths(recipe, given)
    yield from _optimiser(recipe, given)
    tool = recipe.train.report_to
    if tool != "none" and importlib.util.find_spec(tool) is None:
        yield ConfigError(
            f"`{tool}` is not installed",
            where=given.get("train.report_to", ""),
            mend=f"pip install {tool.replace('_', '-')}, or write `none`",
        )


def _best(recipe: Recipe, given: Mapping[str, str], uses: Uses) -> Iterator[AlignError]:
    """A metric that no evaluation of this run gives."""
    best = recipe.eval.best
    name = (best or "").removeprefix("eval_")
    if uses.online and name in (*_PAIR_METRICS, "loss"):
        yield ConfigError(
            f"`eval.best` is `{best}`, which evaluation of a run that samples does not give",
            where=given.get("eval.best", ""),
            why="held-out prompts are answered and judged; nothing is compared with rows",
            mend="write `reward`, `reward/NAME` of a held-out feedback, or leave it out",
        )
    elif uses.view != "pairs" and name in _PAIR_METRICS:
        yield ConfigError(
            f"`eval.best` is `{best}`, which only pairs have",
            where=given.get("eval.best", ""),
            why=f"`{recipe.method.name}` reads {uses.view}",
            mend="write `loss`, or leave it out",
        )


def _missing(recipe: Recipe, uses: Uses | None, given: Mapping[str, str]) -> Iterator[AlignError]:
    """What a method of its kind cannot do without."""
    online = uses is not None and uses.online
    where = given.get("method.name", "")
    if online and not recipe.data.prompts:
        yield ConfigError("`data.prompts` is missing", where=where, mend="name a file, a folder or a hub id of prompts")
    if not online and not recipe.data.train:
        yield ConfigError("`data.train` is missing", where=where, mend="name a file, a folder or a hub id")
    if online and not recipe.feedback:
        yield ConfigError(
            f"`{recipe.method.name}` needs someone who judges what it samples",
            where=where,
            mend="add `feedback: [{kind: function, name: my_file:my_reward}]`",
        )


def _optimiser(recipe: Recipe, given: Mapping[str, str]) -> Iterator[AlignError]:
    name = recipe.train.optim
    if name in _USUAL_OPTIMISERS:
        return
    from transformers.training_args import OptimizerNames  # slow to import, and few recipes name another

    known = [str(one.value) for one in OptimizerNames]
    if name not in known:
        yield ConfigError(
            f"transformers has no optimiser `{name}`",
            where=given.get("train.optim", ""),
            mend=suggestion(name, known) or "write `adamw_torch`",
        )


def _quantization(recipe: Recipe, given: Mapping[str, str]) -> Iterator[AlignError]:
    model, where = recipe.model, given.get("model.quantization", "")
    if model.quantization is None or not model.quantization.load_in_4bit:
        return
    if model.peft is None:
        yield ConfigError(
            "`model.quantization` without `model.peft`",
            where=where,
            why="4-bit weights have no gradient",
            mend="add `model.peft: {r: 64, lora_alpha: 64}`, or remove the quantisation",
        )
    elif model.peft.bias != "none":
        yield ConfigError(
            f"`model.peft.bias: {model.peft.bias}` over quantised weights",
            where=given.get("model.peft.bias", where),
            why="the biases of quantised layers are kept in the compute dtype and cannot be trained",
            mend="write `bias: none`",
        )
    if recipe.reference.kind == "ema":
        yield ConfigError(
            "`reference.kind: ema` over quantised weights",
            where=given.get("reference.kind", where),
            why="the base weights do not move",
            mend="write `adapter_off`",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        yield MissingExtra(
            "`model.quantization` needs bitsandbytes, which is not installed",
            where=where,
            mend='pip install "align-lm[quantized]", or remove the quantisation',
        )


def _streams(key: str, streams: tuple[Stream, ...], given: Mapping[str, str]) -> Iterator[AlignError]:
    for number, stream in enumerate(streams):
        owner = f"{key}.{number}"
        where = given.get(f"{owner}.name", given.get(key, ""))
        if _looks_local(stream.name, _DATA_FILES) and not Path(stream.name).expanduser().exists():
            yield ConfigError(f"there is no `{stream.name}`", where=where, mend="check the path")
        yield from stream_faults(stream, owner, given, where)
        if stream.weight != 1.0 and (key == "data.eval" or len(streams) == 1):
            yield ConfigError(
                f"`{owner}.weight` is unused",
                where=given.get(f"{owner}.weight", where),
                why="evaluation reads every row" if key == "data.eval" else "there is one stream, and nothing to mix",
                mend="remove it; `max_rows` limits a stream",
            )


def _paths(recipe: Recipe, given: Mapping[str, str]) -> Iterator[AlignError]:
    for key, name in (
        ("model.name", recipe.model.name),
        ("reference.model", recipe.reference.model),
        ("reference.guide", recipe.reference.guide),
        ("reference.previous", recipe.reference.previous),
    ):
        if name and _looks_local(name, ()) and not Path(name).expanduser().is_dir():
            yield ConfigError(f"there is no model folder `{name}`", where=given.get(key, ""), mend="check the path")
    if recipe.model.revision is not None and Path(recipe.model.name).expanduser().is_dir():
        yield ConfigError(
            "`model.revision` is unused",
            where=given.get("model.revision", ""),
            why="the model is a folder, not a hub id",
            mend="remove it",
        )
    template = recipe.data.chat_template
    if template != "model" and not Path(template).expanduser().is_file():
        yield ConfigError(
            f"there is no chat template `{template}`",
            where=given.get("data.chat_template", ""),
            mend="write `model`, or the path of a Jinja file",
        )
    resume = recipe.train.resume
    if resume not in ("auto", "never") and not Path(resume).expanduser().is_dir():
        yield ConfigError(
            f"there is no checkpoint folder `{resume}`",
            where=given.get("train.resume", ""),
            mend="write auto, never, or the path of a checkpoint folder",
        )


def _looks_local(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.endswith(suffixes or ("/",))


def resolve(recipe: Recipe) -> Recipe:
    """Fill in what depends on several sections: the learning rate; no evaluation without its data."""
    train, evaluation = recipe.train, recipe.eval
    if train.learning_rate is None:
        from align.trainers.config import default_learning_rate  # slow to import, and most recipes name a rate

        rate = default_learning_rate(recipe.method.name, recipe.model.peft is not None)
        train = dataclasses.replace(train, learning_rate=rate)
    if not recipe.data.eval:
        evaluation = dataclasses.replace(evaluation, every=None)
    return dataclasses.replace(recipe, train=train, eval=evaluation)


def to_plain(recipe: Recipe, uses: Uses) -> dict[str, Any]:
    """The recipe as nested plain values, without what nothing reads, so that loading it again gives the same run."""
    plain = dataclasses.asdict(recipe)
    plain["method"] = {"name": recipe.method.name, **recipe.method.options}
    for key in unused(recipe, uses):
        section, _, name = key.partition(".")
        if not name:
            plain.pop(section, None)
        elif plain.get(section):
            plain[section].pop(name, None)
    for key in ("train", "prompts", "eval"):
        if not plain["data"].get(key):
            plain["data"].pop(key, None)
        else:
            plain["data"][key] = [
                {name: value for name, value in stream.items() if name != "where" and value is not None}
                for stream in plain["data"][key]
            ]
    judges = plain.get("feedback") or ()
    plain["feedback"] = [{name: value for name, value in one.items() if value is not None} for one in judges]
    return {section: values for section, values in plain.items() if values}


def to_yaml(recipe: Recipe, uses: Uses) -> str:
    """The resolved recipe as a file."""
    return yaml.safe_dump(to_plain(recipe, uses), sort_keys=False, allow_unicode=True)
