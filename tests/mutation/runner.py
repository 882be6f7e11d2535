"""Every mutant of the methods against the tests that run the mutated code, all in one process.

The tests are collected once by pytest and run once as they are, while each function of `align/methods` that they enter
is noted. Then, mutant by mutant, those that entered the mutated function run until one fails. A test that fails without
any mutant is left out and named in the result.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import align.methods
from align.core.options import declared
from align.methods.base import Method
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.operators import NOT_METHODS, Mutant, Source, method_files
from tests.mutation.planting import Unplantable, planted

ROOT = Path(__file__).parents[2]
METHODS_FOLDER = Path(align.methods.__file__).parent
TESTS = ("tests/methods", "tests/invariants/test_battery.py")
LEFT_OUT = (
    "test_make_view.py",
    "test_cost.py",
    "test_the_battery_catches",
    "test_a_good_method_passes",
    # Made from the declarations as they are imported: a fault in a file would change these tests too.
    "test_each_bound_refuses",
    "test_a_choice_that_is_not_there",
)
"""Tests of other parts, which only pass through a method, and tests that would not see what they seem to see."""

_PLUGINS_OFF = (
    "cacheprovider terminal logging timeout faulthandler unraisableexception threadexception warnings junitxml"
)
CPU_SECONDS = 20.0


@dataclass
class Result:
    """What became of the mutants.

    Attributes:
        killed: mutant key -> the test that failed.
        survived: mutants that no test noticed and that are not known to be equivalent.
        equivalent: those that no test noticed and are listed as equivalent.
        wrongly_listed: those that are listed as equivalent and a test noticed.
        broken: mutants whose file cannot be imported; they count nowhere.
        failing: tests that fail without a mutant.
        uncollected: test files that cannot be collected.
    """

    killed: dict[str, str] = field(default_factory=dict)
    survived: list[Mutant] = field(default_factory=list)
    equivalent: list[Mutant] = field(default_factory=list)
    wrongly_listed: list[Mutant] = field(default_factory=list)
    broken: list[Mutant] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)
    uncollected: list[str] = field(default_factory=list)
    mutants: list[Mutant] = field(default_factory=list)
    seconds: float = 0.0

    def share(self, module: str = "") -> float:
        """Killed mutants out of those that are neither equivalent nor broken; of one file, or of all."""
        killed = sum(m.key in self.killed for m in self.mutants if module in ("", m.module))
        survived = sum(module in ("", m.module) for m in self.survived)
        return killed / max(killed + survived, 1)

    def by_module(self) -> dict[str, dict[str, Any]]:
        """File -> its numbers, and what survived in it."""
        counts: Mapping[str, list[Mutant]] = defaultdict(list)
        for mutant in self.mutants:
            counts[mutant.module].append(mutant)
        return {
            module: {
                "mutants": len(own),
                "killed": sum(m.key in self.killed for m in own),
                "equivalent": sum(m.module == module for m in self.equivalent),
                "broken": sum(m.module == module for m in self.broken),
                "survivors": [f"{m.line}: {m.key}" for m in self.survived if m.module == module],
            }
            for module, own in sorted(counts.items())
        }


def sources(modules: Iterable[str] = ()) -> list[Source]:
    """The parsed files of the methods (all, or those named)."""
    wanted = set(modules)
    return [Source.of(path) for path in method_files(METHODS_FOLDER) if not wanted or path.stem in wanted]


def run(
    chosen: Sequence[tuple[Source, Mutant]],
    *,
    keep: Callable[[pytest.Item], bool] = lambda item: True,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Run the tests against each of `chosen`; `keep` narrows the tests down."""
    plugin = _Plugin(chosen, keep, say)
    off = [word for name in _PLUGINS_OFF.split() for word in ("-p", f"no:{name}")]
    started = time.monotonic()
    with _working_directory(ROOT), _virtual_alarm():
        flags = ["-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "--assert=plain", "-s"]
        code = pytest.main([*flags, *off, "--continue-on-collection-errors", *TESTS], plugins=[plugin])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ends with {code}: see its output")
    plugin.result.seconds = time.monotonic() - started
    return plugin.result


class _Plugin:
    """Takes over pytest's loop once the tests are collected."""

    def __init__(
        self,
        chosen: Sequence[tuple[Source, Mutant]],
        keep: Callable[[pytest.Item], bool],
        say: Callable[[str], None],
    ) -> None:
        self.chosen, self.keep, self.say = chosen, keep, say
        self.result = Result(mutants=[mutant for _, mutant in chosen])
        self.entered: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.items: list[pytest.Item] = []
        self.cost: dict[int, float] = {}
        self.kills: Counter[tuple[str, int]] = Counter()
        self.failed = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.result.uncollected.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport:
        skipped = call.excinfo is not None and call.excinfo.errisinstance(pytest.skip.Exception)
        outcome: Any = "passed" if call.excinfo is None else "skipped" if skipped else "failed"
        self.failed |= outcome == "failed"
        # No traceback is made: thousands of tests are meant to fail here.
        return pytest.TestReport(item.nodeid, item.location, {}, outcome, None, call.when)  # type: ignore[arg-type]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        unmarked = [item for item in session.items if item.get_closest_marker("slow") is None]
        self.items = [item for item in unmarked if self.keep(item) and not any(n in item.nodeid for n in LEFT_OUT)]
        self._baseline()
        for number, (source, mutant) in enumerate(self.chosen, 1):
            self._try(source, mutant)
            if number % 100 == 0:
                self.say(f"{number} of {len(self.chosen)} mutants, {len(self.result.survived)} survived")
        return True

    def _passes(self, item: pytest.Item) -> bool:
        self.failed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return not self.failed

    def _baseline(self) -> None:
        for index, item in enumerate(self.items):
            with _traced() as met:
                started = time.perf_counter()
                passed = self._passes(item)
                self.cost[index] = time.perf_counter() - started
            if not passed:
                self.result.failing.append(item.nodeid)
                continue
            for place in met:
                self.entered[place].add(index)
        self.say(f"{len(self.items)} tests in {sum(self.cost.values()):.1f} s, {len(self.result.failing)} fail")

    def _relevant(self, mutant: Mutant) -> list[int]:
        """The tests that enter the mutated function (of a declaration: that enter or make anything of its file)."""
        if mutant.inside:
            found = self.entered[mutant.module, mutant.place]
        else:
            found = {i for (module, _), own in self.entered.items() if module == mutant.module for i in own}
        place = f"{mutant.module}.{mutant.place}"
        return sorted(found, key=lambda i: (-self.kills[place, i], self.cost[i]))

    def _try(self, source: Source, mutant: Mutant) -> None:
        killer = self._killer(source, mutant)
        if killer is None:
            return
        listed = mutant.key in EQUIVALENT
        if killer:
            self.result.killed[mutant.key] = killer
            if listed:
                self.result.wrongly_listed.append(mutant)
        else:
            (self.result.equivalent if listed else self.result.survived).append(mutant)

    def _killer(self, source: Source, mutant: Mutant) -> str | None:
        """The test that fails, an empty text where none does, None where there is nothing to run."""
        try:
            with planted(mutant, source.compile(mutant)):
                for index in self._relevant(mutant):
                    if not self._passes(self.items[index]):
                        self.kills[f"{mutant.module}.{mutant.place}", index] += 1
                        return self.items[index].nodeid
        except Unplantable:
            self.result.broken.append(mutant)
            return None
        return ""


_PLACES: dict[types.CodeType, tuple[str, str] | None] = {}
"""Of code that was entered: its place, where that is in a method's file."""


@contextmanager
def _traced() -> Iterator[set[tuple[str, str]]]:
    """The (file, function) of the methods' folder entered in the block, and (file, "") of each method made or asked."""
    met: set[tuple[str, str]] = set()
    makers = {Method.__post_init__.__code__: "self", declared.__code__: "cls"}

    def trace(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if code not in _PLACES:
            _PLACES[code] = _place(code)
        if place := _PLACES[code]:
            met.add(place)
        elif code in makers:
            made = frame.f_locals[makers[code]]
            cls = made if isinstance(made, type) else type(made)
            met.update((base.__module__.rpartition(".")[2], "") for base in cls.__mro__)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield met
    finally:
        sys.settrace(before)


def _place(code: types.CodeType) -> tuple[str, str] | None:
    path = Path(code.co_filename)
    if path.parent != METHODS_FOLDER or path.stem in NOT_METHODS:
        return None
    return path.stem, code.co_qualname.partition(".<locals>")[0]


@contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _virtual_alarm() -> Iterator[None]:
    """A mutant that never ends is stopped; by processor time, since the machine may be busy with other things."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("the mutant does not end")

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGVTALRM, before)
