"""A user's function in a process of its own: one that hangs is ended, one that dies is started again.

`python -m align.feedback.worker MODULE:FUNCTION` reads one JSON line a call from its input and writes one a result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from align.core.errors import ConfigError
from align.feedback.calling import Died, Hung

Said = tuple[list[Any], list[tuple[str, float]], list[tuple[str, Sequence[Any]]]]
"""Values, metrics, extra columns."""
_START = 120.0
"""Seconds that a process may take to import a user's module."""


class Worker:
    """Calls a named function in a child process.

    Args:
        name: `my_pkg.my_file:my_function`, found on the path of this process.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[str] | None = None

    def call(self, given: Mapping[str, Any], logs: Sequence[str], deadline: float | None) -> Said:
        """One call.

        Raises:
            Hung: no answer in time; the process was ended. Died: it ended by itself. ConfigError: the rows cannot be
                sent. RuntimeError: what the function raised, in words.
        """
        try:
            line = json.dumps({"given": given, "logs": list(logs)})
        except TypeError as error:
            raise ConfigError(
                f"the rows cannot be sent to the isolated function `{self.name}`",
                why=str(error),
                mend="leave `isolate` out, or keep columns to numbers, texts and lists of them",
            ) from error
        process = self._ready()
        answer = self._exchange(process, line, deadline)
        if "raised" in answer:
            raise type(str(answer["raised"]), (RuntimeError,), {})(answer["why"])
        return answer["values"], answer["metrics"], answer["extras"]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _ready(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-m", "align.feedback.worker", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._process = process
        if self._exchange(process, "", _START) != {"ready": True}:
            raise Died
        return process

    def _exchange(self, process: subprocess.Popen[str], line: str, deadline: float | None) -> dict[str, Any]:
        """Write a line and read one; a watch ends the process at the deadline, which ends the reading."""
        stdin, stdout = process.stdin, process.stdout
        if stdin is None or stdout is None:
            raise Died
        hung = threading.Event()

        def end() -> None:
            hung.set()
            process.kill()

        watch = threading.Timer(deadline, end) if deadline is not None else None
        if watch is not None:
            watch.daemon = True
            watch.start()
        try:
            if line:
                stdin.write(line + "\n")
                stdin.flush()
            answer = stdout.readline()
        except OSError:
            answer = ""
        finally:
            if watch is not None:
                watch.cancel()
        if not answer.endswith("\n"):
            self.close()
            raise Hung if hung.is_set() else Died
        return json.loads(answer)  # type: ignore[no-any-return]


def _serve(name: str) -> None:
    from align.feedback.functions import load_function

    # What the function prints must not stand among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    function, _ = load_function(name)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_answer(function, asked["given"], asked["logs"])), file=answers, flush=True)


def _answer(function: Any, given: dict[str, Any], logs: Sequence[str]) -> dict[str, Any]:
    from align.feedback.calling import call, place

    metrics: list[tuple[str, float]] = []
    extras: list[tuple[str, list[Any]]] = []
    heard = {
        "log_extra": lambda name, values: extras.append((name, [_simple(value) for value in values])),
        "log_metric": lambda name, value: metrics.append((name, float(value))),
    }
    try:
        found = call(function, {**given, **{name: heard[name] for name in logs}}, None)
        values = [_simple(value) for value in found] if hasattr(found, "__iter__") else _simple(found)
    except Exception as error:  # noqa: BLE001 - told to the caller
        return {"raised": type(error).__name__, "why": f"{error} ({place(error)})"}
    return {"values": values, "metrics": metrics, "extras": extras}


def _simple(value: Any) -> Any:
    """What JSON holds: numbers of numpy and torch become Python's; the rest becomes text, which is no number."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)


if __name__ == "__main__":
    _serve(sys.argv[1])
