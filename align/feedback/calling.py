"""Calling what users wrote: with a deadline, and so that a call that fails costs only the rows that make it fail."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from align.core.errors import AlignError, ConfigError, suggestion
from align.core.progress import Progress, silent
from align.feedback.base import Failed

_log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
HOPELESS = 3
"""Items in a row that may fail alone, in a way that costs time, before the rest is not tried any more."""


class Hung(Exception):
    """A call did not return before its deadline."""


class Died(Exception):
    """What was called ended its process."""


def run_async(work: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine, also where an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    return in_thread(lambda: asyncio.run(work), None)


def in_thread(work: Callable[[], R], deadline: float | None) -> R:
    """Run in a thread of its own.

    Raises:
        Hung: it did not return within `deadline` seconds. The thread is left to itself: Python cannot stop it.
    """
    result: list[R] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except (Exception, SystemExit) as raised:  # noqa: BLE001 - handed on to the caller
            error.append(raised)

    thread = threading.Thread(target=run, daemon=True, name="align-feedback")
    thread.start()
    thread.join(deadline)
    if thread.is_alive():
        raise Hung
    if error:
        raise error[0]
    return result[0]


def call(function: Callable[..., Any], given: Mapping[str, Any], deadline: float | None) -> Any:
    """`function(**given)`, awaited where it is asynchronous.

    Raises:
        Hung: no answer within `deadline` seconds. Whatever the function raises.
    """

    def work() -> Any:
        found = function(**given)
        return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found

    return in_thread(work, deadline)


async def _awaited(found: Any) -> Any:
    return await found


def accepted(
    function: Callable[..., Any], given: Mapping[str, Any], owner: str, columns: Sequence[str] = ()
) -> dict[str, Any]:
    """What the function's signature takes of `given`: all where it has `**kwargs`, else what it names.

    Raises:
        ConfigError: it asks for an argument that is not there.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return dict(given)
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for one in parameters:
        if one.kind in named and one.default is inspect.Parameter.empty and one.name not in given:
            raise ConfigError(
                f"{owner} asks for `{one.name}`, which is neither given to it nor a column of the data",
                mend=suggestion(one.name, columns) or "give the data that column, or the argument a default",
            )
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return dict(given)
    names = {one.name for one in parameters}
    return {name: value for name, value in given.items() if name in names}


def each(
    work: Callable[[Sequence[T]], Sequence[R]],
    items: Sequence[T],
    batch: int,
    owner: str,
    costly: tuple[type[BaseException], ...] = (Hung,),
    progress: Progress = silent,
) -> list[R | Failed]:
    """`work` on batches of at most `batch` items; one result, or why there is none, per item.

    A batch on which `work` raises, runs out of time or dies is halved until the items that make it fail stand alone.

    Args:
        costly: errors that cost time. After `HOPELESS` items in a row that failed alone with one of them, the rest is
            not tried.
        progress: counts items, whatever became of them.
    """
    out: dict[int, R | Failed] = {}
    waiting = [list(range(start, min(start + batch, len(items)))) for start in range(0, len(items), batch)][::-1]
    lost, told = 0, Counter[str]()
    while waiting:
        part = waiting.pop()
        if lost >= HOPELESS:
            out |= dict.fromkeys(part, Failed(f"not tried: {HOPELESS} in a row had failed"))
            progress(len(part))
            continue
        try:
            found = work([items[i] for i in part])
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's own code: it costs its own rows
            failed = _failed(error)
            if len(part) == 1:
                lost = lost + 1 if isinstance(error, costly) else 0
                said = f"{owner}: {failed.reason}{_where(error)}"
                told[said] += 1
                if told[said] == 1:
                    _log.warning("%s", said)
        else:
            out |= dict(zip(part, found, strict=True))
            lost = 0
            progress(len(part))
            continue
        if len(part) == 1:
            out[part[0]] = failed
            progress(1)
        else:
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]
    for said, count in told.items():
        if count > 1:
            _log.warning("%s, %d times in all", said, count)
    return [out[i] for i in range(len(items))]


def place(error: BaseException) -> str:
    """The file and line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _failed(error: BaseException) -> Failed:
    if isinstance(error, Hung):
        return Failed("no answer before the deadline")
    if isinstance(error, Died):
        return Failed("its process died")
    if isinstance(error, AlignError):
        return Failed(f"raised {type(error).__name__}: {error.what}")
    return Failed(f"raised {type(error).__name__}")


def _where(error: BaseException) -> str:
    return "" if isinstance(error, (Hung, Died)) else f": {error} ({place(error)})"
