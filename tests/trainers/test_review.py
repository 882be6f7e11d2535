"""Faults that a review found in the trainers, each once a failing script."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from align.core.errors import ConfigError, TrainingError
from align.data.groups import Group
from align.methods.base import Method, method
from align.methods.dpo import DPO
from align.testing.tiny import random_pairs, save_tiny, tiny_model
from align.trainers import AlignConfig, PreferenceTrainer
from align.trainers.config import INERT, higher_is_better
from align.trainers.loading import disable_dropout
from tests.trainers.test_training import arguments, losses, same, weights


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return random_pairs(24, seed=1)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


class Terminate(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


SAVING = {"save_strategy": "steps", "save_steps": 100}


def test_a_moving_reference_is_resumed(model, rows, tmp_path):
    settings = SAVING | {"reference": "ema", "ema_decay": 0.5, "ema_every": 2}
    whole = PreferenceTrainer(model, "dpo", arguments(tmp_path / "whole", **settings), rows)
    whole.train()
    PreferenceTrainer(model, "dpo", arguments(tmp_path / "cut", **settings), rows, callbacks=[Stop(3)]).train()
    resumed = PreferenceTrainer(model, "dpo", arguments(tmp_path / "cut", **settings), rows)
    resumed.train()
    assert resumed.column.steps == whole.column.steps == 6
    assert same(weights(tmp_path / "whole" / "policy"), weights(tmp_path / "cut" / "policy"))


def test_a_finished_run_is_not_trained_further(model, rows, tmp_path):
    """max_steps falls inside an epoch of three steps."""
    settings = SAVING | {"max_steps": 5}
    PreferenceTrainer(model, "dpo", arguments(tmp_path, **settings), rows).train()
    before = weights(tmp_path / "policy")
    again = PreferenceTrainer(model, "dpo", arguments(tmp_path, **settings), rows)
    again.train()
    assert again.state.global_step == 5
    assert same(before, weights(tmp_path / "policy"))


@pytest.mark.parametrize("change", [{"learning_rate": 5e-4}, {"seed": 7}, {"global_batch_size": 4}])
def test_another_run_is_not_continued(change, model, rows, tmp_path):
    PreferenceTrainer(model, "dpo", arguments(tmp_path, **SAVING), rows).train()
    with pytest.raises(ConfigError, match=next(iter(change))):
        PreferenceTrainer(model, "dpo", arguments(tmp_path, **(SAVING | change)), rows).train()
    with pytest.raises(ConfigError, match="options"):
        PreferenceTrainer(model, DPO(beta=0.3), arguments(tmp_path, **SAVING), rows).train()
    with pytest.raises(ConfigError, match="data"):
        PreferenceTrainer(model, "dpo", arguments(tmp_path, **SAVING), random_pairs(24, seed=2)).train()


def test_sigterm_keeps_its_checkpoint_beside_the_best(model, rows, tmp_path):
    settings = SAVING | {"eval_every": 2, "best_metric": "loss", "save_total_limit": 1}
    trainer = PreferenceTrainer(model, "dpo", arguments(tmp_path, **settings), rows, rows[:6], callbacks=[Terminate(4)])
    trainer.train()
    assert trainer.stopped_by_signal
    assert (tmp_path / "checkpoint-5").is_dir()
    assert Path(trainer.state.best_model_checkpoint).is_dir()


def test_a_damaged_checkpoint_is_written_again(model, rows, tmp_path):
    settings = SAVING | {"save_steps": 2}
    PreferenceTrainer(model, "dpo", arguments(tmp_path, max_steps=4, **settings), rows).train()
    file = tmp_path / "checkpoint-4" / "policy" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:500])
    PreferenceTrainer(model, "dpo", arguments(tmp_path, max_steps=4, **settings), rows).train()
    assert file.read_bytes() == whole


@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_without_any_usable_row_goes_on(resumed, model, tmp_path):
    """Rows 8 to 15 (or 0 to 7) are too long: one whole step of holes."""
    rows = random_pairs(24, seed=1)
    for row in rows[8:16] if resumed else rows[:8]:
        row["prompt"] = row["prompt"] * 60
    settings = SAVING | {"shuffle": False, "max_steps": 3}
    whole = PreferenceTrainer(model, "dpo", arguments(tmp_path / "whole", **settings), rows)
    whole.train()
    assert whole.state.global_step == 3
    if resumed:
        PreferenceTrainer(model, "dpo", arguments(tmp_path / "cut", **settings), rows, callbacks=[Stop(1)]).train()
        PreferenceTrainer(model, "dpo", arguments(tmp_path / "cut", **settings), rows).train()
        assert same(weights(tmp_path / "whole" / "policy"), weights(tmp_path / "cut" / "policy"))


@method("spiky", view="pairs")
class Spiky(Method):
    """A finite loss whose gradient is not."""

    def loss(self, pairs) -> Tensor:
        return torch.sqrt(pairs.chosen.mean_logp * 0) + pairs.chosen.mean_logp


def test_a_non_finite_gradient_stops_before_the_weights_change(model, rows, tmp_path):
    trainer = PreferenceTrainer(model, Spiky(), arguments(tmp_path, **SAVING), rows)
    with pytest.raises(TrainingError, match="gradient"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_patience_is_resumed(model, rows, tmp_path):
    settings = {"max_steps": 12, "eval_every": 1, "best_metric": "displacement", "patience": 3, "learning_rate": 1e-3}
    settings |= SAVING
    held_out = random_pairs(6, seed=9)
    whole = PreferenceTrainer(model, "dpo", arguments(tmp_path / "whole", **settings), rows, held_out)
    whole.train()
    assert 3 < whole.state.global_step < 12
    stop = whole.state.global_step - 1
    PreferenceTrainer(
        model, "dpo", arguments(tmp_path / "cut", **settings), rows, held_out, callbacks=[Stop(stop)]
    ).train()
    resumed = PreferenceTrainer(model, "dpo", arguments(tmp_path / "cut", **settings), rows, held_out)
    resumed.train()
    assert resumed.state.global_step == whole.state.global_step


def test_arguments_are_not_changed_under_the_users_hands(model, rows, tmp_path):
    args = arguments(tmp_path, learning_rate=None)
    first = PreferenceTrainer(model, "simpo", args, rows)
    second = PreferenceTrainer(model, "dpo", args, rows)
    assert (args.learning_rate, first.args.learning_rate, second.args.learning_rate) == (None, 1e-6, 5e-7)


def test_the_seed_draws_the_adapter(model, rows, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear")
    drawn = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        trainer = PreferenceTrainer(model, "dpo", arguments(tmp_path, seed=3), rows, peft_config=config)
        drawn.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_A" in name})
    assert drawn[0] and same(*drawn)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_bfloat16_run_starts_at_its_reference(family, rows, tmp_path):
    folder = str(save_tiny(tmp_path / "model", family))
    trainer = PreferenceTrainer(folder, "dpo", arguments(tmp_path, dtype="bfloat16", max_steps=1), rows)
    trainer.train()
    assert losses(trainer) == pytest.approx([0.693147], abs=1e-6)
    if family == "llama":
        assert trainer.reference.model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [{"bias": "all"}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"}])
def test_a_base_that_moves_is_no_reference(change, model, rows, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", **change)
    with pytest.raises(ConfigError, match="frozen"):
        PreferenceTrainer(model, "dpo", arguments(tmp_path), rows, peft_config=config)


VALUES = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "hub_model_id": "me/mine",
    "include_num_input_tokens_seen": "all",
    "torch_empty_cache_steps": 3,
    "train_sampling_strategy": "sequential",
    "data_seed": 3,
    "eval_accumulation_steps": 2,
    "parallelism_config": object(),
}


@pytest.mark.parametrize("name", sorted(INERT))
def test_an_argument_without_effect_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=name):
        AlignConfig(output_dir=str(tmp_path), use_cpu=True, **{name: VALUES.get(name, True)})


@pytest.mark.parametrize(
    "change",
    [
        {"ema_decay": 0.5},
        {"ema_every": 3},
        {"value_max_grad_norm": 1.0, "max_grad_norm": 0.0},
        {"eval_every": 0},
        {"patience": 0, "best_metric": "loss", "eval_every": 1},
    ],
)
def test_an_option_that_nothing_uses_is_refused(change, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(change))):
        AlignConfig(output_dir=str(tmp_path), use_cpu=True, **change)


def test_a_cache_that_nothing_reads_is_refused(model, rows, tmp_path):
    with pytest.raises(ConfigError, match="reference_cache"):
        PreferenceTrainer(model, "dpo", arguments(tmp_path, reference_cache="x"), rows)


def test_a_value_option_without_a_value_role_is_refused(model, rows, tmp_path):
    with pytest.raises(ConfigError, match="value_learning_rate"):
        PreferenceTrainer(model, "dpo", arguments(tmp_path, value_learning_rate=1e-4), rows)


def test_directions_of_metrics():
    assert higher_is_better("accuracy") and higher_is_better("rewards/chosen") and higher_is_better("eval_logps/chosen")
    assert not higher_is_better("loss") and not higher_is_better("logps/rejected")
    with pytest.raises(ConfigError, match="my_metric"):
        higher_is_better("my_metric")


def test_dropout_held_as_a_number_is_switched_off():
    opt = tiny_model("gpt2")
    opt.transformer.h[0].dropout = 0.1  # as OPT's layers hold theirs
    disable_dropout(opt)
    assert opt.transformer.h[0].dropout == 0.0


def test_an_empty_prompt_without_bos_needs_a_common_first_token():
    from align.data.groups import Completion, Preference, RowId, Segment
    from align.data.rows import RowError
    from align.data.tokenise import Tokeniser
    from align.testing.tiny import tiny_tokenizer

    def group(first: str, second: str) -> Group:
        completions = tuple(Completion((Segment("assistant", text),)) for text in (first, second))
        return Group(RowId("x", 0), "", completions, (Preference(0, 1),))

    tokenise = Tokeniser(tiny_tokenizer(add_bos=False, chat_template=False), "pairs")
    made = tokenise(group("the cat paints", "the cat builds a bridge"))
    assert len(made.prompt) == 1
    with pytest.raises(RowError, match="empty"):
        tokenise(group("the cat paints", "No idea"))
