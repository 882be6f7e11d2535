"""The implicit reward of each token: the numbers of a real run, and what a reader sees of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.report import Section, TokenValues, run_page, run_sections, write_page
from align.report.tokens import shade, top_of
from align.testing.tiny import random_pairs
from tests.recipe.small import small_run
from tests.report.test_rendered import EVIL, contrast, rgb, rules_kept, style

VALUES = [0.8, -0.8, 0.41, -0.41, 0.2, -0.2, 0.6, -0.6, 0.01, None, -1.25e-3]
TEXTS = ["Yes", "\n", " no", EVIL, "", " a", "b", "c", "d", "User:", "e"]
ANSWER = {
    "label": "chosen",
    "total": sum(one for one in VALUES if one is not None),
    "scored": 10,
    "left": 7,
    "tokens": [
        {"text": text} | ({} if value is None else {"value": value}) for text, value in zip(TEXTS, VALUES, strict=True)
    ],
}
ROW = {
    "row": "/a/folder/held_out.jsonl:2",
    "prompt": f"Well? {EVIL}",
    "answers": [ANSWER, ANSWER | {"label": "rejected"}],
}

SEEN_BY = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four held-out pairs, which are all shown."""
    folder = tmp_path_factory.mktemp("tokens")
    assert main(["train", str(small_run(folder, 4, held_out=list(random_pairs(4, seed=1))))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = [TokenValues("Token by token", [ROW, ROW], "reward")]
    return write_page(tmp_path_factory.mktemp("page") / "page.html", "Tokens", [Section("Token rewards", parts)])


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "token_rewards.jsonl").read_text().splitlines()]


def logged(run: Path, step: int) -> dict[str, Any]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return next(entry for entry in log if entry["step"] == step and "eval_loss" in entry)


def test_sums_are_the_logged_rewards(run: Path) -> None:
    entry = entries(run)[-1]
    assert entry["step"] == 4 and entry["beta"] == 0.1 and not entry["own_reward"] and len(entry["rows"]) == 4
    for label in ("chosen", "rejected"):
        answers = [one for row in entry["rows"] for one in row["answers"] if one["label"] == label]
        assert len(answers) == 4 and all(abs(one["total"]) > 1e-3 for one in answers)
        for one in answers:
            assert sum(token.get("value", 0.0) for token in one["tokens"]) == pytest.approx(one["total"], abs=1e-9)
        mean = sum(one["total"] for one in answers) / 4
        assert mean == pytest.approx(logged(run, 4)[f"eval_rewards/{label}"], rel=1e-5)


def test_the_texts_are_those_of_the_data(run: Path) -> None:
    given = [json.loads(line) for line in (run.parent / "held_out.jsonl").read_text().splitlines()]
    for row, one in zip(given, entries(run)[-1]["rows"], strict=True):
        assert str(row["prompt"]) in one["prompt"]
        for answer in one["answers"]:
            text = "".join(token["text"] for token in answer["tokens"])
            assert text.startswith(row[answer["label"]]) and answer["left"] == 0
            assert answer["scored"] == sum("value" in token for token in answer["tokens"])


def test_only_steps_with_a_checkpoint_keep_their_line(tmp_path: Path) -> None:
    recipe = small_run(tmp_path, 6, train={"save_steps": 4}, eval={"every": 2})
    assert main(["train", str(recipe)]) == 0
    found = entries(tmp_path / "run")
    assert [one["step"] for one in found] == [4, 6]
    assert found[0]["rows"] != found[1]["rows"]
    assert main(["train", str(recipe)]) == 0
    assert entries(tmp_path / "run") == found


def test_the_page_shows_the_policy_that_was_saved(run: Path, tmp_path: Path) -> None:
    def shown(folder: Path) -> list[Section]:
        return [one for one in run_sections(folder) if isinstance(one, Section) and one.title == "Token rewards"]

    (section,) = shown(run)
    assert section.parts[0].rows == entries(run)[-1]["rows"] and "Step 4" in section.note
    copy = tmp_path / "best"
    copy.mkdir()
    log = (run / "log.jsonl").read_text()
    best = {"step": 4, "policy_of": "checkpoint-2", "best_metric": "loss", "best": 1}
    (copy / "log.jsonl").write_text(log + json.dumps(best) + "\n")
    last = entries(run)[-1]
    lines = [json.dumps(last | {"step": 2, "rows": [ROW]}), json.dumps(last)]
    (copy / "token_rewards.jsonl").write_text("\n".join(lines) + "\n")
    (section,) = shown(copy)
    assert section.parts[0].rows == [ROW] and "Step 2" in section.note
    (copy / "token_rewards.jsonl").write_text(lines[1] + "\n")
    assert shown(copy) == []


@pytest.mark.parametrize(("method", "labels"), [("kto", {"desirable", "undesirable"}), ("simpo", None)])
def test_other_views_and_methods_without_a_reference(tmp_path: Path, method: str, labels: Any) -> None:
    assert main(["train", str(small_run(tmp_path, 1, method={"name": method}, eval={"every": 1}))]) == 0
    if labels is None:
        assert not (tmp_path / "run" / "token_rewards.jsonl").exists()
        return
    (entry,) = entries(tmp_path / "run")
    assert {one["label"] for row in entry["rows"] for one in row["answers"]} == labels and not entry["own_reward"]


def test_a_reward_of_the_methods_own_is_said(tmp_path: Path) -> None:
    assert main(["train", str(small_run(tmp_path, 1, method={"name": "dpo_norm"}, eval={"every": 1}))]) == 0
    (entry,) = entries(tmp_path / "run")
    assert entry["own_reward"] is True
    assert "another function of the same log-ratios" in run_page(tmp_path / "run").read_text()


def test_shades_follow_sign_and_size() -> None:
    assert [shade(value, 0.8) for value in (0.8, 5.0, 0.41, 0.2, 0.09, 0.0)] == [4, 4, 2, 1, 0, 0]
    assert [shade(value, 0.8) for value in (-0.8, -0.41, -0.2, -0.09, math.nan, math.inf)] == [-4, -2, -1, 0, 0, 0]
    assert top_of([0.1] * 30 + [-7.0]) == 0.1
    assert top_of([0.0] * 30 + [-7.0]) == 7.0
    assert top_of([]) == top_of([0.0, math.nan]) == 0.0


def test_each_token_says_its_number(open_page: Any, page_file: Path) -> None:
    page = open_page(page_file)
    figure = page.locator("figure.tokens").first
    assert figure.locator("figcaption").inner_text().split() == ["chosen", "+0.00875", "reward", "in", "all"]
    spans = figure.locator("p span[title]")
    scored = [(text, value) for text, value in zip(TEXTS, VALUES, strict=True) if value is not None]
    assert spans.count() == len(scored)
    for span, (text, value) in zip(spans.all(), scored, strict=True):
        assert float(span.get_attribute("title").replace("\u2212", "-")) == pytest.approx(value, rel=1e-2)
        assert span.text_content() == (text.replace("\n", "\u21b5\n") or "\u25af")
    assert "User:" in figure.locator("p").first.inner_text()
    assert "7 more tokens not shown" in figure.inner_text()
    figure.locator("summary").click()
    table = page.get_by_role("group", name="Token rewards, Token by token, held_out.jsonl:2, chosen, values")
    rows = [row.locator("td").all_inner_texts() for row in table.first.locator("tbody tr").all()]
    assert [row[1] for row in rows] == [
        text.replace("\n", "\u21b5").replace(" ", "\u2423") or "\u25af" for text, _ in scored
    ]
    total = 0.0
    for row, (_, value) in zip(rows, scored, strict=True):
        total += value
        numbers = [float(cell.replace("\u2212", "-")) for cell in row[2:]]
        assert numbers == pytest.approx([value, total], rel=1e-2, abs=1e-9)
    assert page.evaluate("window.hacked ?? null") is None


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_colours_can_be_read_and_told_apart(open_page: Any, page_file: Path, width: int, theme: str) -> None:
    page = open_page(page_file, width, theme)
    assert "color-contrast" in rules_kept(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    backs = {}
    for name in (f"{sign}-{step}" for sign in ("plus", "minus") for step in range(1, 5)):
        selector = f"figure.tokens .{name}"
        backs[name] = style(page, selector, "background-color")
        assert contrast(style(page, selector, "color"), backs[name]) >= 4.5, name
        assert backs[name] == style(page, f".ramp .{name}", "background-color")
    assert len({*backs.values()}) == 8
    page_back = style(page, "body", "background-color")
    for sign in ("plus", "minus"):
        against = [contrast(backs[f"{sign}-{step}"], page_back) for step in range(1, 5)]
        assert against == sorted(against) and against[0] > 1.1, sign
    lines = {style(page, f"figure.tokens .{sign}-4", "border-bottom-style") for sign in ("plus", "minus")}
    assert lines == {"solid", "dotted"}


@pytest.mark.parametrize("kind", list(SEEN_BY))
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_signs_differ_for_colour_blind_readers(open_page: Any, page_file: Path, theme: str, kind: str) -> None:
    """The two strongest colours as such a reader sees them; matrices of Machado et al. 2009 at full severity."""
    page = open_page(page_file, theme=theme)

    def seen(name: str) -> list[float]:
        scaled = [part / 255 for part in rgb(style(page, f".ramp .{name}", "background-color"))]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in scaled]
        mixed = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in SEEN_BY[kind]]
        return [max(0.0, one) ** (1 / 2.4) for one in mixed]

    for step in (2, 3, 4):
        distance = math.dist(seen(f"plus-{step}"), seen(f"minus-{step}"))
        assert distance > 0.12 * step, step
