"""A mutant put in the place of the original, in every module that holds it already, and taken out again."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.mutation.operators import Mutant

_KEPT = {"__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__setattr__", "__delattr__"}
"""Attributes of a class that a fault in its body does not change, or that name the class itself."""


class Unplantable(Exception):
    """The mutated file is not a module any more: it cannot be imported."""


@contextmanager
def planted(mutant: Mutant, code: types.CodeType, package: str = "align.methods") -> Iterator[None]:
    """Run the block with the mutant's code: functions get its code objects, classes its attributes.

    The objects stay the same, so whoever imported them, or made instances, sees the fault.
    """
    live = sys.modules[f"{package}.{mutant.module}"]
    with ExitStack() as undo:
        if mutant.inside:
            function = _function(live, mutant.place)
            _replace_code(function, _code_of(code, mutant.place), undo.callback)
        else:
            _replace_module(live, _executed(live, code), undo.callback)
        yield


def _executed(live: types.ModuleType, code: types.CodeType) -> dict[str, Any]:
    # Dataclasses look their module up by name while they are made.
    fresh = types.ModuleType(live.__name__)
    fresh.__file__ = live.__file__
    sys.modules[live.__name__] = fresh
    try:
        exec(code, fresh.__dict__)  # noqa: S102  our own source with one node changed
    except Exception as error:
        raise Unplantable(f"{type(error).__name__}: {error}") from error
    finally:
        sys.modules[live.__name__] = live
    return fresh.__dict__


def _code_of(code: types.CodeType, name: str) -> types.CodeType:
    waiting = [code]
    while waiting:
        found = waiting.pop()
        if found.co_qualname == name:
            return found
        waiting += [constant for constant in found.co_consts if isinstance(constant, types.CodeType)]
    raise LookupError(name)


def _function(module: types.ModuleType, name: str) -> types.FunctionType:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    return _plain(found)


def _plain(found: Any) -> Any:
    """The Python function below a property, a class method or a cache (which is emptied)."""
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    while hasattr(found, "__wrapped__"):
        if hasattr(found, "cache_clear"):
            found.cache_clear()
        found = found.__wrapped__
    return found


def _replace_code(function: types.FunctionType, code: types.CodeType, undo: Callable[..., Any]) -> None:
    undo(setattr, function, "__code__", function.__code__)
    function.__code__ = code


def _replace_module(live: types.ModuleType, fresh: dict[str, Any], undo: Callable[..., Any]) -> None:
    for name, new in fresh.items():
        old = vars(live).get(name)
        if name.startswith("__") or isinstance(new, types.ModuleType):
            continue
        own = getattr(new, "__module__", live.__name__) == live.__name__
        if isinstance(new, type):
            if own and isinstance(old, type):
                _replace_class(old, new, undo)
        elif isinstance(_plain(new), types.FunctionType):
            if own:
                _replace_function(_plain(old), _plain(new), undo)
        elif own and name in vars(live):
            undo(setattr, live, name, old)
            setattr(live, name, new)


def _replace_class(old: type, new: type, undo: Callable[..., Any]) -> None:
    for name, value in vars(new).items():
        before = vars(old).get(name)
        if name in _KEPT:
            continue
        function, other = _plain(value), _plain(before)
        if _is_written(function, new) and isinstance(other, types.FunctionType):
            _replace_function(other, function, undo)
        elif name in vars(old):
            undo(setattr, old, name, before)
            setattr(old, name, value)
        else:
            undo(delattr, old, name)
            setattr(old, name, value)


def _is_written(function: Any, cls: type) -> bool:
    """Whether a function stands in the file, not made by `dataclass`."""
    return (
        isinstance(function, types.FunctionType)
        and function.__qualname__ == f"{cls.__qualname__}.{function.__name__}"
        and (not function.__code__.co_filename.startswith("<string>"))
    )


def _replace_function(old: types.FunctionType, new: types.FunctionType, undo: Callable[..., Any]) -> None:
    _replace_code(old, new.__code__, undo)
    for name in ("__defaults__", "__kwdefaults__"):
        undo(setattr, old, name, getattr(old, name))
        setattr(old, name, getattr(new, name))
