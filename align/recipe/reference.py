"""The reference of all options of a recipe, generated from what declares them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from align.core.options import Range, declared
from align.feedback.spec import FeedbackSpec
from align.recipe import library, sections
from align.sampling.spec import SamplerSpec
from align.shaping.base import SHAPING
from align.trainers.health import HealthOptions

_SECTIONS: tuple[tuple[str, type, str], ...] = (
    ("model", sections.Model, "Required"),
    ("model.peft", sections.Peft, "Optional: without it all weights are trained"),
    ("model.quantization", sections.Quantization, "Optional: with `model.peft` only"),
    ("data", sections.Data, "Required"),
    ("data.train, data.prompts, data.eval", sections.Stream, "A list of these, or of names alone"),
    ("reference", sections.Reference, "Optional: for methods that read a reference"),
    ("train", sections.Train, "Required"),
    ("eval", sections.Eval, "Optional: with `data.eval` only"),
    ("rounds", sections.Rounds, "Optional: without it there is one training"),
    ("rollout", sections.Rollout, "Optional"),
    (
        "sampler",
        SamplerSpec,
        "Optional. `dtype`, `device` and `max_model_len` are of `align sample`: a run has its own",
    ),
    ("feedback", FeedbackSpec, "A list of these. Required where a method samples"),
    ("health", HealthOptions, "Optional: without it every monitor warns"),
    ("provenance", sections.Provenance, "Optional"),
)


def markdown() -> str:
    """A table per section of a recipe: option, type, default, range, meaning; and the shipped recipes."""
    parts = [_section(name, cls, note) for name, cls, note in _SECTIONS]
    parts.insert(
        3, "## `method`\n\nThe id of a method, or `my_pkg.my_file:MyMethod`, as `name`, and its options. Required."
    )
    parts.insert(-1, _shaping())
    parts.append("## Shipped recipes\n\n" + shipped_table())
    return "\n\n".join(parts) + "\n"


def collecting() -> str:
    """A table per section of the recipe of `align sample`, `align judge` and `align pairs`."""
    from align.loops.stages import SampleSpec
    from align.recipe.collect import Prompts
    from align.shaping.selection import PairSpec

    parts = (
        ("data", Prompts, "Beside `prompts`, a list of streams"),
        ("sampler", SamplerSpec, "Optional"),
        ("sample", SampleSpec, "Optional"),
        ("feedback", FeedbackSpec, "A list of these"),
        ("pairs", PairSpec, "Required by `align pairs`"),
    )
    return "\n\n".join(_section(name, cls, note) for name, cls, note in parts)


def looping() -> str:
    """A table per part of the section `loop`."""
    from align.loops.options import Accept, Evaluation, Loop

    parts = (
        ("loop", Loop, "Or the name of a preset alone"),
        ("loop.evaluation", Evaluation, "Optional: without it nothing is measured"),
        ("loop.accept", Accept, "Optional: without it every round is taken"),
    )
    return "\n\n".join(_section(name, cls, note) for name, cls, note in parts)


def _shaping() -> str:
    """The stages that a list `shaping` may name, with their options."""
    rows = []
    for entry in SHAPING.entries().values():
        options = ", ".join(f"`{name}` ({one.default})" for name, one in entry.explained.items())
        paper = f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})" if entry.paper else ""
        rows.append((f"`{entry.id}`", options, paper, _cell(entry.summary)))
    return (
        "## `shaping`\n\nStages between the rewards and the method's own, in order: a list of names, or of mappings "
        "`{name: overlong, ...}` with options. Optional: for methods that read groups.\n\n"
        + _table(("stage", "options (default)", "paper", "what it does"), tuple(rows))
    )


def shipped_table() -> str:
    """Name and first sentence of every shipped recipe."""
    rows = [(f"`{one.name}`", _cell(one.title)) for one in library.shipped()]
    return _table(("recipe", "what it is"), rows)


def _section(name: str, cls: type, note: str) -> str:
    doc = (cls.__doc__ or "").partition("\n\n")[0].strip()
    rows = [
        (f"`{key}`", _type(hint), _default(field), _cell("; ".join(filter(None, (limits.doc, _range(limits))))))
        for key, field, limits, hint in declared(cls)
    ]
    title = ", ".join(f"`{one}`" for one in name.split(", "))
    return f"## {title}\n\n{doc} {note}.\n\n" + _table(("option", "type", "default", "meaning"), rows)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _type(hint: Any) -> str:
    return _cell(" or ".join(dict.fromkeys(_names(hint))))


def _names(hint: Any) -> Iterator[str]:
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for arm in get_args(hint):
            yield from _names(arm)
    elif origin is Literal:
        yield from (f"`{choice}`" for choice in get_args(hint))
    elif hint is type(None):
        yield "null"
    elif hint is Any:
        yield "see meaning"
    elif origin is not None:
        yield {tuple: "list", dict: "mapping", list: "list"}.get(origin, "mapping")
    else:
        yield {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
            hint.__name__, hint.__name__
        )


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default is not dataclasses.MISSING else None
    if field.default is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "(required)"
        value = field.default_factory()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return _cell(
        f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value not in ("", (), {}) else "(empty)"
    )


def _range(limits: Range) -> str:
    return limits.describe()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
