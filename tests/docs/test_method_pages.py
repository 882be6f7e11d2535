"""Method pages and the table that compares them: their parts, what was measured, what is computed, how they look."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="the documentation tools are in the extra `docs`")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import PluginError
from torch import Tensor

from align.core.registry import METHODS
from align.methods.base import Method, method
from align.methods.claim import METRICS
from align.methods.dpo import DPO
from align.scoring.views import Pairs
from docs.hooks import curves, facts, methods
from tests.browser import Open
from tests.docs.pages import DOCS, ROOT

PARTS = ("formula", "when-to-use-it", "needs", "options", "facts-and-pitfalls", "source", "on-the-world")
PARTS = (*PARTS, "recipe-to-start-from")
AGAINST = {"gold_reward": 0.3125, "length": 20.0}


def entry(metric: str, sign: str, holds: bool, **more: Any) -> dict[str, Any]:
    """What `bench/direction.py` writes of a method."""
    ours = {"gold_reward": 0.625, "length": 26.0}
    difference = ours[metric] - AGAINST[metric]
    return {
        "claim": {"metric": metric, "sign": sign, "world": "style", "against": "start"},
        "recipe": "demo/x",
        "runs": [{"seed": seed, "method": ours, "against": AGAINST} for seed in range(5)],
        "difference": {"value": difference, "low": difference - 0.0625, "high": difference + 0.0625},
        "holds": holds,
        "tried": "",
        "curve": {"step": [0, 12, 24], "metric": metric, "values": [0.3125, 0.5, 0.625]},
        **more,
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site with three measured methods."""
    folder = tmp_path_factory.mktemp("measured")
    found = {
        "dpo": entry("gold_reward", "up", True),
        "ipo": entry("length", "down", False, tried="tau 0.01 <and> 1"),
        "kto": entry("gold_reward", "up", True, curve=None),
    }
    (folder / "direction.json").write_text(json.dumps({"seeds": [0, 1, 2, 3, 4], "methods": found}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "RESULT", folder / "direction.json")
        build(load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(DOCS), site_dir=str(folder / "site")))
    return folder / "site"


def source_of(site: Path, name: str) -> str:
    return (site / "methods" / f"{name}.html").read_text(encoding="utf-8")


def section_of(site: Path, name: str, heading: str) -> str:
    """The HTML between a heading and the next of its level."""
    found = re.search(rf'<h2 id="{heading}">.*?(?=<h2|</article>)', source_of(site, name), re.S)
    assert found, f"{name}: no section {heading}"
    return found[0]


def words_of(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_every_page_has_its_parts_in_order(site):
    for name in METHODS.entries():
        headings = re.findall(r'<h2 id="([\w-]+)"', source_of(site, name))
        assert headings in ([*PARTS], [*PARTS, "other-names"]), name
        assert "<math" in section_of(site, name, "formula")
        assert "index.html#notation" in section_of(site, name, "formula")
        assert METHODS.get(name).when.replace("`", "") in words_of(section_of(site, name, "when-to-use-it"))
        needed = words_of(section_of(site, name, "needs"))
        assert all(f"{need} : " in needed for need in METHODS.get(name).needs), name


def test_every_need_has_words():
    needs = set().union(*(METHODS.get(name).needs | METHODS.get(name).takes for name in METHODS.entries()))
    assert needs == set(methods._NEEDS), "a need without words, or words for a need that is no more"


def test_a_method_without_formula_or_sentence_has_no_page(monkeypatch):
    monkeypatch.setattr(DPO, "when", "")
    with pytest.raises(PluginError, match="method `dpo` has no `when`"):
        methods.page("dpo")
    monkeypatch.setattr(DPO, "formula", "")
    with pytest.raises(PluginError, match="method `dpo` has no `formula`"):
        methods.page("dpo")


def test_what_was_measured_is_said_and_drawn(site):
    shown = section_of(site, "dpo", "on-the-world")
    text = words_of(shown)
    assert "5 paired seeds: 0.312 there, 0.625 here, a difference of +0.312" in text
    assert "(95 % interval +0.25 to +0.375): the claim holds." in text
    assert METRICS["gold_reward"] in text and "against the starting model" in text
    label = re.search(r'aria-label="([^"]*)"', shown)
    assert label and label[1].endswith("0.312 at step 0, 0.5 at step 12, 0.625 at step 24")
    assert shown.count("<svg") == 1 and "<script" not in shown
    (line,) = re.findall(r'class="mark-line role-mark.*?<path[^>]* d="(M[^"]*)"', shown)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+,([\d.]+)", line)]
    assert len(heights) == 3 and heights == sorted(heights, reverse=True), "the curve rises, so its y falls"


def test_what_does_not_hold_or_has_no_curve_is_said(site):
    text = words_of(section_of(site, "ipo", "on-the-world"))
    assert "+6" in text and "the claim does not hold. Tried: tau 0.01 <and> 1." in text
    assert "<and>" not in section_of(site, "ipo", "on-the-world")
    assert "<svg" not in section_of(site, "kto", "on-the-world")
    cpl = section_of(site, "cpl", "on-the-world")
    assert "This is not measured yet." in words_of(cpl) and "<svg" not in cpl
    assert str(METRICS[METHODS.get("cpl").claim.metric]) in words_of(cpl)


def test_the_table_compares_all(site):
    table = section_of(site, "index", "all-of-them-compared")
    rows = [re.findall(r"<td>(.*?)</td>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)[1:]]
    found = {words_of(row[0]): [words_of(cell) for cell in row[1:]] for row in rows}
    assert set(found) == set(METHODS.entries())
    none = "not measured"
    dpo = ["pairs", "frozen", "sum", "yes", "below", "no", "no", "–", "no", "beta 0.1", "2305.18290 (2023)"]
    assert found["dpo"] == [*dpo, "gold_reward +0.312, holds"]
    assert found["ipo"][-1] == "length +6, does not hold"
    kto = ["singles", "frozen", "sum", "no", "both", "batch", "no", "mismatched", "no", "beta 0.1", "2402.01306 (2024)"]
    assert found["kto"][:-1] == kto
    simpo = ["pairs", "none", "mean", "no", "below", "no", "no", "–", "no", "beta 2", "2405.14734 (2024)", none]
    assert found["simpo"] == simpo
    assert found["bco"][6] == "yes" and found["elr"][6] == "yes"
    assert found["d2o"][8] == "yes" and found["rpo"][8] == "by option" and found["cpl"][1] == "by option"


def test_computed_facts_are_those_of_the_formulas():
    """The list of losses that see differences only; rdpo and xpo fall without end, a saturating loss does not."""
    told = {name: facts.facts(METHODS.get(name)) for name in METHODS.entries()}
    differences = {"dpo", "cdpo", "rdpo", "dpo_hinge", "exo_pref", "soft_dpo", "smpo", "robust_bt", "discopop"}
    assert {name for name in differences if told[name].difference != "yes"} == set()
    absolute = {
        "simpo",
        "orpo",
        "cpo",
        "slic",
        "cal_dpo",
        "apo_zero",
        "rpo",
        "flex_dpo",
        "tdpo",
        "wpo",
        "cpl",
        "ld_dpo",
    }
    assert {name for name in absolute if told[name].difference != "no"} == set()
    assert {name for name, one in told.items() if one.bounded == "no"} == {"rdpo", "t_reg", "xpo"}
    assert {"apo_zero", "apo_down", "kto", "exo_pref"} <= {n for n, one in told.items() if one.bounded == "both"}
    assert {name for name, one in told.items() if one.tokens == "both"} == {"cpo", "dno_prct"}


def test_facts_follow_the_loss_and_not_the_name():
    @method("dpo", view="pairs", needs={"ref_logp"})
    class Changed(Method):
        """A loss that falls without end, of token means."""

        def loss(self, pairs: Pairs) -> Tensor:
            return 2 * pairs.rejected.mean_log_ratio - pairs.chosen.mean_log_ratio

    told = facts.facts(Changed)
    expected = {"tokens": "mean", "difference": "no", "bounded": "no", "coupled": "no", "option": ""}
    assert {name: value for name, value in dataclasses.asdict(told).items() if name in expected} == expected


def test_recipes_on_a_page_are_those_that_ship(site):
    shown = words_of(section_of(site, "dpo", "recipe-to-start-from"))
    assert "align demo --methods dpo" in shown and "output_dir : runs/demo-1/dpo" in shown
    assert "align demo --world flipped --methods dpo rdpo" in words_of(section_of(site, "rdpo", "recipe-to-start-from"))
    assert "mistral-7b/dpo-qlora" in shown, "named through what it extends"
    assert "mistral-7b/dpo" not in words_of(section_of(site, "kto", "recipe-to-start-from"))
    assert "5e-7 for full fine-tuning" in shown


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["index", "regret_pref", "dpo"])
def test_pages_fit_the_screen_and_wide_things_scroll(site, open_page: Open, name, width):
    page = open_page(site / "methods" / f"{name}.html", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator(".formula" if name != "index" else ".md-typeset__table >> nth=0")
    assert boxes.first.is_visible()
    if name == "regret_pref":
        wide, seen = boxes.first.evaluate("box => [box.scrollWidth, box.clientWidth]")
        assert wide > seen, "this formula is wider than its box"
        boxes.first.evaluate("box => { box.scrollLeft = 60 }")
        assert boxes.first.evaluate("box => box.scrollLeft") == 60
    assert not [error for error in page.errors if "favicon" not in error]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_formulas_are_drawn_in_the_colours_of_the_theme(site, open_page: Open, theme):
    page = open_page(site / "methods" / "dpo.html", theme=theme)
    drawn = page.evaluate(
        """() => {
            const math = document.querySelector('.formula math'), row = math.querySelector('msub');
            const [base, under] = [...row.children].map(one => one.getBoundingClientRect());
            const ink = getComputedStyle(math).color, ground = getComputedStyle(document.body).backgroundColor;
            return {below: under.bottom > base.bottom, ink, ground, height: math.getBoundingClientRect().height};
        }"""
    )
    assert drawn["below"] and drawn["height"] > 15, "MathML is laid out: the subscript stands below"
    ink, ground = (sum(float(x) for x in re.findall(r"[\d.]+", drawn[one])[:3]) for one in ("ink", "ground"))
    assert (ink > ground) == (theme == "dark") and abs(ink - ground) > 300
