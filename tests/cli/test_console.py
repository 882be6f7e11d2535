"""What all commands print with: colour and bars on terminals only, plain lines elsewhere, JSON that parses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from align.cli import console

ROOT = Path(__file__).resolve().parents[2]


def on_a_terminal(*words: str) -> str:
    """What a command writes to a terminal, escapes included."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, stdin=theirs, cwd=ROOT, env=environment) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            if not piece:
                break
            said += piece
        assert process.wait(60) == 0
    os.close(ours)
    return said.decode()


def test_escapes_stay_off_pipes() -> None:
    command = (sys.executable, "-m", "align", "methods")
    piped = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    seen = on_a_terminal(*command)
    assert "\x1b[" not in piped and "\x1b[1mmethods" in seen
    assert seen.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\r\n", "\n") == piped


def test_a_bar_on_a_terminal_tells_rate_and_remaining_time() -> None:
    code = (
        "import time\nfrom align.cli.console import progress\n"
        "with progress(40, 'sampling', 'completions') as advance:\n"
        "    for _ in range(20):\n        advance(2)\n        time.sleep(0.05)\n"
    )
    seen = on_a_terminal(sys.executable, "-c", code)
    assert "sampling" in seen and "completions/s" in seen and "0:00:0" in seen and "/40" in seen


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress(100, "sampling", "completions") as advance:
        for _ in range(10):
            now[0] += 6.0
            advance(10)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "sampling: 30/100, 1.7 completions/s, 42 s left",
        "sampling: 60/100, 1.7 completions/s, 24 s left",
        "sampling: 90/100, 1.7 completions/s, 6 s left",
    ]


def test_json_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (float("-inf"), "x")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [None, "x"]}}


def test_tables_and_notes_go_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(["method", "reward"], [["[bold]dpo[/bold]", "0.5"], ["simpo", "12.25"]])
    console.note("[red]left out[/red]: 3 rows")
    printed = capsys.readouterr()
    assert printed.err == "[red]left out[/red]: 3 rows\n"
    lines = [line.rstrip() for line in printed.out.splitlines() if "dpo" in line or "simpo" in line]
    assert lines == [" [bold]dpo[/bold]      0.5", " simpo               12.25"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89.4, "89 s"), (187, "3:07 min"), (5399, "89:59 min"), (7500, "2:05 h")]
)
def test_durations(seconds: float, said: str) -> None:
    assert console.duration(seconds) == said
