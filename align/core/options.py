"""Declared options: a default, a range, a sentence; checked when a frozen dataclass is made."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from align.core.errors import AlignError, ConfigError, suggestion

_RANGE = "align_range"
BOUNDS = {"above": ">", "at_least": ">=", "below": "<", "at_most": "<="}
"""Argument of `option` -> its sign, in the order in which a range is told."""


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The values an option may take; bounds are exclusive (`above`, `below`) or inclusive."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    doc: str = ""

    def describe(self) -> str:
        bounds = ((sign, getattr(self, name)) for name, sign in BOUNDS.items())
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)

    def admits(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


def option(
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    doc: str,
) -> Any:
    """Declare a field of an options dataclass, with its range and a sentence of documentation."""
    limits = Range(above, at_least, below, at_most, doc)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={_RANGE: limits})
    return dataclasses.field(default=default, metadata={_RANGE: limits})


def public_name(field_name: str) -> str:
    """`lambda_` in Python is `lambda` in recipes."""
    return field_name.rstrip("_")


def declared(cls: type) -> Iterator[tuple[str, dataclasses.Field[Any], Range, Any]]:
    """Yield (public name, field, range, type) of each declared option of a dataclass."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if _RANGE in field.metadata:
            yield public_name(field.name), field, field.metadata[_RANGE], hints[field.name]


def check_value(owner: str, name: str, value: Any, limits: Range, hint: Any, where: str = "") -> Any:
    """Return `value` coerced to `hint` (int to float, and text of a number to a number), or raise `ConfigError`."""
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        arms = get_args(hint)
        if value is None and type(None) in arms:
            return None
        hint = next(arm for arm in arms if arm is not type(None))
        origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(
                f"{owner}: `{name}` is {value!r}",
                where=where,
                mend="use one of " + ", ".join(repr(choice) for choice in get_args(hint)),
            )
        return value
    value = _coerce(owner, name, value, hint, where)
    if hint in (int, float) and not limits.admits(value):
        raise ConfigError(
            f"{owner}: `{name}` is {value!r}, outside its range",
            where=where,
            mend=f"use a finite value {limits.describe()}".rstrip(),
        )
    return value


def _coerce(owner: str, name: str, value: Any, hint: Any, where: str) -> Any:
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads `1e-6` as text; a learning rate must not fail for want of a dot.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is int and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if number.is_integer():
            return int(number)
    elif (hint in (bool, str) and isinstance(value, hint)) or hint not in (float, int, bool, str):
        return value
    raise ConfigError(
        f"{owner}: `{name}` is {value!r} ({type(value).__name__})",
        where=where,
        mend=f"give a value of type {hint.__name__}",
    )


def check_all(instance: Any, owner: str) -> None:
    """Check and coerce every declared option of a (frozen) dataclass instance in place."""
    for name, field, limits, hint in declared(type(instance)):
        value = check_value(owner, name, getattr(instance, field.name), limits, hint)
        object.__setattr__(instance, field.name, value)


def build(cls: type, owner: str, given: Mapping[str, Any], where: str = "") -> tuple[Any, list[AlignError]]:
    """Build `cls` from public option names; return (instance or None, all errors)."""
    known = {name: (field, limits, hint) for name, field, limits, hint in declared(cls)}
    errors: list[AlignError] = []
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            errors.append(ConfigError(f"{owner}: unknown option `{name}`", where=where, mend=suggestion(name, known)))
            continue
        field, limits, hint = known[name]
        try:
            values[field.name] = check_value(owner, name, value, limits, hint, where)
        except ConfigError as error:
            errors.append(error)
    return (None, errors) if errors else (cls(**values), errors)
