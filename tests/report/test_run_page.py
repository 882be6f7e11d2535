"""The page of a real run: its curves, its table and its verdict against the run's own records."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.core.errors import CheckpointError
from align.report import Curve, Section, Table, Verdict, run_page, run_sections
from align.testing.tiny import random_pairs
from tests.recipe.small import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    rows: list[dict[str, Any]] = list(random_pairs(24, seed=0))
    rows[3] = {"prompt": "p", "chosen": "<script>", "rejected": "<script>"}
    recipe = small_run(
        folder,
        6,
        rows,
        list(random_pairs(8, seed=1)),
        data={"max_bad_fraction": 0.5},
        train={"global_batch_size": 4, "logging_steps": 1},
        provenance={"claim": "</code><script>"},
    )
    assert main(["train", str(recipe)]) == 0
    return folder / "run"


def parts(sections: list[Any]) -> list[Any]:
    return [part for one in sections for part in (one.parts if isinstance(one, Section) else [one])]


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_every_logged_number_is_in_a_curve(run: Path) -> None:
    curves = [part for part in parts(run_sections(run)) if isinstance(part, Curve)]
    drawn = sorted(tuple(point) for curve in curves for points in curve.series.values() for point in points)
    steps = [entry for entry in log_of(run) if not {"train_runtime", "policy_of"} & entry.keys()]
    logged = sorted(
        (entry["step"], value) for entry in steps for key, value in entry.items() if key not in ("step", "epoch")
    )
    assert drawn == logged and len(steps) == 8
    loss = next(curve for curve in curves if curve.title == "Loss")
    assert loss.series == {
        "training": [(entry["step"], entry["loss"]) for entry in steps if "loss" in entry],
        "evaluation": [(entry["step"], entry["eval_loss"]) for entry in steps if "eval_loss" in entry],
    }
    rewards = next(curve for curve in curves if curve.title == "Rewards")
    assert list(rewards.series) == [
        "chosen, training",
        "rejected, training",
        "chosen, evaluation",
        "rejected, evaluation",
    ]


def test_the_verdict_and_the_table_follow_the_log(run: Path) -> None:
    found = parts(run_sections(run))
    first, last = [entry for entry in log_of(run) if "eval_loss" in entry]
    verdict = next(part for part in found if isinstance(part, Verdict))
    assert verdict.good is (last["eval_loss"] < first["eval_loss"])
    for number in (first["eval_loss"], last["eval_loss"], first["eval_accuracy"], last["eval_accuracy"]):
        assert f"{number:.4g}" in verdict.text
    table = next(part for part in found if isinstance(part, Table) and part.title == "Evaluation")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["loss"] == [first["eval_loss"], last["eval_loss"], last["eval_loss"] - first["eval_loss"]]
    assert table.columns[1:3] == [f"first, step {first['step']}", f"last, step {last['step']}"]
    assert {f"eval_{name}" for name in rows} == {key for key in last if key.startswith("eval_")}


def test_rejected_rows_and_records_are_on_the_page(run: Path) -> None:
    found = parts(run_sections(run))
    table = next(part for part in found if isinstance(part, Table) and part.title == "Rows left out")
    assert table.rows == [["chosen: chosen and rejected are identical", "bad", 1, "train.jsonl:4"]]
    path = run_page(run)
    assert path == run / "report.html"
    page = path.read_text(encoding="utf-8")
    code = re.search(r"<pre[^>]*><code>(.*?)</code>", page, re.DOTALL)
    assert code and unescape(code[1]) == (run / "recipe.yaml").read_text()
    record = json.loads((run / "provenance.json").read_text())
    assert record["recipe_digest"] in page and record["versions"]["torch"] in page


def test_the_page_of_a_run_opens(run: Path, open_page: Any, tmp_path: Path) -> None:
    page = open_page(run_page(run, tmp_path / "elsewhere.html"), 390)
    assert page.errors == []
    page.get_by_role("link", name="More curves").click()
    folded = page.locator("details.fold .plot svg")
    folded.first.wait_for()
    page.wait_for_function("[...document.querySelectorAll('.plot svg')].every(one => one.clientWidth > 300)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def copied(run: Path, folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_unfinished_and_odd_logs(run: Path, tmp_path: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines()
    stopped = copied(run, tmp_path / "stopped", [*lines[:5], '{"step": 5, "lo'])
    found = run_sections(stopped)
    assert "no end in its log" in found[0].text
    assert any(isinstance(one, Section) and one.note == "1 lines of log.jsonl could not be read." for one in found)
    no_evaluation = [line for line in lines if "eval_loss" not in line]
    blind = run_sections(copied(run, tmp_path / "blind", no_evaluation))
    assert blind[0].good is None and "nothing is known of other data" in blind[0].text
    broken = [*lines[:-1], '{"step": 7, "eval_loss": NaN}', lines[-1]]
    nan = run_sections(copied(run, tmp_path / "nan", broken))
    assert nan[0].good is False and "not a finite number at step 7" in nan[0].text
    worse = [*lines[:-1], '{"step": 7, "eval_loss": 9.5}', lines[-1]]
    assert run_sections(copied(run, tmp_path / "worse", worse))[0].good is False
    assert run_page(tmp_path / "nan").stat().st_size > 0
    empty = copied(run, tmp_path / "empty", [])
    assert "No loss was logged" in run_page(empty).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"log\.jsonl.*\n.*not that of a run.*\n.*output_dir"):
        run_page(tmp_path)
