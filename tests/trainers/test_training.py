"""A run from end to end on a tiny model: it learns, evaluates, stops, resumes, and says what it does."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from align.core.errors import CheckpointError, ConfigError, TrainingError
from align.methods import METHODS
from align.testing.on_model import rows_for
from align.testing.tiny import random_pairs, save_tiny, tiny_model, tiny_tokenizer
from align.trainers import AlignConfig, PreferenceTrainer
from tests.kinds import ROWS


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return random_pairs(24, seed=1)


def arguments(out: Path, **changes) -> AlignConfig:
    settings = {
        "output_dir": str(out),
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return AlignConfig(**(settings | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


START = {"dpo": 0.693147, "tdpo": 0.693147, "kto": 0.5, "bco": 0.693147, "lipo": 0.693147}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_method_trains_from_preferences_and_its_loss_falls(name, model, rows, tmp_path):
    # `singles` of a pair data set: chosen is desirable, rejected is not; dro_v reads the label as a 0/1 reward.
    needs = METHODS.get(name)().requires()
    beside = {"samples", "contrasts", "probability", "margin"} & needs
    beside |= {"reward"} & needs if METHODS.get(name).view == "pairs" else set()
    data = rows_for(METHODS.get(name)(), seed=0) if beside else rows
    args = arguments(tmp_path, max_steps=15, shuffle=False, learning_rate=3e-3)
    if "anchor.guide" in METHODS.get(name)().requires():
        args.guide_model = str(save_tiny(tmp_path / "guide", seed=8))
    trainer = PreferenceTrainer(model, name, args, data)
    trainer.train()
    curve = losses(trainer)
    assert len(curve) == 15
    if name in START:
        assert curve[0] == pytest.approx(START[name], abs=1e-5)
    assert sum(curve[-3:]) < sum(curve[:3]), curve
    final = weights(tmp_path / "policy")
    start = weights(Path(model))
    assert any(not torch.equal(final[k], start[k]) for k in final)


def test_logged_metrics_have_trls_names(model, rows, tmp_path):
    trainer = PreferenceTrainer(model, "dpo", arguments(tmp_path), rows)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert name in line
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6)
    logged = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, 7))


def test_lora_trains_the_adapter_alone_in_float32(model, rows, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear")
    trainer = PreferenceTrainer(model, "dpo", arguments(tmp_path, dtype="bfloat16"), rows, peft_config=config)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    trainer.train()
    assert trainer.reference.kind == "adapter_off" and trainer.reference.model is None
    assert losses(trainer)[-1] < losses(trainer)[0]
    saved = weights(tmp_path / "policy")
    assert saved and all("lora_" in name for name in saved)


def test_adapter_off_is_a_frozen_copy_of_the_base(model, rows, tmp_path):
    curves = []
    for kind in ("adapter_off", "frozen", "cached"):
        torch.manual_seed(0)
        cache = {"reference_cache": str(tmp_path / "cache")} if kind == "cached" else {}
        args = arguments(tmp_path / kind, reference=kind, shuffle=False, **cache)
        config = LoraConfig(r=4, target_modules="all-linear")
        trainer = PreferenceTrainer(model, "dpo", args, rows, peft_config=config)
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert curves[0] == pytest.approx(curves[2], abs=1e-6)


def test_a_cached_reference_is_computed_once_for_all_runs(model, rows, tmp_path, caplog):
    cache = str(tmp_path / "cache")
    curves = []
    for number, rate in enumerate((1e-3, 1e-3, 2e-3)):
        args = arguments(tmp_path / str(number), reference="cached", reference_cache=cache, learning_rate=rate)
        trainer = PreferenceTrainer(model, "dpo", args, rows)
        trainer.train()
        curves.append(losses(trainer))
        store = trainer.column._store
        if number == 0:
            assert len(store) == 48
        else:
            assert store.misses == 0 and store.hits > 0
    live = PreferenceTrainer(model, "dpo", arguments(tmp_path / "live"), rows)
    live.train()
    assert curves[0] == pytest.approx(losses(live), abs=1e-6)
    assert curves[1] == curves[0]


def test_a_moving_reference_follows_the_policy(model, rows, tmp_path):
    args = arguments(tmp_path, reference="ema", ema_decay=1.0, ema_every=1)
    trainer = PreferenceTrainer(model, "dpo", args, rows)
    trainer.train()
    # With decay 1 at every step the reference is the policy: h is 0 before every step (offline.md, tr_dpo).
    assert losses(trainer) == pytest.approx([0.693147] * 6, abs=1e-5)


def test_gradient_checkpointing_and_budget_do_not_change_the_run(model, rows, tmp_path):
    plain = PreferenceTrainer(model, "dpo", arguments(tmp_path / "a"), rows)
    plain.train()
    args = arguments(tmp_path / "b", gradient_checkpointing=True, tokens_per_micro_batch=100)
    cut = PreferenceTrainer(model, "dpo", args, rows)
    cut.train()
    assert cut.model.policy.is_gradient_checkpointing
    assert losses(plain) == pytest.approx(losses(cut), abs=2e-5)


def test_a_bfloat16_run_changes_the_weights_as_float32_does(model, rows, tmp_path):
    start, norms = weights(Path(model)), {}
    for dtype in ("float32", "bfloat16"):
        args = arguments(tmp_path / dtype, dtype=dtype, learning_rate=5e-7, max_steps=10, shuffle=False)
        trainer = PreferenceTrainer(model, "dpo", args, rows)
        trainer.train()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        final = weights(tmp_path / dtype / "policy")
        norms[dtype] = torch.stack([(final[k].double() - start[k].double()).norm() for k in start]).norm()
    assert norms["float32"] > 0
    assert abs(norms["bfloat16"] / norms["float32"] - 1) <= 0.05


def test_evaluation_best_checkpoint_and_early_stopping(model, rows, tmp_path):
    args = arguments(
        tmp_path, max_steps=30, eval_every=2, best_metric="accuracy", patience=2, learning_rate=2e-3, save_total_limit=1
    )
    trainer = PreferenceTrainer(model, "dpo", args, rows, random_pairs(10, seed=99))
    trainer.train()
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    accuracies = [line["eval_accuracy"] for line in evaluated]
    assert len(evaluated) < 15, "patience did not stop the run"
    assert trainer.state.best_metric == max(accuracies)
    best = Path(trainer.state.best_model_checkpoint)
    last_of_the_best = max(line["step"] for line in evaluated if line["eval_accuracy"] == max(accuracies))
    assert best.name == f"checkpoint-{last_of_the_best}"
    assert same(weights(best / "policy"), weights(tmp_path / "policy"))


def test_evaluation_is_the_loss_of_the_held_out_set(model, tmp_path):
    held_out = random_pairs(10, seed=99)
    values = [
        PreferenceTrainer(
            model,
            "simpo",
            arguments(tmp_path / str(n), global_batch_size=n, tokens_per_micro_batch=80),
            held_out,
            held_out,
        ).evaluate()["eval_loss"]
        for n in (3, 10)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_named_metric_must_exist(model, rows, tmp_path):
    args = arguments(tmp_path, eval_every=1, best_metric="acuracy")
    with pytest.raises(ConfigError, match="acuracy"):
        PreferenceTrainer(model, "dpo", args, rows, rows[:4]).train()


@pytest.mark.parametrize(("method", "stop"), [("kto", 2), ("bco", 3), ("dpo", 3), ("dro_v", 4)])
def test_stop_and_resume_is_bit_for_bit(method, stop, model, rows, tmp_path):
    """24 rows in batches of 8 (4 for singles of pairs): stops fall inside an epoch and exactly at its end."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop
            control.should_save = True

    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 100, "logging_steps": 2}
    whole = PreferenceTrainer(model, method, arguments(tmp_path / "whole", **settings), rows)
    whole.train()
    PreferenceTrainer(model, method, arguments(tmp_path / "cut", **settings), rows, callbacks=[Stop()]).train()
    resumed = PreferenceTrainer(model, method, arguments(tmp_path / "cut", **settings), rows)
    resumed.train()
    assert resumed.state.global_step == whole.state.global_step
    assert same(weights(tmp_path / "whole" / "policy"), weights(tmp_path / "cut" / "policy"))
    assert losses(resumed) == losses(whole)
    for key, value in whole.method_state.items():
        assert torch.equal(value, resumed.method_state[key])


def test_an_epoch_boundary_resumes_into_the_next_epoch(model, rows, tmp_path):
    """A finished run of one epoch, given a second one, trains exactly that epoch (three steps)."""
    settings = {"max_steps": -1, "save_strategy": "steps", "save_steps": 3}
    PreferenceTrainer(model, "dpo", arguments(tmp_path, num_train_epochs=1, **settings), rows).train()
    longer = PreferenceTrainer(model, "dpo", arguments(tmp_path, num_train_epochs=2, **settings), rows)
    longer.train()
    whole = PreferenceTrainer(model, "dpo", arguments(tmp_path / "whole", num_train_epochs=2, **settings), rows)
    whole.train()
    assert longer.state.global_step == whole.state.global_step == 6
    assert same(weights(tmp_path / "policy"), weights(tmp_path / "whole" / "policy"))


def test_sigterm_saves_at_the_end_of_the_step_and_the_rerun_finishes(model, rows, tmp_path):
    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"save_strategy": "steps", "save_steps": 100}
    stopped = PreferenceTrainer(model, "dpo", arguments(tmp_path / "a", **settings), rows, callbacks=[Terminate()])
    stopped.train()
    assert stopped.stopped_by_signal and stopped.state.global_step == 3
    assert (tmp_path / "a" / "checkpoint-3").is_dir() and not (tmp_path / "a" / "policy").exists()
    PreferenceTrainer(model, "dpo", arguments(tmp_path / "a", **settings), rows).train()
    PreferenceTrainer(model, "dpo", arguments(tmp_path / "b", **settings), rows).train()
    assert same(weights(tmp_path / "a" / "policy"), weights(tmp_path / "b" / "policy"))


def test_a_non_finite_loss_stops_before_the_weights_change_and_names_rows(rows, tmp_path):
    policy = tiny_model()
    trainer = PreferenceTrainer(policy, "dpo", arguments(tmp_path), rows, processing_class=tiny_tokenizer())

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    policy.lm_head.weight[5] = float("nan")
                self.kept = policy.model.embed_tokens.weight.clone()

    broken = Break()
    trainer.add_callback(broken)
    with pytest.raises(TrainingError, match="nan") as caught:
        trainer.train()
    assert all(re.fullmatch(r"rows row \d+", one) for one in caught.value.where.split(", "))
    assert torch.equal(policy.model.embed_tokens.weight, broken.kept)


def test_out_of_memory_halves_the_budget_and_changes_nothing_else(model, rows, tmp_path, caplog):
    curves = []
    for limit in (10**9, 300):
        trainer = PreferenceTrainer(model, "dpo", arguments(tmp_path / str(limit), max_steps=4), rows)
        engine = trainer.engine_for(trainer.model)
        real = engine.outputs

        def outputs(micro, real=real, limit=limit):
            if micro.packed.unique_tokens > limit:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(micro)

        trainer._check_step_zero = lambda *_: None
        engine.outputs = outputs
        trainer.train()
        curves.append(
            [{k: line[k] for k in ("loss", "grad_norm", "rewards/margins")} for line in trainer.state.log_history[:4]]
        )
    assert engine.budget <= 512
    assert "out of memory: going on with" in caplog.text
    for whole, cut in zip(*curves, strict=True):
        assert cut == pytest.approx(whole, rel=1e-3, abs=2e-5)


def test_a_batch_that_never_fits_says_so(model, rows, tmp_path):
    trainer = PreferenceTrainer(model, "simpo", arguments(tmp_path), rows)
    engine = trainer.engine_for(trainer.model)

    def outputs(micro):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine.outputs = outputs
    with pytest.raises(TrainingError, match="tokens_per_micro_batch"):
        trainer.train()


def test_step_zero_catches_a_reference_that_is_not_the_start(model, rows, tmp_path):
    trainer = PreferenceTrainer(model, "dpo", arguments(tmp_path), rows)
    with torch.no_grad():
        trainer.reference.model.lm_head.weight.mul_(1.5)
    with pytest.raises(TrainingError, match="step zero"):
        trainer.train()


def test_a_truncated_checkpoint_is_passed_over_or_refused(model, rows, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    PreferenceTrainer(model, "dpo", arguments(tmp_path, **settings), rows).train()
    damaged = tmp_path / "checkpoint-6" / "policy" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        PreferenceTrainer(
            model, "dpo", arguments(tmp_path, resume=str(tmp_path / "checkpoint-6"), **settings), rows
        ).train()
    again = PreferenceTrainer(model, "dpo", arguments(tmp_path, max_steps=8, **settings), rows)
    again.train()
    assert again._restore.folder == tmp_path / "checkpoint-4"


def test_six_lines_of_python_do_what_a_trl_user_expects(rows, tmp_path):
    from align.methods.simpo import SimPO

    trainer = PreferenceTrainer(
        model=tiny_model("gpt2"),
        method=SimPO(beta=2.5),
        args=arguments(tmp_path),
        train_dataset=rows,
        processing_class=tiny_tokenizer(add_bos=False),
    )
    trainer.train()
    assert trainer.reference is None
    assert losses(trainer)[-1] < losses(trainer)[0]
