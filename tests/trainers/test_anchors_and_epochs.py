"""Runs with a guide, with other prompts, with a teacher of the previous epoch, with rewards of turns, with a memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from align.core.errors import AlignError, ConfigError
from align.methods.elr import ELR
from align.methods.ps_kd import PSKD
from align.methods.regret_pref import RegretPref
from align.testing.tiny import random_pairs, save_tiny
from align.trainers import AlignConfig, PreferenceTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def arguments(out: Path, **changes: Any) -> AlignConfig:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "num_train_epochs": 3,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return AlignConfig(**(settings | changes))


def first_loss(trainer: PreferenceTrainer) -> float:
    trainer.train()
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


def test_a_guide_is_needed_where_it_is_read_and_refused_where_not(model: str, tmp_path: Path) -> None:
    rows = random_pairs(8)
    with pytest.raises(ConfigError, match="needs a trained policy as its guide"):
        PreferenceTrainer(model, "tgdpo", arguments(tmp_path), rows)
    with pytest.raises(ConfigError, match="`guide_model` is set"):
        PreferenceTrainer(model, "dpo", arguments(tmp_path, guide_model=model), rows)


def test_a_guide_that_is_the_reference_changes_nothing_and_another_does(model: str, tmp_path: Path) -> None:
    rows, curves = random_pairs(8), []
    other = str(save_tiny(tmp_path / "other", seed=9))
    for number, (name, guide) in enumerate((("dpo", None), ("tgdpo", model), ("tgdpo", other))):
        args = arguments(tmp_path / str(number), guide_model=guide)
        trainer = PreferenceTrainer(model, name, args, rows)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)
    assert curves[2][0] == pytest.approx(curves[0][0], abs=1e-6)
    assert curves[2] != pytest.approx(curves[0], abs=1e-4)


def test_equal_prompts_in_other_words_are_dpo(model: str, tmp_path: Path) -> None:
    from align.methods.t_reg import TREG

    rows = random_pairs(8)
    same = TREG(beta=0.1, alpha=1.0, better_prompt="Say: {prompt}", worse_prompt="Say: {prompt}")
    curves = []
    for number, method in enumerate(("dpo", same, TREG(beta=0.1, alpha=1.0))):
        trainer = PreferenceTrainer(model, method, arguments(tmp_path / str(number)), rows)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], abs=1e-6)
    assert curves[2] != pytest.approx(curves[0], abs=1e-6)


class Watch(TrainerCallback):
    """What the teacher and the policy are after each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def on_step_end(self, *unused: Any, **more: Any) -> None:
        policy = self.trainer.model.policy.lm_head.weight.detach().clone()
        teacher = self.trainer.column.model.lm_head.weight.detach().clone()
        self.seen.append((policy, teacher, float(self.trainer.method_state["epoch"])))


def test_the_teacher_is_the_policy_as_the_epoch_began(model: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = PreferenceTrainer(model, PSKD(), arguments(tmp_path), random_pairs(8), callbacks=[watch])
    watch.trainer = trainer
    start = trainer.model.policy.lm_head.weight.detach().clone()
    trainer.train()
    assert [epoch for _, _, epoch in watch.seen] == [0, 0, 1, 1, 2, 2]
    assert float(trainer.method_state["epochs"]) == 3
    first, fourth = watch.seen[0], watch.seen[3]
    assert torch.equal(first[1], start) and not torch.equal(first[0], start)
    assert torch.equal(watch.seen[2][1], watch.seen[1][0])
    assert torch.equal(watch.seen[4][1], fourth[0])
    shares = [entry["ps_kd/share"] for entry in trainer.state.log_history if "ps_kd/share" in entry]
    assert shares == pytest.approx([0, 0, 0.8 * 2 / 3, 0.8 * 2 / 3, 0.8, 0.8], abs=1e-6)


def test_one_epoch_of_soft_targets_is_sft_and_says_so(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    curves = []
    for name in ("ps_kd", "sft"):
        trainer = PreferenceTrainer(model, name, arguments(tmp_path / name, num_train_epochs=1), random_pairs(8))
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert "ps_kd acts from the second epoch on" in caplog.text


def test_rewards_of_turns_reach_the_value(model: str, tmp_path: Path) -> None:
    """The value starts at 0, so the first loss is that of the rewards' difference, and of their squares."""
    rows = [{**row, "chosen_step_rewards": [0.9], "rejected_step_rewards": [-0.3]} for row in random_pairs(4)]
    trainer = PreferenceTrainer(
        model, RegretPref(form="value", value_weight=0.0), arguments(tmp_path, num_train_epochs=1), rows
    )
    expected = torch.nn.functional.softplus(torch.tensor(-1.2))
    assert first_loss(trainer) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("given", [{}, {"chosen_step_rewards": [0.9, 0.1], "rejected_step_rewards": [0.1]}])
def test_missing_or_too_many_rewards_are_bad_rows(given: dict[str, Any], model: str, tmp_path: Path) -> None:
    rows = [{**row, **given} for row in random_pairs(4)]
    with pytest.raises(AlignError, match="step_rewards"):
        PreferenceTrainer(model, RegretPref(form="value"), arguments(tmp_path), rows)


def test_the_memory_holds_every_pair_once(model: str, tmp_path: Path) -> None:
    trainer = PreferenceTrainer(model, ELR(), arguments(tmp_path), random_pairs(10))
    trainer.train()
    memory = trainer.method_state
    assert len(memory["key"]) == len(memory["key"].unique()) == 10
    torch.testing.assert_close(
        memory["target"].sum(-1), torch.full((10,), 1 - 0.7**3, dtype=torch.float64), atol=1e-12, rtol=0
    )
