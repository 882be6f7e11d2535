"""What commands print with: colour on terminals only, tables, progress with rate and remaining time, JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align.core.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 15.0
"""Seconds between lines of progress where there is no terminal."""


def console(stderr: bool = False) -> Console:
    """A console on stdout or stderr as they are now; without a terminal: no colour, and lines as long as they are."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # NO_COLOR and TERM=dumb are rich's own affair.
    width = None if stream.isatty() else 200
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else there. A number that is not finite becomes null."""
    print(json.dumps(_finite(value), indent=1, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout. The first column is text, the others are numbers and stand to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out = console()
    # A number that is cut is worse than a line that wraps.
    wide = out.measure(table).maximum
    if wide > out.width:
        out.width = wide
        out.soft_wrap = True
    out.print(table)


def note(text: str) -> None:
    """A line for people, on stderr, so that stdout stays what was asked for."""
    from rich.text import Text

    console(stderr=True).print(Text(text))


def set_up_logging(quiet: bool = False) -> None:
    """What this package logs becomes notes on stderr, of rank 0 only below warnings; libraries keep to warnings.

    `quiet`: warnings only, where a command tells its own story.

    Libraries' own progress bars (shards written, weights loaded) go: they count things that nobody waits for.
    """
    log = logging.getLogger("align")
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes())
    first = os.environ.get("RANK", "0") == "0"
    log.setLevel(logging.INFO if first and not quiet else logging.WARNING)
    # Said at import on every machine without a GPU, and of no use to anybody who trains on one.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not _has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    # Of a resumed run; what may differ is checked by `AlignTrainer`, which refuses the rest with a reason.
    logging.getLogger("transformers.trainer_utils").addFilter(_settings_that_may_differ)
    logging.getLogger("transformers.trainer").addFilter(_settings_that_may_differ)


def _settings_that_may_differ(record: logging.LogRecord) -> bool:
    return "arguments do not match the ones in the `trainer_state.json`" not in str(record.msg)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class _Notes(logging.Handler):
    """Log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        note(prefix + record.getMessage())


@contextmanager
def progress(total: int, label: str, unit: str = "") -> Iterator[Progress]:
    """How far a piece of work is: a bar on a terminal, a line every 15 seconds elsewhere; on stderr.

    Args:
        total: units in all.
        label: what is being done: `sampling`.
        unit: what is counted, for the rate: `completions`.
    """
    if not sys.stderr.isatty():
        yield _Lines(total, label, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]}")
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(label, total=total, rate="")
        started, count = time.monotonic(), 0

        def advance(done: int) -> None:
            nonlocal count
            count += done
            seconds = time.monotonic() - started
            bar.update(task, advance=done, rate=_rate(count, seconds, unit))

        yield advance


class _Lines:
    """Progress where nobody watches a bar: a line now and then."""

    def __init__(self, total: int, label: str, unit: str) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = 0
        self.started = self.said = time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.said < _EVERY or self.done >= self.total:
            return
        self.said = now
        seconds = now - self.started
        left = seconds * (self.total - self.done) / max(self.done, 1)
        rate = _rate(self.done, seconds, self.unit)
        print(f"{self.label}: {self.done}/{self.total}, {rate}, {duration(left)} left", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`45 s`, `3:07 min`, `2:05 h`."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes, seconds_left = divmod(whole, 60)
    if minutes < 90:
        return f"{minutes}:{seconds_left:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def _rate(done: int, seconds: float, unit: str) -> str:
    value = done / seconds if seconds > 0 else 0.0
    shown = f"{value:.0f}" if value >= 10 else f"{value:.2g}"
    return f"{shown} {unit}/s" if unit else f"{shown}/s"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
