"""The demo, on a model too small to learn: its numbers are recounted from what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from align.cli import demo, demo_page, demo_steps
from align.cli.console import progress
from align.cli.main import main
from align.report import MAX_BYTES
from align.worlds.start import Start
from align.worlds.style import Style, gold_reward
from tests.kinds import ROUNDS, ROWS

METHODS = ("dpo", "dpo-lora")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo_steps.Demo, demo_steps.Made, list]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        start = Start(demonstrations=256, epochs=1, batch=32, layers=1, width=32)
        small = demo_steps.Demo(Style(), folder / "demo", 1, 48, progress, print, start, evaluated=16)
        made, outcomes = small.run(METHODS)
    return folder / "demo", small, made, outcomes


def test_pairs_are_the_gold_preference(done: tuple) -> None:
    folder, _, made, _ = done
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == made.counts["pairs"] > 24
    prompts = [row["prompt"] for row in rows]
    better, worse = (gold_reward(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    assert all(first > second for first, second in zip(better, worse, strict=True))


def test_the_table_says_what_the_completions_say(done: tuple) -> None:
    folder, _, _, outcomes = done
    for outcome in outcomes:
        row = demo_page.measures(outcome)
        lines = (folder / outcome.method / "evaluation" / "completions.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert len(found) == 16
        rewards = {
            side: np.array(gold_reward([r["prompt"] for r in found], [r[side][0]["text"] for r in found]))
            for side in ("policy", "baseline")
        }
        assert row["reward_before"]["value"] == pytest.approx(rewards["baseline"].mean())
        assert row["reward_after"]["value"] == pytest.approx(rewards["policy"].mean())
        assert row["difference"]["value"] == pytest.approx((rewards["policy"] - rewards["baseline"]).mean())
        wins = np.mean((np.sign(rewards["policy"] - rewards["baseline"]) + 1) / 2)
        assert row["win_rate"]["value"] == pytest.approx(wins)
        assert row["length_after"] == pytest.approx(np.mean([len(r["policy"][0]["ids"]) for r in found]))
        assert row["pairs_per_second"] == pytest.approx(2 * outcome.pairs / row["seconds"], rel=1e-6)
    # Every method is compared with the same answers of the same starting model.
    starts = {demo_page.measures(outcome)["reward_before"]["value"] for outcome in outcomes}
    assert len(starts) == 1


def test_the_verdict_follows_the_intervals() -> None:
    def row(method: str, low: float) -> dict:
        return {"method": method, "difference": {"value": 0.1, "low": low, "high": 0.3, "n": 9}}

    assert demo_page.verdict([row("dpo", 0.01), row("kto", 0.02)]).good is True
    said = demo_page.verdict([row("dpo", 0.01), row("kto", -0.02)])
    assert said.good is None and "kto" in said.text and "dpo" not in said.text


def test_the_page_shows_it(done: tuple) -> None:
    folder, small, made, outcomes = done
    rows = [demo_page.measures(outcome) for outcome in outcomes]
    page = demo_page.write(folder, made, outcomes, rows, small.data_report(made))
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) <= MAX_BYTES
    for outcome in outcomes:
        assert outcome.method in text
        answer = outcome.evaluation.examples[0]["answers"]["policy"]
        assert answer[:40] in text
    assert "global_batch_size: 32" in text


def test_a_name_that_is_no_method_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--methods", "dpoo", "--output", str(tmp_path / "x")]) == 2
    assert "did you mean `dpo`" in capsys.readouterr().err
    assert main(["demo", "--world", "styl", "--output", str(tmp_path / "x")]) == 2
    assert "did you mean `style`" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_demo_numbers_are_new(tmp_path: Path) -> None:
    assert demo.next_free(tmp_path) == tmp_path / "demo-1"
    (tmp_path / "demo-1").mkdir()
    assert demo.next_free(tmp_path) == tmp_path / "demo-2"


@pytest.mark.parametrize("name", sorted({*ROWS, *demo_steps.names()} - {*ROUNDS}))
def test_every_recipe_of_the_demo_trains(name: str, done: tuple) -> None:
    """Two steps on the data that it names; `tgdpo` finds its guide in the demo's own dpo run."""
    folder, small, made, _ = done
    output, log = small.train(name, made, ["train.max_steps=2", f"train.output_dir={folder / 'two' / name}"])
    losses = [entry["train_loss"] for entry in log if "train_loss" in entry]
    assert losses and np.isfinite(losses).all()
    assert any("eval_loss" in entry for entry in log)
    assert (output / "policy" / "manifest.json").exists() or (output / "policy").is_dir()
