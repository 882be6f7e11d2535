"""Reading a recipe: every fault at once, each with its line and what to write instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from align.core.errors import AlignError, ConfigError, ErrorList, raise_all, suggestion
from align.core.options import Range, check_value, declared
from align.core.registry import METHODS
from align.recipe import document, rules
from align.recipe.document import Item
from align.recipe.sections import (
    Data,
    Eval,
    MethodChoice,
    Model,
    Peft,
    Provenance,
    Recipe,
    Reference,
    Stream,
    Train,
)

_PLAIN: dict[str, type] = {"reference": Reference, "train": Train, "eval": Eval, "provenance": Provenance}
_REQUIRED = ("model", "method", "data", "train")
_SECTIONS = (*_REQUIRED, "reference", "eval", "provenance")
_ELSEWHERE = {
    "per_device_train_batch_size": "set `train.global_batch_size`; memory is `train.tokens_per_micro_batch`",
    "gradient_accumulation_steps": "set `train.global_batch_size`; memory is `train.tokens_per_micro_batch`",
    "warmup_ratio": "`train.warmup_steps` takes a share of the run below 1",
    "loss_type": "the loss is `method.name`",
    "bf16": "set `model.dtype: bfloat16`",
    "attn_implementation": "set `model.backend`",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, check and resolve a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value`, `--section.key=value` or `--section.key`, `value`; values are YAML.

    Raises:
        ConfigError: the recipe cannot be used; several faults come as one `ErrorList`.
    """
    root = document.read(path, overrides)
    reader = _Reader()
    recipe = reader.recipe(root)
    if recipe is not None:
        reader.errors += rules.check(recipe, reader.given, reader.uses)
    raise_all(reader.errors)
    if recipe is None:
        raise ConfigError("the recipe is incomplete", where=str(path))
    return rules.resolve(recipe)


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
        builders = {"model": self.model, "method": self.method, "data": self.data}
        parts: dict[str, Any] = {}
        for key, item in items.items():
            parts[key] = builders[key](item) if key in builders else self.section(_PLAIN[key], key, item)
        whole = all(parts.get(key) is not None for key in {*_REQUIRED, *parts})
        return Recipe(**parts) if whole else None

    def model(self, item: Item) -> Model | None:
        extra: dict[str, Any] = {}
        peft = item.value.get("peft") if isinstance(item.value, dict) else None
        if peft is not None and peft.value is not None:
            extra["peft"] = self.section(Peft, "model.peft", peft)
            self.names(peft, "target_modules", text_allowed=True)
            self.names(peft, "modules_to_save", text_allowed=False)
        return self.section(Model, "model", item, extra, also=("peft",))

    def data(self, item: Item) -> Data | None:
        extra: dict[str, Any] = {}
        for key in ("train", "eval"):
            streams = item.value.get(key) if isinstance(item.value, dict) else None
            if streams is not None and streams.value is not None:
                self.given[f"data.{key}"] = streams.where
                extra[key] = self.streams(streams, f"data.{key}")
        if isinstance(item.value, dict) and "train" not in extra:
            self.fault("`data.train` is missing", item, "name a file, a folder or a hub id")
        return self.section(Data, "data", item, extra, also=("train", "eval"))

    def streams(self, item: Item, owner: str) -> tuple[Stream, ...] | None:
        entries = item.value if isinstance(item.value, list) else [item]
        if not entries:
            self.fault(f"`{owner}` is empty", item, "name a file, a folder or a hub id")
        found = []
        for number, entry in enumerate(entries):
            if isinstance(entry.value, str):
                entry = Item({"name": entry}, entry.where)
            found.append(self.section(Stream, f"{owner}.{number}", entry))
        return None if not found or None in found else tuple(found)

    def method(self, item: Item) -> MethodChoice | None:
        if not isinstance(item.value, dict):
            item = Item({"name": item}, item.where)
        name = item.value.get("name")
        if name is None or not isinstance(name.value, str):
            self.fault("`method.name` is missing", name or item, "`align methods` lists what there is")
            return None
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
                why = elsewhere(key)
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

    def names(self, item: Item, key: str, text_allowed: bool) -> None:
        entry = item.value.get(key) if isinstance(item.value, dict) else None
        if entry is None or entry.value is None or (text_allowed and isinstance(entry.value, str)):
            return
        if not isinstance(entry.value, list) or not all(isinstance(name.value, str) for name in entry.value):
            self.fault(f"`model.peft.{key}` is {entry.plain()!r}", entry, "give a list of module names")

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
