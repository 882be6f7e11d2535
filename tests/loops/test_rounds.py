"""The parts of a loop that need no training: roles, decisions, when it ends, weights, what presets declare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.core.errors import CheckpointError, ModelError, TrainingError
from align.core.registry import LOOPS, METHODS
from align.loops.options import Accept, Loop
from align.loops.rounds import Plan, Record, decide, next_round, read_records, stopped
from align.loops.weights import extrapolate


def plan(**given: Any) -> Plan:
    return Plan(**{"output": Path("/runs/x"), "initial": "start", "rounds": 3, "reference": "previous", **given})


def record(number: int, accepted: bool = True, **metrics: float) -> Record:
    made = f"round-{number}/train/policy"
    return Record(number, f"round-{number}/policy", made, metrics, {}, accepted, "")


def test_the_first_round_starts_from_the_initial_model_whatever_is_declared() -> None:
    for reference in ("initial", "previous"):
        roles = next_round(plan(reference=reference), []).roles
        assert (roles.policy, roles.start, roles.initial) == ("start", "start", "start")
        assert roles.reference is None, "the reference is the starting weights, and step zero is checked"
        assert roles.before is None


def test_later_roles_are_those_declared() -> None:
    history = [record(1), record(2)]
    last, first = "/runs/x/round-2/policy", "/runs/x/round-1/policy"
    roles = next_round(plan(), history).roles
    assert (roles.policy, roles.start, roles.reference, roles.before) == (last, last, None, first)
    roles = next_round(plan(reference="initial"), history).roles
    assert (roles.start, roles.reference) == (last, "start")
    roles = next_round(plan(init="initial"), history).roles
    assert (roles.policy, roles.start, roles.reference) == (last, "start", last)
    roles = next_round(plan(init="initial", reference="initial"), history).roles
    assert (roles.start, roles.reference) == ("start", None)
    assert roles.trained == "/runs/x/round-2/train/policy", "increments are of weights that were not extrapolated"


def test_a_round_that_was_rolled_back_plays_no_role() -> None:
    roles = next_round(plan(), [record(1), record(2, accepted=False)]).roles
    assert (roles.policy, roles.start, roles.before) == ("/runs/x/round-1/policy", "/runs/x/round-1/policy", "start")
    assert roles.trained == "/runs/x/round-1/train/policy"
    assert next_round(plan(), [record(1, accepted=False)]).roles.policy == "start"


def test_pairs_of_earlier_rounds_come_by_their_age() -> None:
    mixed = plan(earlier=(0.3, 0.0, 0.1))
    assert next_round(mixed, []).earlier == ()
    assert next_round(mixed, [record(1)]).earlier == ((Path("/runs/x/round-1/pairs"), 0.3),)
    three = next_round(mixed, [record(1), record(2), record(3)]).earlier
    assert three == ((Path("/runs/x/round-3/pairs"), 0.3), (Path("/runs/x/round-1/pairs"), 0.1))


def test_a_round_is_taken_for_its_gain() -> None:
    taken, why = decide(Accept(), 0.5, 0.5, 2)
    assert taken and "round 2 is taken" in why
    taken, why = decide(Accept(min_gain=0.1), 0.55, 0.5, 2)
    assert not taken
    assert "rolled back" in why and "+0.05" in why and "starts from the best so far" in why
    assert decide(Accept(min_gain=-0.1), 0.45, 0.5, 2)[0], "a negative gain allows a loss"
    with pytest.raises(TrainingError, match="win rate"):
        decide(Accept(metric="win_rate"), None, 0.5, 1)


def test_a_loop_ends_for_a_reason() -> None:
    assert stopped(plan(), [record(1), record(2)]) is None
    assert "all 3 rounds" in str(stopped(plan(), [record(1), record(2), record(3)]))
    patient = plan(rounds=9, accept=Accept(patience=2))
    assert stopped(patient, [record(1, False), record(2), record(3, False)]) is None
    assert "2 rounds in a row" in str(stopped(patient, [record(1), record(2, False), record(3, False)]))
    near = plan(max_kl=5.0)
    assert stopped(near, [record(1, kl=4.9)]) is None
    assert "KL" in str(stopped(near, [record(1, kl=5.1)]))
    assert stopped(near, [record(1, accepted=False, kl=5.1)]) is None, "the policy in use is not that one"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-1" / "round.json").write_text('{"number": 1')
    with pytest.raises(CheckpointError, match=r"round-1/round\.json"):
        read_records(tmp_path)


def test_extrapolated_weights_accelerate_by_one_over_one_minus_alpha(tmp_path: Path) -> None:
    """Each round adds the same step to what it starts from; increments tend to step / (1 - alpha)."""
    alpha, step = 0.3, torch.tensor([0.5, -2.0], dtype=torch.float64)
    folders = []

    def save(name: str, weight: torch.Tensor) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": weight}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text("{}")
        return folder

    hat = theta = save("start", torch.zeros(2))
    values = [torch.zeros(2)]
    for number in range(1, 15):
        new = save(f"hat-{number}", (load_file(theta / "model.safetensors")["w"].double() + step).float())
        theta = extrapolate(new, hat, alpha, tmp_path / f"theta-{number}")
        hat = new
        folders.append(theta)
        values.append(load_file(theta / "model.safetensors")["w"])
    assert (folders[0] / "config.json").is_file() and (folders[0] / "manifest.json").is_file()
    torch.testing.assert_close(values[1].double(), (1 + alpha) * step, rtol=1e-6, atol=0)
    torch.testing.assert_close((values[-1] - values[-2]).double(), step / (1 - alpha), rtol=1e-4, atol=0)
    plain = extrapolate(hat, folders[0], 0.0, tmp_path / "alpha-0")
    assert load_file(plain / "model.safetensors")["w"].equal(load_file(hat / "model.safetensors")["w"])


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    for name, weight in (("a", "w"), ("b", "v")):
        (tmp_path / name).mkdir()
        save_file({weight: torch.zeros(2)}, tmp_path / name / "model.safetensors")
    with pytest.raises(ModelError, match="`w`"):
        extrapolate(tmp_path / "a", tmp_path / "b", 0.3, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ModelError, match="whole models"):
        extrapolate(tmp_path / "a", tmp_path / "adapter", 0.3, tmp_path / "c")


def test_presets_name_methods_and_options_that_exist() -> None:
    found = LOOPS.entries()
    assert {"iterative_dpo", "sppo", "inpo", "dno_prct", "spin", "alpha_spin", "self_rewarding", "cream", "raft"} <= {
        *found
    }
    options = set(Loop.__dataclass_fields__)
    for entry in found.values():
        preset = LOOPS.get(entry.id)
        assert preset.id == entry.id and preset.paper == entry.paper and entry.doc
        given = {key: value for key, value in preset.method.items() if key != "name"}
        METHODS.get(preset.method["name"])(**given)
        assert set(preset.loop) | set(preset.asks) <= options
        assert not set(preset.loop) & set(preset.asks)
