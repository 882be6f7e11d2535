"""A data report for people: tables on stdout, rows with their scored tokens in colour, or in brackets without one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.cli.console import console, print_table

OPEN, CLOSE = "\u27e6", "\u27e7"
"""Around scored tokens where there is no colour."""
_SKIPPED = {"unit", "looked", "of", "all", "length_bias", "reasons", "bad", "bad_share", "max_length", "truncation"}
_QUANTILES = ("mean", "p5", "p50", "p95", "p99", "max")


def print_report(report: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> None:
    """The whole report, stream by stream, and what is above its limit."""
    for name, stream in report["streams"].items():
        _print_stream(name, stream, report["view"])
    _print_overlaps(report)
    _print_limits(judged)


def print_samples(stream: Mapping[str, Any]) -> None:
    """The rendered rows of a stream."""
    from rich.text import Text

    if not stream["samples"]:
        return
    out, colour = console(), sys.stdout.isatty()
    legend = "scored tokens are green" if colour else f"scored tokens stand in {OPEN}{CLOSE}"
    out.print(Text(f"\n{len(stream['samples'])} rows as they are trained on; {legend}"))
    for sample in stream["samples"]:
        out.print(Text(f"\n{sample['row']}", style="bold"))
        out.print(Text.assemble(("prompt: ", "dim"), _marked(sample["prompt"], colour)))
        for answer in sample["completions"]:
            cut = "" if answer["finished"] else " (its end was cut)"
            out.print(Text.assemble((f"{answer['role']}{cut}: ", "dim"), _marked(answer["tokens"], colour)))


def print_named(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Names and what is to be said of them, which may run over several lines."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    table.add_column("", overflow="fold")
    for name, says in rows:
        table.add_row(Text(name), Text(says))
    console().print(table)


def _print_stream(name: str, stream: Mapping[str, Any], view: str) -> None:
    rows = stream["rows"]
    of = "" if rows["all_read"] else f", of {rows['total']:,}, evenly spaced"
    print_table(
        [f"{name}, as {view}", "rows", "share"],
        [
            [f"read{of}", f"{rows['read']:,}", ""],
            *([label, f"{rows[key]:,}", percent(rows[key], rows["read"])] for label, key in _KINDS),
        ],
    )
    for source in stream["sources"]:
        console().print(f"{source['name']}: {source['rows']:,} rows, {source['read_as']}", markup=False)
    _print_reasons([*stream["reasons"], *stream["lengths"]["reasons"]])
    print_table(["what is in them", "count", "share"], [list(row[:3]) for row in _facts(stream)])
    _print_lines((label, example) for label, _, _, example in _facts(stream) if example)
    _print_lines(_mixed(stream))
    _print_lengths(stream)
    print_samples(stream)


_KINDS = (
    ("kept", "kept"),
    ("rejected: bad", "bad"),
    ("left out: sound and not wanted", "dropped"),
)


def _print_reasons(reasons: Sequence[Mapping[str, Any]]) -> None:
    if not reasons:
        return
    counted = [[one["reason"], one["kind"], f"{one['count']:,}"] for one in reasons]
    print_table(["why rows are left out", "kind", "rows"], counted)
    for one in reasons:
        rows = ", ".join(example["row"] for example in one["examples"])
        text = next((f": {example['text']}" for example in one["examples"] if example["text"]), "")
        console().print(f"{one['reason']}, for example {rows}{text}", markup=False)


def _facts(stream: Mapping[str, Any]) -> Iterable[list[str]]:
    yield _share("identical answers", stream["identical"])
    yield _share("empty answers", stream["empty"])
    ties = stream["ties"]
    yield ["ties, dropped and kept", f"{ties['dropped']:,} + {ties['kept']:,}", f"{ties['share']:.1%}", ""]
    for name, says in _DUPLICATES.items():
        if stream["duplicates"][name] is not None:
            yield _share(says, stream["duplicates"][name])
    for role, one in stream["refusals"]["roles"].items():
        yield _share(f"refusals, {role}", one)
    for role, one in (stream["labels"] or {}).items():
        yield _share(f"label: {role}", one)
    for one in stream["benchmarks"]["named"]:
        label = f"benchmark {one['name']}, by {one['how']}"
        yield [label, f"{one['count']:,}", f"{one['share']:.1%}", ", ".join(one["rows"])]


def _mixed(stream: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What the rows are made up of."""
    yield "languages (a guess)", _counts(stream["languages"]["counts"])
    if stream["benchmarks"]["origins"]:
        yield "origins", _counts(stream["benchmarks"]["origins"])
    if stream["annotators"] is not None:
        yield f"annotators: {stream['annotators']['count']:,}", _counts(stream["annotators"]["rows"])


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    for label, says in lines:
        console().print(f"{label}: {says}", markup=False)


_DUPLICATES = {
    "prompts": "prompts seen before",
    "rows": "rows seen before (prompt and answers)",
    "contradictions": "judged otherwise before",
}


def _print_lengths(stream: Mapping[str, Any]) -> None:
    lengths = stream["lengths"]
    of = "all rows" if lengths["all"] else f"{lengths['looked']:,} rows, evenly spaced"
    found = [
        [part.replace("_", " "), *map(_number, _values(lengths[part]))]
        for part in lengths
        if _is_spread(part, lengths[part])
    ]
    found += [[f"{part}, characters", *map(_number, _values(one))] for part, one in stream["characters"].items() if one]
    for name in ("rewards", "score_gap", "probabilities"):
        if stream[name] is not None:
            found.append([name.replace("_", " "), *map(_number, _values(stream[name]))])
    print_table([f"lengths in {lengths['unit']}, of {of}", *_QUANTILES], found)
    lines = [_bias(bias) for bias in (lengths["length_bias"], stream["length_bias"]) if bias is not None]
    if lengths["truncation"] is not None:
        lines.append(_truncation(lengths))
    for line in lines:
        console().print(line, markup=False)


def _is_spread(part: str, value: Any) -> bool:
    return part not in _SKIPPED and isinstance(value, Mapping) and "p50" in value


def _values(spread: Mapping[str, float]) -> list[float]:
    return [spread[name] for name in _QUANTILES]


def _bias(bias: Mapping[str, Any]) -> str:
    share, difference = bias["winner_longer"], bias["difference"]
    return (
        f"the winner is the longer answer in {_interval(share)} of {share['of']:,} pairs, by "
        f"{difference['mean']:+.1f} {bias['unit']} on average"
    )


def _truncation(lengths: Mapping[str, Any]) -> str:
    truncation = lengths["truncation"]
    became = ", ".join(f"{truncation[key]:,} {says}" for key, says in _BECAME.items() if truncation[key])
    too_long = truncation["too_long"]
    text = f"longer than max_length {lengths['max_length']:,}: {too_long['count']:,} of {too_long['of']:,} rows"
    return f"{text} ({percent(too_long['count'], too_long['of'])}){': ' + became if became else ''}"


_BECAME = {"dropped": "dropped", "cut_prompt": "with a cut prompt", "cut_completion": "with cut answers"}


def _print_overlaps(report: Mapping[str, Any]) -> None:
    found = []
    if report["overlap"] is not None:
        found.append(_share("prompts of eval that are in train", report["overlap"]))
    found += [_share(f"questions of {one['name']} that are in train", one) for one in report["benchmarks"]]
    if found:
        print_table(["overlap", "count", "share"], [row[:3] for row in found])
        _print_lines((row[0], row[3]) for row in found if row[3])


def _print_limits(judged: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [
            f"{one['name']} ({one['stream']})",
            "not known" if one["value"] is None else f"{one['value']:.2%}",
            f"{one['limit']:.2%}",
            "above" if one["crossed"] else "",
        ]
        for one in judged
    ]
    if rows:
        print_table(["limit", "here", "at most", ""], rows)


def _share(label: str, value: Mapping[str, Any]) -> list[str]:
    examples = "; ".join(" = ".join(pair) for pair in value.get("examples", ()))
    return [label, f"{value['count']:,}", percent(value["count"], value["of"]), examples]


def _interval(share: Mapping[str, Any]) -> str:
    return f"{share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%})"


def _counts(counts: Mapping[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:5]]
    return ", ".join(shown) + (", ..." if len(counts) > 5 else "")


def percent(count: int, of: int) -> str:
    """A share, with enough digits that a single row shows."""
    if not of:
        return ""
    share = count / of
    return f"{share:.2%}" if 0 < share < 0.01 else f"{share:.1%}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:,.2f}"


def _marked(tokens: Sequence[Mapping[str, Any]], colour: bool) -> Any:
    """The tokens as one text, runs of scored ones marked. Control characters are shown, not obeyed."""
    from rich.text import Text

    text = Text()
    for scored, run in itertools.groupby(tokens, key=lambda token: bool(token["scored"])):
        written = _visible("".join(token["text"] for token in run))
        if scored and not colour:
            written = f"{OPEN}{written}{CLOSE}"
        text.append(written, style="green" if scored and colour else "")
    return text


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
