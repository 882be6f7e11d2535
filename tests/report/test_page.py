"""What stands in a page, without a browser: numbers as text, limits, thinning, faults, the data report's shapes."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import AlignError, CheckpointError, MissingExtra
from align.report import (
    MAX_BYTES,
    Code,
    Curve,
    DataReport,
    Histogram,
    Page,
    Samples,
    Section,
    Table,
    Text,
    Verdict,
    charts,
    data_page,
    render,
    write_page,
)
from align.report.words import decimals_of, number, visible


def html(*sections: Any, title: str = "t") -> str:
    return render(Page(title, sections)).decode()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (0, "0"),
        (12345678, "12,345,678"),
        (-3, "−3"),
        (2.0, "2"),
        (0.123456, "0.1235"),
        (-1.23456, "−1.235"),
        (1234.56, "1,235"),
        (12345.6, "12,346"),
        (1.2e-5, "1.200e−05"),
        (3e12, "3.000e+12"),
        (float("nan"), "NaN"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers_are_written_for_people(value: Any, text: str) -> None:
    assert number(value) == text


def test_numbers_under_each_other_have_the_same_decimals() -> None:
    assert decimals_of([0.9, 0.93, 0.912]) == 3
    assert decimals_of([1.23456, 0.5]) == 3
    assert decimals_of([31.4, 28.75]) == 2
    assert decimals_of([3, 40, 0]) is None
    assert decimals_of([250.0, 0.05]) is None
    assert decimals_of([float("nan"), 0.5]) == 1
    assert [number(value, decimals=3) for value in (0.9, -1, float("nan"), None)] == ["0.900", "−1.000", "NaN", "–"]


def test_what_cannot_be_seen_is_named() -> None:
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x00\x1b[0m \x9b \u202ex \ud800") == "[U+0000][U+001B][0m [U+009B] [U+202E]x \\ud800"
    assert "\\ud83d" in html(Text("t", "half a pair: \ud83d"))


def test_thinning_keeps_ends_and_extremes() -> None:
    random.seed(1)
    for count in (1, 3, 50, 51, 997, 12_000):
        points = [(step, random.gauss(0, 1)) for step in range(count)]
        for most in (4, 7, 50, 400):
            kept = charts.thinned(points, most)
            assert len(kept) == count if count <= most else len(kept) <= most
            assert list(kept) == sorted(kept) and set(kept) <= set(points)
            assert kept[0] == points[0] and kept[-1] == points[-1]
            values = [value for _, value in points]
            assert {min(values), max(values)} <= {value for _, value in kept} or most < 6


def test_what_is_not_finite_is_left_out_and_said() -> None:
    points = [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0, float("nan"), 1), (4, 2.5, 2.0, 3.0), (5, None)]
    assert charts.finite(points) == [(0, 1.0), (3, 2.0), (4, 2.5, 2.0, 3.0)]
    page = html(Curve("c", "x", "y", {"s": points}))
    assert "not a finite number: 3 points" in page
    assert "Nothing to draw" in html(Curve("c", "x", "y", {"s": [(0, float("nan"))], "none": []}))


def test_a_page_without_charts_carries_no_script_for_them() -> None:
    page = html(Verdict("v"), Table("t", ["a", "b"], [["x", 1.5]]))
    assert len(page) < 30_000 and "vegaEmbed" not in page and "chart-config" not in page
    assert "vegaEmbed" in html(Histogram("h", "x", "y", [0, 1], [2]))


def test_the_library_cannot_be_missing_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtra, match=r"vl-convert-python.*\n.*\n.*pip install"):
        charts.library.__wrapped__()


def test_a_script_that_could_end_its_element_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vl_convert

    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda *a, **k: "const a = '</SCRIPT>';")
    with pytest.raises(AlignError, match="</SCRIPT"):
        charts.library.__wrapped__()


def test_text_in_a_specification_cannot_leave_it() -> None:
    evil = "</script><!-- & \u2028"
    page = html(Curve("c", evil, evil, {evil: [(0, 1)]}))
    spec = re.search(r'<script type="application/json" id="[^"]*-spec">(.*?)</script>', page)
    assert spec and json.loads(spec[1])["data"]["values"][0]["series"] == evil
    assert "<!--" not in page and "&lt;!-- &amp;" in page


def test_anchors_differ_and_the_navigation_reaches_them() -> None:
    same = [Text("Same", "1"), Text("Same", "2"), Text("Same 2", "3"), Text("Same", "4")]
    page = html(Section("A b", same), Section("a B", same), Text("⊕", ""))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    links = re.findall(r'<li><a href="#([^"]+)"', page)
    assert len(links) == 3 and set(links) <= set(ids)


def test_every_part_is_escaped() -> None:
    evil = "<b id='evil'>"
    parts = [
        Verdict(evil, True, evil),
        Text(evil, evil),
        Table(evil, [evil, evil], [[evil, evil]], evil),
        Curve(evil, evil, evil, {evil: [(0, 1)], evil * 2: [(0, 1)]}, evil),
        Histogram(evil, evil, evil, [0, 1], [1], evil),
        Samples(evil, [{"prompt": evil, "answers": {evil: evil}, "scores": {evil: 1}}], evil),
        Code(evil, evil, evil),
        DataReport({evil: evil, "m": {evil: {evil: evil}}, "t": [[{"text": evil, "scored": True}]]}, evil),
    ]
    page = html(*parts, Section(evil, [Text(evil, evil)], evil), title=evil)
    assert evil not in page
    assert unescape(page).count(evil) > 30


def test_a_page_is_never_larger_than_it_may_be(tmp_path: Path) -> None:
    random.seed(0)
    noise = {f"s{k}": [(step, random.random()) for step in range(5_000)] for k in range(6)}
    long = "x" * 50_000
    sections = [
        *(Curve(f"c{number}", "x", "y", noise) for number in range(12)),
        Samples("s", [{"prompt": long, "answers": {"a": long, "b": long}}] * 200),
        Table("t", ["a", "b"], [[long, 1.5]] * 3_000),
        Code("code", long * 60),
    ]
    path = write_page(tmp_path / "page.html", "t", sections)
    page = path.read_text()
    assert MAX_BYTES / 3 < path.stat().st_size <= MAX_BYTES
    for left in (r"[\d,]+ more rows", r"[\d,]+ more prompts", r"… [\d,]+ more characters", r"Not drawn: [\d,]+ points"):
        assert re.search(left, page), left
    with pytest.raises(AlignError, match=r"2,000,000 are allowed"):
        write_page(path, "t", [Text("t", "y" * 300)] * 9_000)
    assert path.read_text() == page, "the old page did not stand"


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (Table("Methods", ["a", "b"], [[1, 2], [1]]), "a row of the table `Methods` has 1 cells"),
        (Histogram("Lengths", "x", "y", [0, 1], [1, 2]), "the histogram `Lengths` has 2 edges for 2 counts"),
        (Histogram("Lengths", "x", "y", [0, math.inf], [1]), "`Lengths` is not a finite number"),
    ],
)
def test_parts_that_do_not_fit_are_named(part: Any, says: str) -> None:
    with pytest.raises(AlignError, match=re.escape(says)):
        html(part)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"page\.html"):
        write_page(tmp_path / "file" / "page.html", "t", [Verdict("v")])


def leaves(value: Any) -> list[Any]:
    """What a report says: its texts and numbers, without what is None."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None else [value]


SHARE = {
    "count": 3,
    "of": 7,
    "share": 0.428571,
    "low": 0.158,
    "high": 0.7495,
    "examples": [["a:1", "a:9"], ["b:2", "c:4"]],
}
REPORT = {
    "view": "pairs",
    "streams": {
        "train": {
            "rows": {"total": 1001, "read": 1002, "all_read": True, "kept": 981, "bad": 19},
            "reasons": [{"reason": "empty", "count": 17, "examples": [{"row": "a:5", "text": "<b>"}]}],
            "duplicates": {"prompts": SHARE, "rows": {**SHARE, "count": 5}, "contradictions": None},
            "lengths": {"prompt": {"count": 8, "mean": 63.25, "p50": 61.5, "max": 99.0}, "unit": "tokens"},
            "difference": {"mean": 75.125, "low": 70.25, "high": 79.875},
            "spread": {"edges": [0, 11, 22], "counts": [33, 44]},
            "labels": {"yes": {"rows": 51, "part": 0.75}, "no": {"rows": 17, "part": 0.25}},
            "languages": {"English": 307, "Latin": 12},
            "nested": {"a": {"b": {"c": "deep"}}, "list": [[1.5, "x"], {"k": "v", "w": {"z": 2.5}}]},
            "samples": [
                {
                    "row": "a.jsonl:7",
                    "prompt": [{"text": "User: hi", "scored": False}],
                    "completions": [{"role": "winner", "finished": False, "tokens": [{"text": "Yo", "scored": True}]}],
                }
            ],
        },
        "eval": {"rows": {"read": 64}},
    },
    "overlap": {"count": 0, "of": 64, "share": 0.0, "low": 0.0, "high": 0.0566, "examples": []},
}


def test_nothing_of_a_data_report_is_lost(tmp_path: Path) -> None:
    page = unescape(data_page(REPORT, tmp_path / "data.html").read_text())
    body = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    text = re.sub(r"</?(?:td|th|span|data|mark|figcaption|h\d)\b[^>]*>", "\n", body)
    for leaf in leaves(REPORT):
        if isinstance(leaf, bool):
            continue
        shown = {number(leaf), number(leaf, 6), str(leaf)} if isinstance(leaf, (int, float)) else {leaf}
        if isinstance(leaf, float):
            shown |= {number(leaf, decimals=places) for places in range(1, 6)}
        # Whole words: `3` is not found in `1,003`.
        assert any(re.search(rf"(?<![\w.,]){re.escape(one)}(?![\w]|[.,]\d)", text) for one in shown), leaf
    for heading in ("Data", "Data: train", "Data: eval", "Shares", "Quantiles", "Reasons"):
        assert re.search(rf"<h[23][^>]*>{heading}</h", page), heading
    captions = re.findall(r"<figcaption>([^<]+)</figcaption>", page)
    assert captions == ["a.jsonl:7, prompt", "a.jsonl:7, winner, finished: no"]
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["Yo"]


def test_the_doctor_s_own_report_fits(tmp_path: Path) -> None:
    from align.data.doctor import Plan, examine

    rows = [{"prompt": f"p{k % 50}", "chosen": f"good answer {k}", "rejected": "bad"} for k in range(60)]
    rows[3] = {"prompt": "x", "chosen": "same", "rejected": "same"}
    other = [{**row, "prompt": f"p{k}"} for k, row in enumerate(rows) if k != 3]
    for name, content in (("train", rows), ("eval", other)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    report = examine({name: [{"name": str(tmp_path / f"{name}.jsonl")}] for name in ("train", "eval")}, Plan()).report
    page = unescape(data_page(json.loads(json.dumps(report)), tmp_path / "data.html").read_text())
    assert "identical" in page and "train.jsonl:3" in page
    share = report["overlap"]
    row = re.search(r'<th scope="row"><span dir="auto">overlap</span></th>.*?</tr>', page)
    assert row and re.findall(r'<data value="([^"]+)">', row[0]) == [
        str(float(share["share"])),
        *map(str, (share["count"], share["of"])),
    ]
