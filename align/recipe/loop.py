"""A recipe with a section `loop`: a preset below it, and of the whole a recipe to collect and a recipe to train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import AlignError, ConfigError, ErrorList, raise_all
from align.core.registry import METHODS
from align.loops.options import Accept, Evaluation, Loop
from align.loops.preset import LOOPS, Preset
from align.loops.rounds import Plan
from align.recipe import collect, extends, rules, schema
from align.recipe.collect import Collect
from align.recipe.document import Item
from align.recipe.sections import Recipe

ROWS = "the rows of the round"
"""Stands for `data.train` until there is a round."""
ROLES = ("policy", "before", "initial", "base")
"""Words for models in `feedback`."""
_COLLECT = ("model", "data", "sampler", "sample", "feedback", "pairs", "output_dir")
_TRAIN = ("model", "data", "method", "reference", "train", "eval", "provenance")
_SECTIONS = tuple(dict.fromkeys((*_COLLECT, *_TRAIN, "loop")))
_THE_LOOPS = {
    "train.output_dir": "a round trains in its own folder: write `output_dir` at the top",
    "train.resume": "a loop always goes on where it was stopped",
    "reference.model": "write `loop.reference`",
    "reference.previous": "the previous policy is the one that sampled",
    "data.train": "a round trains on the pairs that it made",
}


@dataclass(frozen=True)
class LoopRecipe:
    """A checked recipe of a loop, with what its preset says.

    Attributes:
        loop: with nothing null that the preset or a default fills. preset: its class.
        collect: of the stages that sample, judge and pair. train: of the training; its rows are to come.
        uses: what the method reads. plain: all of it as one document, without `extends`.
    """

    loop: Loop
    preset: type[Preset]
    collect: Collect
    train: Recipe
    uses: rules.Uses
    plain: Mapping[str, Any]

    @property
    def output(self) -> Path:
        return Path(self.collect.output_dir).expanduser()

    def plan(self, initial: str) -> Plan:
        """What the engine needs. `initial`: folder or hub id of the model that the loop starts from."""
        loop = self.loop
        return Plan(
            output=self.output,
            initial=initial,
            rounds=loop.rounds or 1,
            reference=loop.reference or "previous",
            init=loop.init,
            earlier=tuple(loop.earlier or ()),
            accept=loop.accept,
            max_kl=loop.max_kl,
        )

    def yaml(self) -> str:
        """The whole recipe as a file that says the same."""
        return yaml.safe_dump(dict(self.plain), sort_keys=False, allow_unicode=True)


def read(path: str | Path, overrides: Sequence[str] = ()) -> LoopRecipe:
    """Read and check a recipe of a loop.

    Raises:
        ConfigError: the recipe cannot be used; several faults come as one `ErrorList`.
    """
    return build(extends.read(path, overrides))


def build(root: Item) -> LoopRecipe:
    """A recipe from a parsed document without `extends`.

    Raises:
        ConfigError: as `read`.
    """
    reader = _Reader()
    loop, preset = reader.loop(root)
    if loop is None or preset is None:
        raise_all(reader.errors)
        raise ConfigError("the section `loop` is missing", where=root.where, mend="add `loop: {preset: ...}`")
    whole = _over_preset(root, preset)
    collected, trained = reader.both(whole)
    if collected is None or trained is None:
        raise_all(reader.errors)
        raise ConfigError("the recipe is incomplete", where=root.where, mend="add what is missing")
    uses = rules.Uses.of(rules.build_method(METHODS.get(trained.method.name), trained.method.options))
    made = LoopRecipe(loop, preset, collected, trained, uses, whole.plain())
    raise_all([*reader.errors, *_faults(made, reader.given)])
    return made


class _Reader(schema._Reader):
    """Reads the section `loop`, and the others by the readers that they have."""

    def loop(self, root: Item) -> tuple[Loop | None, type[Preset] | None]:
        item = root.value.get("loop")
        for key, entry in root.value.items():
            if key not in _SECTIONS:
                self.fault(f"unknown section `{key}`", entry, schema.suggestion(key, _SECTIONS))
        if item is None or item.value is None:
            return None, None
        if isinstance(item.value, str):
            item = Item({"preset": item}, item.where)
        extra: dict[str, Any] = {}
        below = item.value if isinstance(item.value, dict) else {}
        for key, cls in (("evaluation", Evaluation), ("accept", Accept)):
            part = below.get(key)
            if part is not None and part.value is not None:
                self.given[f"loop.{key}"] = part.where
                extra[key] = self.section(cls, f"loop.{key}", part)
        found: Loop | None = self.section(Loop, "loop", item, extra, also=("evaluation", "accept"))
        if found is None:
            return None, None
        try:
            preset: type[Preset] = LOOPS.get(found.preset, self.given["loop.preset"])
        except ConfigError as error:
            self.errors.append(error)
            return None, None
        missing = {name: why for name, why in preset.asks.items() if getattr(found, name) is None}
        for name, why in missing.items():
            self.fault(f"`loop.{name}` has no default with `{preset.id}`", item, f"choose it: {why}")
        defaults = {name: value for name, value in preset.loop.items() if getattr(found, name) is None}
        return dataclasses.replace(found, **defaults), preset

    def both(self, whole: Item) -> tuple[Collect | None, Recipe | None]:
        """The two recipes, or None where one has faults."""
        for key, mend in _THE_LOOPS.items():
            section, _, name = key.partition(".")
            below = whole.value.get(section)
            if below is not None and isinstance(below.value, dict) and name in below.value:
                self.fault(f"`{key}` in a loop", below.value[name], mend)
        collected = self.attempt(lambda: collect.build(_part(whole, _COLLECT), "pairs"))
        trained = self.attempt(lambda: schema.build(_training(whole)))
        self.given |= trained[1] if trained else {}
        return collected, trained[0] if trained else None

    def attempt(self, make: Any) -> Any:
        """What it makes; its errors are kept, each once."""
        try:
            return make()
        except ErrorList as errors:
            found: Sequence[AlignError] = errors.errors
        except ConfigError as error:
            found = [error]
        known = {str(error) for error in self.errors}
        self.errors += [error for error in found if str(error) not in known]
        return None


def _over_preset(root: Item, preset: type[Preset]) -> Item:
    """The recipe over what the preset says of its sections."""
    where = f"preset `{preset.id}`"
    below: dict[str, Any] = {"sample": dict(preset.sample), "method": dict(preset.method)}
    # The options of one rule mean nothing to another.
    own = root.value.get("pairs")
    rule = own.value.get("rule") if own is not None and isinstance(own.value, dict) else own
    if rule is None or rule.value in (None, preset.pairs.get("rule")):
        below["pairs"] = dict(preset.pairs)
    if preset.feedback and "feedback" not in root.value:
        below["feedback"] = [dict(entry) for entry in preset.feedback]
    if own is not None and isinstance(own.value, str):
        root = Item({**root.value, "pairs": Item({"rule": own}, own.where)}, root.where)
    return extends.merge(_item(below, where), root)


def _item(value: Any, where: str) -> Item:
    if isinstance(value, dict):
        return Item({key: _item(entry, where) for key, entry in value.items()}, where)
    if isinstance(value, list):
        return Item([_item(entry, where) for entry in value], where)
    return Item(value, where, None if isinstance(value, (dict, list)) else str(value))


def _part(whole: Item, sections: Sequence[str]) -> Item:
    """Some sections; `method` goes along, which says that model and data serve two commands."""
    kept = {key: item for key, item in whole.value.items() if key in (*sections, "method")}
    return Item(kept, whole.where)


def _training(whole: Item) -> Item:
    """The recipe of a training, with a place kept for its rows and its folder."""
    kept = dict(_part(whole, _TRAIN).value)
    data, train = kept.get("data"), kept.get("train")
    below = dict(data.value) if data is not None and isinstance(data.value, dict) else {}
    below.pop("prompts", None)
    where = data.where if data is not None else whole.where
    kept["data"] = Item({**below, "train": _item([ROWS], where)}, where)
    own = dict(train.value) if train is not None and isinstance(train.value, dict) else {}
    own.pop("resume", None)
    where = train.where if train is not None else whole.where
    kept["train"] = Item({**own, "output_dir": _item(ROWS, where)}, where)
    return Item(kept, whole.where)


def _faults(made: LoopRecipe, given: Mapping[str, str]) -> Iterator[AlignError]:
    loop = made.loop

    def fault(key: str, what: str, why: str, mend: str) -> ConfigError:
        return ConfigError(what, where=given.get(key, given.get("loop.preset", "")), why=why, mend=mend)

    if "loop.reference" in given and not made.uses.reference:
        yield fault(
            "loop.reference", "`loop.reference` is unused", f"`{made.train.method.name}` reads none", "remove it"
        )
    if made.uses.online:
        name = made.train.method.name
        yield fault("method.name", f"`{name}` in a loop", "it samples before every step", "train it: align train")
    if made.preset.wants != "none" and not made.collect.feedback:
        yield fault(
            "loop.preset",
            "the recipe has no `feedback`",
            f"`{loop.preset}` asks for a {made.preset.wants}",
            "add `feedback: [...]`",
        )
    if loop.extrapolate and made.train.model.peft is not None:
        yield fault(
            "loop.extrapolate",
            "`loop.extrapolate` with `model.peft`",
            "increments are of whole weights",
            "train all weights",
        )
    yield from _earlier_faults(loop, fault)
    yield from _evaluation_faults(loop, given, fault)
    for number, entry in enumerate(made.collect.feedback):
        asked = {getattr(entry, key, None) for key in ("model", "reference")}
        if "base" in asked and loop.base is None and "loop.base" not in made.preset.asks:
            yield fault(
                f"feedback.{number}",
                "feedback against `base`, and there is no `loop.base`",
                "",
                "name the model that the initial one was trained from",
            )


def _earlier_faults(loop: Loop, fault: Any) -> Iterator[AlignError]:
    earlier = loop.earlier or []
    good = isinstance(earlier, list) and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in earlier)
    if not good:
        yield fault(
            "loop.earlier", f"`loop.earlier` is {loop.earlier!r}", "", "write a list of shares from 0 to 1: [0.3, 0.15]"
        )
    elif loop.consistency is not None and any(earlier):
        yield fault(
            "loop.earlier",
            "`loop.earlier` with `loop.consistency`",
            "the trust in labels is of one round",
            "leave one out",
        )


def _evaluation_faults(loop: Loop, given: Mapping[str, str], fault: Any) -> Iterator[AlignError]:
    """Measures that nothing measures."""
    held = loop.evaluation
    if held is None:
        for key in ("accept", "max_kl"):
            if getattr(loop, key) is not None:
                yield fault(
                    f"loop.{key}",
                    f"`loop.{key}` without `loop.evaluation`",
                    "nothing is measured",
                    "add `loop.evaluation`",
                )
        return
    if held.reward is not None and held.world is not None:
        yield fault(
            "loop.evaluation.reward",
            "`loop.evaluation` has a reward and a world",
            "a world brings its own",
            "leave one out",
        )
    if held.data is None and held.world is None:
        yield fault(
            "loop.evaluation", "`loop.evaluation` has no held-out rows", "", "name a file with `data`, or a `world`"
        )
    if held.split is not None and held.data is None:
        yield fault("loop.evaluation.split", "`loop.evaluation.split` is unused", "there is no `data`", "remove it")
    if held.temperature == 0 and loop.max_kl is not None:
        yield fault(
            "loop.max_kl", "`loop.max_kl` at temperature 0", "KL is not measured there", "sample at temperature 1"
        )
    if loop.accept is not None and loop.accept.metric != "accuracy" and held.reward is None and held.world is None:
        yield fault(
            "loop.accept",
            f"`loop.accept.metric: {loop.accept.metric}` without a reward",
            "",
            "give `loop.evaluation.reward`",
        )
