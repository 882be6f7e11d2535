"""The page in a real browser: what a reader sees, at both widths and in both themes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from align.report import (
    MAX_BYTES,
    Code,
    Curve,
    DataReport,
    Histogram,
    Samples,
    Section,
    Table,
    Text,
    Tokens,
    Verdict,
    write_page,
)

EVIL = "</script><script>window.hacked = 1; document.title = 'hacked'</script><img src=x onerror='window.hacked = 1'>"
TABLE = Table(
    "Methods",
    ["method", "gold reward", "win rate", "seconds"],
    [
        ["start", -1.23456, None, 12],
        ["dpo", 0.87654, (0.9125, 0.88, 0.94), 1234],
        [EVIL, 0.5, (0.71, 0.66, 0.75), 9],
    ],
    "A note under the table.",
)
GOLD = {
    "dpo": [
        (step, math.sin(step / 7) + step / 50, math.sin(step / 7) - 1, math.sin(step / 7) + 2) for step in range(40)
    ],
    "kto": [(step, step / 31) for step in range(0, 40, 5)],
}
CURVES = [
    Curve("Gold reward", "optimiser step", "gold reward", GOLD),
    Curve(f"Loss {EVIL}", f"step {EVIL}", f"loss {EVIL}", {EVIL: [(0, 3.0), (10, 1.123456)]}),
    Histogram("Lengths", "tokens", "answers", [0, 10, 20, 40], [5, 125, 17]),
]
TOKENS = [{"text": "User: hi\n", "scored": False}, {"text": "Hello</s>", "scored": True}]
ANSWERS = {"before": "the the the", "dpo": f"A line.\nAnother {EVIL} \u202edrow\u202c \x1b[0m"}
SECTIONS = [
    Verdict("It became better, and the sentence says by how much.", True),
    Verdict("It became worse.", False, "Other verdict"),
    Section("Results", [TABLE, Text("Words", "A paragraph.\n\nAnother.")]),
    Section("Curves", CURVES),
    Samples("Before and after", [{"prompt": EVIL, "answers": ANSWERS, "scores": {"dpo": 0.25}}] * 3),
    Tokens(
        "As trained on", [("row 1", [{"text": "User: hi\n", "scored": False}, {"text": "Hello</s>", "scored": True}])]
    ),
    DataReport({"rows": {"read": 1000, "kept": 981}, "longer": {"share": 0.62, "low": 0.59, "high": 0.65}}),
    Section("Recipe", [Code("Recipe", f"model: {EVIL}\n" + "long " * 80, "yaml")], folded=True),
]
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_page(tmp_path_factory.mktemp("page") / "page.html", f"A page {EVIL}", SECTIONS, f"below {EVIL}")
    assert path.stat().st_size <= MAX_BYTES
    return path


def open_all(page: Any) -> None:
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(float(part) for part in re.findall(r"[\d.]+", colour)[:3])


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio, from its definition."""

    def luminance(colour: str) -> float:
        parts = [part / 255 for part in rgb(colour)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def style(page: Any, selector: str, name: str) -> str:
    return page.eval_on_selector(selector, f"one => getComputedStyle(one).getPropertyValue('{name}')")


def rules_kept(page: Any) -> set[str]:
    """Ids of the rules of WCAG that axe finds kept with all parts opened; none is broken."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra `dev` is not installed")
    open_all(page)
    found = axe.Axe().run(page, options={"runOnly": RULES}).response
    assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
    return {one["id"] for one in found["passes"]}


def test_numbers_of_a_table_are_text(open_page: Any, page_file: Path) -> None:
    table = open_page(page_file).get_by_role("group", name="Results, Methods, table")
    heads = table.locator("thead th").all_inner_texts()
    assert heads == TABLE.columns
    rows = table.locator("tbody tr").all()
    assert len(rows) == len(TABLE.rows)
    for row, given in zip(rows, TABLE.rows, strict=True):
        assert row.locator("th").inner_text() == given[0]
        for cell, value in zip(row.locator("td").all(), given[1:], strict=True):
            text = cell.inner_text().replace("−", "-").replace(",", "")
            if value is None:
                assert text == "–"
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            shown = [float(number) for number in re.findall(r"-?[\d.]+", text)]
            assert shown == pytest.approx(numbers, abs=6e-4)
            assert float(cell.locator("data").get_attribute("value")) == numbers[0]


def test_the_values_of_a_curve_are_text(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file)
    open_all(page)
    table = page.get_by_role("group", name="Curves, Gold reward, values")
    assert table.locator("thead th").all_inner_texts() == ["optimiser step", "dpo", "kto"]
    kto = dict(GOLD["kto"])
    rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert len(rows) == 40
    for (step, value, low, high), row in zip(GOLD["dpo"], rows, strict=True):
        assert row[0] == str(step)
        shown = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", row[1].replace("−", "-"))]
        assert shown == pytest.approx([value, low, high], rel=1e-5, abs=1e-9)
        assert row[2] == "" if step not in kto else float(row[2]) == pytest.approx(kto[step], rel=1e-5)


def test_a_curve_tells_the_value_under_the_pointer(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file)
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    points = plot.locator(".mark-symbol.role-mark path")
    assert points.count() == 48
    for place in (7, 33, 44):
        box = points.nth(place).bounding_box()
        # Beside the point, not on it: the nearest point answers.
        page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2 + 3)
        name, point = ("dpo", GOLD["dpo"][place]) if place < 40 else ("kto", GOLD["kto"][place - 40])
        tip = page.locator("#vg-tooltip-element.visible")
        page.wait_for_function(
            "text => document.getElementById('vg-tooltip-element')?.innerText.includes(text)", arg=f"\t{point[0]}\n"
        )
        shown = dict(line.split("\t") for line in tip.inner_text().strip().split("\n"))
        assert shown["series"] == name
        assert float(shown["optimiser step"]) == point[0]
        assert float(shown["gold reward"].replace("−", "-")) == pytest.approx(point[1], rel=1e-5)
        if len(point) == 4:
            assert float(shown["low"].replace("−", "-")) == pytest.approx(point[2], rel=1e-5)
            assert float(shown["high"].replace("−", "-")) == pytest.approx(point[3], rel=1e-5)


def test_the_theme_follows_the_system_and_the_button_and_is_kept(open_page: Any, page_file: Path) -> None:
    def seen() -> tuple[str, ...]:
        return (
            style(page, "body", "background-color"),
            style(page, ".plot svg text", "fill"),
            style(page, ".plot .mark-line.role-mark path", "stroke"),
            style(page, ".legend line", "stroke"),
        )

    page = open_page(page_file, theme="light")
    light = seen()
    assert light[2] == light[3], "the legend has another colour than the line"
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-theme=dark]")  # the browser tells the page at its next frame
    dark = seen()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert sum(rgb(light[0])) > 700 and sum(rgb(dark[0])) < 120
    button = page.get_by_role("button", name="Light theme")
    button.click()
    assert seen() == light
    page.reload()
    page.wait_for_selector("html[data-charts=drawn]", state="attached")
    assert seen() == light, "the choice was not kept"
    page.get_by_role("button", name="Dark theme").click()
    page.emulate_media(color_scheme="light")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert seen() == dark, "the choice gave way to the system"


def test_nothing_comes_from_outside(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file)
    assert [url for url in page.requests if not url.startswith(("data:", page_file.as_uri()))] == []
    assert page.errors == []
    assert page.evaluate("performance.getEntriesByType('resource').length") == 0
    blocked = """async () => {
        const found = [];
        addEventListener("securitypolicyviolation", (event) => found.push(event.effectiveDirective));
        await fetch("https://example.org/").catch(() => 0);
        const script = document.createElement("script");
        script.textContent = "window.foreign = 1";
        document.head.append(script);
        await new Promise((done) => setTimeout(done, 100));
        return [found.sort(), window.foreign ?? null];
    }"""
    assert page.evaluate(blocked) == [["connect-src", "script-src-elem"], None]


def test_texts_are_shown_and_never_run(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file)
    answer = page.locator(".answers dd").nth(1)
    assert answer.inner_text() == f"A line.\nAnother {EVIL} [U+202E]drow[U+202C] [U+001B][0m"
    assert page.locator("h1").inner_text() == f"A page {EVIL}"
    assert page.title() == f"A page {EVIL}"
    plot = page.locator(".plot").nth(1)
    plot.scroll_into_view_if_needed()
    box = plot.locator(".mark-symbol.role-mark path").nth(1).bounding_box()
    page.mouse.move(box["x"] + 1, box["y"] + 1)
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert tip.inner_text().count(EVIL) == 3
    assert page.locator("#content img, #content script:not([type])").count() == 0
    assert page.evaluate("window.hacked ?? null") is None


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_can_be_read_by_all(open_page: Any, page_file: Path, width: int, theme: str) -> None:
    page = open_page(page_file, width, theme)
    passes = rules_kept(page)
    assert {"color-contrast", "heading-order", "scrollable-region-focusable"} <= passes
    # axe leaves the inside of the charts aside.
    back = style(page, "body", "background-color")
    assert contrast(style(page, ".plot svg text", "fill"), back) >= 4.5
    lines = page.locator(".legend line").evaluate_all("all => all.map(one => getComputedStyle(one).stroke)")
    assert lines and min(contrast(line, back) for line in lines) >= 3
    for number in range(1, 9):
        page.eval_on_selector("h1", f"one => one.style.color = 'var(--series-{number})'")
        assert contrast(style(page, "h1", "color"), back) >= 3, number


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_never_scrolls_sideways(open_page: Any, page_file: Path, width: int) -> None:
    page = open_page(page_file, width)
    for opened in (False, True):
        if opened:
            open_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("scrollTo(500, 0), scrollX") == 0
    plots = page.locator(".plot svg").evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert len(plots) == 3 and all(width - 60 <= one <= width for one in plots)


def test_everything_is_reached_by_keyboard(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file, 390)
    wanted = page.evaluate(
        "[...document.querySelectorAll('a, button, summary, pre, .scroll')]"
        ".filter(one => !one.closest('details:not([open]) > :not(summary)')).length"
    )
    reached = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.outerHTML.slice(0, 60)"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached[-1]
    assert len({*reached}) > 8 and "skip" in reached[0]
    page.get_by_role("button", name="Dark theme").focus()
    page.keyboard.press("Enter")
    assert sum(rgb(style(page, "body", "background-color"))) < 120
    fold = page.locator("details.fold > summary")
    fold.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.fold pre").is_visible()


def test_a_link_opens_the_folded_part(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file)
    assert not page.locator("details.fold pre").is_visible()
    page.get_by_role("navigation").get_by_role("link", name="Recipe").click()
    page.locator("details.fold pre").wait_for()
    assert EVIL in page.locator("details.fold pre").inner_text()


def test_paper_is_light_and_whole(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file, theme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert rgb(style(page, "body", "background-color")) == (255, 255, 255)
    assert contrast(style(page, ".plot svg text", "fill"), "rgb(255, 255, 255)") >= 4.5
    assert not page.get_by_role("navigation").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.fold pre").is_visible()


def test_without_scripts_the_numbers_stand(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file, theme="dark", java_script_enabled=False)
    assert page.get_by_text("The chart needs JavaScript").first.is_visible()
    assert page.locator("table").first.is_visible()
    assert not page.get_by_role("button").is_visible()
    page.locator("summary").first.click()
    assert page.get_by_role("group", name="Curves, Gold reward, values").is_visible()


def test_scored_tokens_are_marked(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file)
    assert page.locator("figure.tokens mark").all_inner_texts() == ["Hello</s>"]
    assert page.locator("figure.tokens p span").all_inner_texts() == ["User: hi\n"]
    marked, plain = style(page, "figure.tokens mark", "background-color"), style(page, "body", "background-color")
    assert marked != plain
