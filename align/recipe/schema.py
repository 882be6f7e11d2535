"""Reading a recipe: every fault at once, each with its line and what to write instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from align.core.errors import AlignError, ConfigError, ErrorList, raise_all, suggestion
from align.core.options import Range, check_value, declared
from align.core.registry import METHODS
from align.feedback.spec import FeedbackSpec
from align.recipe import extends, rules
from align.recipe.document import Item
from align.recipe.sections import (
    Data,
    Eval,
    MethodChoice,
    Model,
    Peft,
    Provenance,
    Quantization,
    Recipe,
    Reference,
    Rollout,
    Rounds,
    Stream,
    Train,
)
from align.sampling.spec import SamplerSpec
from align.trainers.health import HealthOptions

_PLAIN: dict[str, type] = {
    "reference": Reference,
    "train": Train,
    "eval": Eval,
    "rounds": Rounds,
    "rollout": Rollout,
    "sampler": SamplerSpec,
    "health": HealthOptions,
    "provenance": Provenance,
}
_REQUIRED = ("model", "method", "data", "train")
_LISTS = ("feedback", "shaping")
_SECTIONS = (*_REQUIRED, *_PLAIN, *_LISTS)
_ELSEWHERE = {
    "per_device_train_batch_size": "set `train.global_batch_size`; memory is `train.tokens_per_micro_batch`",
    "gradient_accumulation_steps": "set `train.global_batch_size`; memory is `train.tokens_per_micro_batch`",
    "warmup_ratio": "`train.warmup_steps` takes a share of the run below 1",
    "loss_type": "the loss is `method.name`",
    "bf16": "set `model.dtype: bfloat16`",
    "attn_implementation": "set `model.backend`",
    "use_peft": "add `model.peft`",
    "lora_r": "set `model.peft.r`",
    "bits": "set `load_in_4bit: true`",
    "type": "set `bnb_4bit_quant_type`",
    "double": "set `bnb_4bit_use_double_quant`",
    "bnb_4bit_compute_dtype": "set `model.dtype`",
    "load_in_8bit": "set `load_in_4bit: true`, or train without quantisation",
}
_WHY = {
    "load_in_8bit": "LLM.int8 looks for outliers in the whole batch, so a score would depend on its neighbours",
}


STREAMS = ("train", "prompts", "eval")
"""Keys of `data` that hold streams."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, check and resolve a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value`, `--section.key=value` or `--section.key`, `value`; values are YAML.

    Raises:
        ConfigError: the recipe cannot be used; several faults come as one `ErrorList`.
    """
    return read(path, overrides)[0]


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, dict[str, str]]:
    """As `load`, and what was written, `section.key`, to where: `recipe.yaml:12`, or `argument train.seed=7`."""
    return build(extends.read(path, overrides))


def build(root: Item) -> tuple[Recipe, dict[str, str]]:
    """A recipe from a parsed document without `extends`, and where its options were written.

    Raises:
        ConfigError: as `load`.
    """
    reader = _Reader()
    recipe = reader.recipe(root)
    if recipe is not None:
        reader.errors += rules.check(recipe, reader.given, reader.uses)
    raise_all(reader.errors)
    if recipe is None:
        raise ConfigError("the recipe is incomplete", where=root.where, mend="add what is missing")
    return rules.resolve(recipe), reader.given


class _Reader:
    """Builds sections from items. `given` maps what was written, `section.key`, to where."""

    def __init__(self) -> None:
        self.errors: list[AlignError] = []
        self.given: dict[str, str] = {}
        self.uses: rules.Uses | None = None

    def recipe(self, root: Item) -> Recipe | None:
        for key, item in root.value.items():
            if key not in _SECTIONS:
                self.fault(f"unknown section `{key}`", item, suggestion(key, _SECTIONS))
        items = {key: item for key, item in root.value.items() if key in _SECTIONS and item.value is not None}
        for key in _REQUIRED:
            if key not in items:
                self.fault(f"the section `{key}` is missing", root, f"add `{key}:`")
        builders = {
            "model": self.model,
            "method": self.method,
            "data": self.data,
            "feedback": self.feedback,
            "shaping": self.shaping,
        }
        parts: dict[str, Any] = {}
        for key, item in items.items():
            self.given.setdefault(key, item.where)
            parts[key] = builders[key](item) if key in builders else self.located(_PLAIN[key], key, item)
        whole = all(parts.get(key) is not None for key in {*_REQUIRED, *parts})
        return Recipe(**parts) if whole else None

    def model(self, item: Item) -> Model | None:
        extra: dict[str, Any] = {}
        below = item.value if isinstance(item.value, dict) else {}
        for key, cls in (("peft", Peft), ("quantization", Quantization)):
            part = below.get(key)
            if part is not None and part.value is not None:
                self.given[f"model.{key}"] = part.where
                extra[key] = self.section(cls, f"model.{key}", part)
                self.names(part, f"model.{key}", "target_modules", text_allowed=True)
                self.names(part, f"model.{key}", "modules_to_save")
                self.names(part, f"model.{key}", "llm_int8_skip_modules")
        return self.section(Model, "model", item, extra, also=("peft", "quantization"))

    def data(self, item: Item) -> Data | None:
        extra: dict[str, Any] = {}
        for key in STREAMS:
            streams = item.value.get(key) if isinstance(item.value, dict) else None
            if streams is not None and streams.value is not None:
                self.given[f"data.{key}"] = streams.where
                extra[key] = self.streams(streams, f"data.{key}")
        return self.section(Data, "data", item, extra, also=STREAMS)

    def feedback(self, item: Item) -> tuple[FeedbackSpec, ...] | None:
        """Judges: a list of sections, or one."""
        entries = item.value if isinstance(item.value, list) else [item]
        if not entries:
            self.fault("`feedback` is empty", item, "name a reward function, a reward model or a judge")
        found = [self.located(FeedbackSpec, f"feedback.{number}", entry) for number, entry in enumerate(entries)]
        self.given["feedback"] = item.where
        judges = tuple(one for one in found if one is not None)
        return judges if judges and len(judges) == len(found) else None

    def located(self, cls: type, owner: str, item: Item) -> Any:
        """As `section`; options that do not go together are reported where the section stands."""
        try:
            return self.section(cls, owner, item)
        except ConfigError as error:
            for one in error.errors if isinstance(error, ErrorList) else (error,):
                self.errors.append(ConfigError(one.what, where=item.where, why=one.why, mend=one.mend))
            return None

    def shaping(self, item: Item) -> tuple[Mapping[str, Any], ...] | None:
        """Stages of shaping: `{name: overlong, ...}` each, or a name alone."""
        from align.shaping import base as shaping

        entries = item.value if isinstance(item.value, list) else [item]
        before, found = len(self.errors), []
        self.given["shaping"] = item.where
        for number, entry in enumerate(entries):
            plain = entry.plain() if isinstance(entry.value, dict) else {"name": entry.plain()}
            if not isinstance(plain.get("name"), str):
                self.fault(f"`shaping.{number}` has no `name`", entry, "write {name: overlong, ...}")
                continue
            try:
                shaping.make(plain["name"], {k: v for k, v in plain.items() if k != "name"}, entry.where)
            except ErrorList as errors:
                self.errors += errors.errors
            except ConfigError as error:
                self.errors.append(ConfigError(error.what, where=entry.where, why=error.why, mend=error.mend))
            found.append(plain)
        return tuple(found) if len(self.errors) == before else None

    def streams(self, item: Item, owner: str) -> tuple[Stream, ...] | None:
        entries = item.value if isinstance(item.value, list) else [item]
        if not entries:
            self.fault(f"`{owner}` is empty", item, "name a file, a folder or a hub id")
        found = []
        for number, entry in enumerate(entries):
            if isinstance(entry.value, str):
                entry = Item({"name": entry}, entry.where)
            found.append(self.section(Stream, f"{owner}.{number}", entry, {"where": entry.where}))
            self.below(entry, f"{owner}.{number}", ("columns", "winner", "filters"))
        return None if not found or None in found else tuple(found)

    def below(self, entry: Item, owner: str, keys: tuple[str, ...]) -> None:
        """Note where the entries of free mappings stand."""
        for key in keys:
            part = entry.value.get(key) if isinstance(entry.value, dict) else None
            if part is not None and isinstance(part.value, dict):
                self.given |= {f"{owner}.{key}.{name}": item.where for name, item in part.value.items()}

    def method(self, item: Item) -> MethodChoice | None:
        if not isinstance(item.value, dict):
            item = Item({"name": item}, item.where)
        name = item.value.get("name")
        if name is None or not isinstance(name.value, str):
            self.fault("`method.name` is missing", name or item, "`align methods` lists what there is")
            return None
        self.given["method.name"] = name.where
        try:
            cls = METHODS.get(name.value, name.where)
        except ErrorList as errors:
            self.errors += errors.errors
            return None
        except ConfigError as error:
            self.errors.append(error)
            return None
        options = {key: value for key, value in item.value.items() if key != "name"}
        known = {key: (field, limits, hint) for key, field, limits, hint in declared(cls)}
        values, fine = self.values(f"method `{name.value}`", options, known, "method", _owner_of(name.value))
        values, fine = self._required(f"method `{name.value}`", item, values, known, fine)
        if not fine:
            return None
        try:
            instance = rules.build_method(cls, values)
        except ConfigError as error:
            self.errors.append(ConfigError(error.what, where=item.where, why=error.why, mend=error.mend))
            return None
        self.uses = rules.Uses.of(instance)
        return MethodChoice(name=name.value, options=instance.describe())

    def section(
        self, cls: type, owner: str, item: Item, extra: Mapping[str, Any] | None = None, also: tuple[str, ...] = ()
    ) -> Any:
        """An instance of a section, or None where it has a fault."""
        if not isinstance(item.value, dict):
            self.fault(f"`{owner}` is {item.value!r}, not a mapping of options", item, "")
            return None
        known = {key: (field, limits, hint) for key, field, limits, hint in declared(cls)}
        options = {key: value for key, value in item.value.items() if key not in also}
        values, fine = self.values(f"`{owner}`", options, known, owner, _section_of, also)
        values, fine = self._required(f"`{owner}`", item, values, known, fine)
        extra = extra or {}
        return cls(**values, **extra) if fine and None not in extra.values() else None

    def values(
        self,
        owner: str,
        options: Mapping[str, Item],
        known: Mapping[str, tuple[dataclasses.Field[Any], Range, Any]],
        prefix: str,
        elsewhere: Any,
        also: tuple[str, ...] = (),
    ) -> tuple[dict[str, Any], bool]:
        """Checked values by field name, and whether all were fine."""
        values: dict[str, Any] = {}
        before = len(self.errors)
        for key, item in options.items():
            self.given[f"{prefix}.{key}"] = item.where
            if key not in known:
                why = _WHY.get(key, "") or elsewhere(key)
                mend = _ELSEWHERE.get(key, "") or ("" if why else suggestion(key, [*known, *also]))
                self.errors.append(ConfigError(f"{owner} has no option `{key}`", where=item.where, why=why, mend=mend))
                continue
            field, limits, hint = known[key]
            try:
                values[field.name] = check_value(owner, key, _as_written(item, hint), limits, hint, item.where)
            except ConfigError as error:
                self.errors.append(error)
        return values, len(self.errors) == before

    def _required(
        self, owner: str, item: Item, values: dict[str, Any], known: Mapping[str, Any], fine: bool
    ) -> tuple[dict[str, Any], bool]:
        for key, (field, limits, _) in known.items():
            bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if bare and key not in item.value:
                self.fault(f"{owner} needs `{key}`", item, f"give {limits.doc}")
                fine = False
        return values, fine

    def names(self, item: Item, owner: str, key: str, text_allowed: bool = False) -> None:
        entry = item.value.get(key) if isinstance(item.value, dict) else None
        if entry is None or entry.value is None or (text_allowed and isinstance(entry.value, str)):
            return
        if not isinstance(entry.value, list) or not all(isinstance(name.value, str) for name in entry.value):
            self.fault(f"`{owner}.{key}` is {entry.plain()!r}", entry, "give a list of module names")

    def fault(self, what: str, item: Item, mend: str) -> None:
        self.errors.append(ConfigError(what, where=item.where, mend=mend))


def _as_written(item: Item, hint: Any) -> Any:
    """A number where text is wanted (`paper: 2405.10470`) is the text as it stands; items below become plain."""
    wants_text = hint is str or (str in get_args(hint) and not {int, float} & set(get_args(hint)))
    if wants_text and item.text is not None and isinstance(item.value, (int, float)) and item.value is not True:
        return item.text if item.value is not False else item.value
    return item.plain()


def _section_of(key: str) -> str:
    for section, cls in {**_PLAIN, "model": Model, "data": Data}.items():
        if key in {name for name, *_ in declared(cls)}:
            return f"`{key}` belongs to `{section}`"
    owners = [entry.id for entry in METHODS.entries().values() if key in entry.options]
    return f"`{key}` is an option of a method, in `method`" if owners else ""


def _owner_of(method: str) -> Any:
    def why(key: str) -> str:
        owners = [entry.id for entry in METHODS.entries().values() if key in entry.options]
        if owners:
            return f"`{method}` does not use `{key}`, an option of " + ", ".join(f"`{owner}`" for owner in owners)
        return _section_of(key)

    return why
