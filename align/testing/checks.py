"""The battery: what every method must pass. `battery` and `model_battery` report, `check_method` raises.

Each check runs for the default options and for variants of them (each other choice, and all numbers moved). Wrong
formulas are not found here: compare a method with a loop written from its paper for that.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from align.core.errors import AlignError, ConfigError
from align.core.options import Range, declared
from align.core.registry import METHODS
from align.methods.base import Method
from align.testing.bare import BARE_CHECKS


@dataclass(frozen=True)
class Check:
    """One result: the check's name, the options it ran with, what went wrong (nothing: an empty text), and its time."""

    name: str
    options: str
    problem: str = ""
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        return not self.problem

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.name} ({self.options})" + f": {self.problem}" * (not self.ok)


def battery(method: str | type[Method] | Method, seed: int = 0) -> list[Check]:
    """Run every automatic check on a method.

    Args:
        method: an id, `my_pkg.my_file:MyMethod`, a class (default options and variants of them), or an instance
            (its own options only).
        seed: of the random rows.
    """
    if isinstance(method, Method):
        cls: type[Method] = type(method)
        instances: dict[str, Method] = {"as given": method}
    else:
        cls = METHODS.get(method) if isinstance(method, str) else method
        instances = variants(cls)
    results = [
        _run(name, label, check, instance, seed)
        for label, instance in instances.items()
        for name, check in BARE_CHECKS.items()
    ]
    return [*results, *option_checks(cls)]


def model_battery(method: str | type[Method] | Method, seed: int = 0) -> list[Check]:
    """Run the checks that need a model, with the default options: real steps, and a run that is stopped and resumed."""
    from align.testing.on_model import MODEL_CHECKS

    cls = METHODS.get(method) if isinstance(method, str) else method
    instance = cls if isinstance(cls, Method) else cls()
    return [_run(name, "defaults", check, instance, seed) for name, check in MODEL_CHECKS.items()]


def check_method(method: str | type[Method] | Method, seed: int = 0, model: bool = False) -> None:
    """Raise one `AlignError` that lists all failed checks of a method; with `model`, of `model_battery` too."""
    results = battery(method, seed) + (model_battery(method, seed) if model else [])
    failed = [result for result in results if not result.ok]
    if failed:
        name = method if isinstance(method, str) else method.id
        raise AlignError(f"method `{name}` fails {len(failed)} checks of the battery", why="\n".join(map(str, failed)))


def _run(name: str, label: str, check: Callable[[Method, int], str], method: Method, seed: int) -> Check:
    started = time.monotonic()
    try:
        problem = check(method, seed)
    except Exception as error:  # noqa: BLE001  a check that a method breaks has failed, whatever is raised
        problem = f"{type(error).__name__}: {error}"
    return Check(name, label, problem, time.monotonic() - started)


def variants(cls: type[Method]) -> dict[str, Method]:
    """The default instance, one per other choice of an option, and one with every number moved inside its range."""
    missing = [name for name, field, _, _ in declared(cls) if _required(field)]
    if missing:
        raise ConfigError(
            f"method `{cls.id}` has options without a default: " + ", ".join(missing),
            mend="give the battery an instance of the class",
        )
    made = {"defaults": cls()}
    moved: dict[str, Any] = {}
    for name, field, limits, hint in declared(cls):
        default = getattr(made["defaults"], field.name)
        if get_origin(hint) is Literal:
            for choice in get_args(hint):
                if choice != default:
                    made[f"{name}={choice}"] = cls(**{field.name: choice})
        elif isinstance(default, float):
            moved[field.name] = _inside(default, limits)
    if moved:
        made["numbers moved"] = cls(**moved)
    return made


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _inside(default: float, limits: Range) -> float:
    """Another value of the range than the default: half as much again, or 0.3, or halfway to the upper bound."""
    candidates = [default * 1.5 if default else 0.3]
    upper = limits.below if limits.below is not None else limits.at_most
    if upper is not None:
        candidates.append((default + upper) / 2)
    return next((value for value in candidates if limits.admits(value) and value != default), default)


def option_checks(cls: type[Method]) -> Iterator[Check]:
    """Every bound and choice of every option refuses what lies outside it."""
    for name, field, limits, hint in declared(cls):
        for bad in out_of_range(limits, hint):
            problem = "" if _refused(cls, {field.name: bad}) else f"{bad!r} is accepted"
            yield Check("options", name, problem)


def out_of_range(limits: Range, hint: Any) -> list[Any]:
    """Values just outside an option's range, of another type, or not among its choices."""
    if get_origin(hint) is Literal:
        return ["no such choice", None]
    if hint not in (int, float):
        return []
    bad: list[Any] = [math.nan, math.inf, -math.inf, "text", None, True]
    bad += [bound for bound in (limits.above, limits.below) if bound is not None]
    if limits.at_least is not None:
        bad.append(limits.at_least - 1 if hint is int else math.nextafter(limits.at_least, -math.inf))
    if limits.at_most is not None:
        bad.append(limits.at_most + 1 if hint is int else math.nextafter(limits.at_most, math.inf))
    return bad


def _refused(cls: type[Method], options: Mapping[str, Any]) -> bool:
    try:
        cls(**options)
    except ConfigError:
        return True
    return False
