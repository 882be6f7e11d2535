"""The page of a run that samples: what it earned, at what distance, and the answers that it kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.groups import RowId
from align.data.rollouts import Answer, RolloutGroup
from align.report import run_page
from align.report.run import run_sections
from align.report.sections import Curve, Section, Table, Verdict
from align.trainers.rollout_log import RolloutLog


def answer(text: str, reward: float, finished: bool = True) -> Answer:
    return Answer(np.array([5, 2]), text, finished, np.array([-0.5, -0.25], np.float32), rewards={"gold": reward})


def run(folder: Path, evaluated: bool) -> Path:
    entries: list[dict[str, Any]] = [
        {"step": step, "loss": 0.7 - 0.01 * step, "rollout/reward": 0.1 * step, "rollout/kl": 0.5 * step}
        for step in (1, 2, 3)
    ]
    if evaluated:
        entries += [{"step": 1, "eval_reward": 0.3, "eval_kl": 0.2}, {"step": 3, "eval_reward": 0.2, "eval_kl": 1.7}]
    entries.append({"step": 3, "train_runtime": 1.0})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    wins = np.array([[0.5, 0.8, np.nan], [0.2, 0.5, np.nan], [np.nan, np.nan, 0.5]])
    kept = [
        RolloutGroup(
            RowId("p.jsonl", row, line=row + 1),
            ({"role": "user", "content": f"question {row}"},),
            np.array([3]),
            (answer("<b>good</b>", 1.0), answer("bad", float("nan")), answer("cut", 0.5, finished=False)),
            wins if row == 0 else None,
        )
        for row in range(9)
    ]
    log = RolloutLog(folder, "last", writes=True)
    log.write(kept[::-1], 1)
    log.write(kept, 2)
    return folder


def sections(folder: Path) -> dict[str, Any]:
    return {getattr(one, "title", type(one).__name__): one for one in run_sections(folder)}


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_verdict_is_of_the_reward_and_its_price(tmp_path: Path, evaluated: bool) -> None:
    found = sections(run(tmp_path, evaluated))
    (verdict,) = [one for one in run_sections(tmp_path) if isinstance(one, Verdict)]
    if evaluated:
        assert "held-out prompts the reward of the policy's answers went from 0.3 at step 1 to 0.2" in verdict.text
        assert "1.7 nats from the reference" in verdict.text and verdict.good is False
    else:
        assert "from 0.1 at step 1 to 0.3 at step 3, at 1.5 nats" in verdict.text and verdict.good
        assert "nothing is known of other prompts" in verdict.text
    curves = {part.title: part for part in found["Curves"].parts if isinstance(part, Curve)}
    reward = curves["Reward of the policy's answers"]
    assert reward.series["training"] == [(1, 0.1), (2, 0.2), (3, pytest.approx(0.3))]
    assert ("evaluation" in reward.series) is evaluated


def test_distance_is_in_nats_an_answer(tmp_path: Path) -> None:
    """A method's own `kl` is by token, and its `length` of what is trained on: neither is drawn in the same curve."""
    folder = run(tmp_path, True)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    mixed = [one | ({"kl": 0.01} if "rollout/kl" in one else {}) for one in entries]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in mixed))
    found = sections(folder)
    (distance,) = [one for one in found["Curves"].parts if getattr(one, "title", "") == "Distance to the reference"]
    assert distance.series == {"training": [(1, 0.5), (2, 1.0), (3, 1.5)], "evaluation": [(1, 0.2), (3, 1.7)]}
    (own,) = [one for one in found["More curves"].parts if getattr(one, "title", "") == "KL"]
    assert own.series == {"training": [(1, 0.01), (2, 0.01), (3, 0.01)]}


def test_kept_rollouts_are_shown_with_what_they_earned(tmp_path: Path) -> None:
    run(tmp_path, True)
    assert [one.name for one in (tmp_path / "rollouts").iterdir()] == ["000002.jsonl"]
    shown = sections(tmp_path)["Rollouts"]
    assert isinstance(shown, Section)
    (table,) = shown.parts
    assert isinstance(table, Table) and len(table.rows) == 6 * 3
    assert list(table.columns) == ["prompt", "answer", "from", "gold", "beats the others"]
    assert table.rows[0] == ["question 0", "<b>good</b>", "policy", 1.0, pytest.approx(0.8)]
    assert table.rows[1] == ["", "bad", "policy", "missing", pytest.approx(0.2)]
    assert table.rows[2] == ["", "cut", "policy, cut", 0.5, "missing"]
    page = run_page(tmp_path).read_text()
    assert "&lt;b&gt;good&lt;/b&gt;" in page and "<b>good</b>" not in page


def test_a_run_without_rollouts_says_nothing_of_them(tmp_path: Path) -> None:
    folder = run(tmp_path, False)
    (folder / "rollouts" / "000002.jsonl").unlink()
    assert "Rollouts" not in sections(folder)
