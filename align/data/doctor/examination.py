"""The data report: streams, their tokens, and what train shares with evaluation and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from align.core.errors import AlignError
from align.core.progress import Progress, silent
from align.data.doctor.rows import RowPass, Wanted, overlap, question_overlap
from align.data.doctor.texts import prompt_text
from align.data.doctor.tokens import Lengths, measure, rendered, words
from align.data.prepare import Opened, open_sources
from align.data.tokenise import Tokeniser
from align.data.views import PairRule

SAMPLE = 10_000
"""Rows whose tokens are counted, evenly spaced among those read."""
RENDERED = 5

Watch = Callable[[int, str, str], AbstractContextManager[Progress]]
"""(units in all, what is done, what is counted) -> what is told of every advance."""


def unwatched(total: int, label: str, unit: str) -> AbstractContextManager[Progress]:
    """Nobody is told."""
    return nullcontext(silent)


@dataclass(frozen=True)
class Plan:
    """What is looked at, and as what.

    Attributes:
        view: a method's view; None: what the rows give.
        needs: columns that the method reads.
        pairs: how pairs are made of more than two answers.
        limit: most rows read of a stream, evenly spaced; None for all.
        sample: rows whose tokens (or words) are counted.
        tokenise: makes tokens; without it lengths are in words.
        benchmarks: data sources with the prompts of benchmarks that the user has.
    """

    view: str | None = None
    needs: Collection[str] = frozenset()
    pairs: PairRule = "best_worst"
    limit: int | None = None
    sample: int = SAMPLE
    tokenise: Tokeniser | None = None
    benchmarks: Sequence[Any] = ()


@dataclass
class Examination:
    """What was found.

    Attributes:
        report: plain values, ready for JSON.
        opened: stream -> its sources and readers.
        shapes: stream -> (prompt, answers) in tokens of every sampled group that is trained on; empty without tokens.
    """

    report: dict[str, Any]
    opened: dict[str, list[Opened]]
    shapes: dict[str, list[tuple[int, tuple[int, ...]]]] = field(default_factory=dict)


def examine(streams: Mapping[str, Sequence[Any]], plan: Plan, watch: Watch = unwatched) -> Examination:
    """Read every stream once and report on it.

    Args:
        streams: `train`, and perhaps `eval` -> sources as `prepare_data` takes them.
        plan: the view, the sample, the tokenizer.
        watch: told of progress.

    Returns:
        The examination. `report` holds `view`, `tokens` (whether lengths are in tokens), `streams` (name -> rows,
        reasons, duplicates, lengths, ...), `overlap` of train and eval, `benchmarks`.

    Raises:
        DataError: a source is not there, cannot be read, or does not give the view.
    """
    opened = {
        name: open_sources(sources, plan.view, plan.needs, purpose="eval" if name == "eval" else "train")
        for name, sources in streams.items()
    }
    view = plan.view or guessed_view(opened["train"])
    wanted = Wanted(view, _needs(plan, opened["train"], view), plan.pairs)
    report: dict[str, Any] = {"view": view, "tokens": plan.tokenise is not None, "streams": {}}
    found = Examination(report, opened)
    passes: dict[str, RowPass] = {}
    for name, sources in opened.items():
        passes[name] = _rows(name, sources, wanted, plan, watch)
        lengths = _lengths(name, passes[name], plan, watch)
        found.shapes[name] = lengths.shapes
        report["streams"][name] = _stream(passes[name], lengths, plan)
    report["overlap"] = overlap(passes["train"], passes["eval"]) if "eval" in passes else None
    report["benchmarks"] = [_benchmark(source, passes["train"], watch) for source in plan.benchmarks]
    return found


def guessed_view(opened: Sequence[Opened]) -> str:
    """The view that rows are looked at as where no method says it."""
    gives = {feedback for one in opened for feedback in one.reader.gives}
    if gives & {"preferences", "order"}:
        return "pairs"
    if gives & {"label", "reward"}:
        return "singles"
    return "demonstrations" if "demonstrations" in gives else "prompts"


def _needs(plan: Plan, opened: Sequence[Opened], view: str) -> frozenset[str]:
    """A view that was guessed from rewards reads rewards."""
    rated = plan.view is None and view == "singles" and all("reward" in one.reader.gives for one in opened)
    return frozenset(plan.needs) | ({"reward"} if rated else frozenset())


def _rows(name: str, sources: list[Opened], wanted: Wanted, plan: Plan, watch: Watch) -> RowPass:
    rows = RowPass(sources, wanted, plan.limit, plan.sample)
    with watch(len(rows.indices), f"reading {name}", "rows") as advance:
        rows.run(advance)
    return rows


def _lengths(name: str, rows: RowPass, plan: Plan, watch: Watch) -> Lengths:
    if plan.tokenise is None:
        return words(rows.sample, prompt_text)
    with watch(len(rows.sample), f"tokenising {name}", "rows") as advance:
        return measure(rows.sample, plan.tokenise, advance)


def _stream(rows: RowPass, lengths: Lengths, plan: Plan) -> dict[str, Any]:
    limit = None if plan.tokenise is None else plan.tokenise.max_length
    samples = [] if plan.tokenise is None else rendered(rows.sample, plan.tokenise, RENDERED)
    report = {**rows.report(), "lengths": lengths.report(limit, rows.kept), "samples": samples}
    if plan.tokenise is not None and lengths.looked == rows.kept:  # what tokens showed holds for all rows
        bad, dropped = (lengths.reasons.total(kind) for kind in (False, True))
        counts = report["rows"]
        counts["kept"] -= bad + dropped
        counts["bad"] += bad
        counts["dropped"] += dropped
    return report


def _benchmark(source: Any, train: RowPass, watch: Watch) -> dict[str, Any]:
    """How much of a benchmark that the user has stands in the training prompts."""
    opened = open_sources([source], "prompts", purpose="eval")
    rows = RowPass(opened, Wanted("prompts"), None, 0)
    with watch(len(rows.indices), "reading a benchmark", "rows") as advance:
        rows.run(advance)
    if not rows.kept:
        raise AlignError("no prompt could be read", where=opened[0].source.name, mend="name its column with `columns`")
    return {"name": opened[0].source.name, "how": "the same question", **question_overlap(train, rows)}
