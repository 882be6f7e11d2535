"""From a checked recipe to a trained model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.errors import AlignError, ConfigError
from align.core.registry import METHODS
from align.feedback import FeedbackContext, open_feedback
from align.recipe import provenance, rules
from align.recipe.sections import Model, Peft, Recipe, Rollout, Stream
from align.sampling.spec import SamplerSpec


def run(recipe: Recipe) -> Path:
    """Train what a recipe says; return the output folder. Every rank of a launch calls it.

    Raises:
        AlignError: whatever stops the run, with what to do about it.
    """
    prepare(recipe).train()
    return Path(recipe.train.output_dir).expanduser()


def prepare(recipe: Recipe) -> Any:
    """Check the output folder, write the run's records into it, and build the trainer.

    Raises:
        CheckpointError: the output folder holds something else.
        ConfigError: it holds a run that this recipe may not continue, or a value that a library refuses.
    """
    method = rules.build_method(METHODS.get(recipe.method.name), recipe.method.options)
    uses = rules.Uses.of(method)
    if os.environ.get("RANK", "0") == "0":
        provenance.check_output(recipe, uses)
        provenance.save(recipe, uses)
    return build(recipe, method)


def build(recipe: Recipe, method: Any, *, model: Any = None, train: Any = None) -> Any:
    """The trainer of a recipe, ready to train.

    `model` and `train` take the place of what the recipe names: a model that is loaded already, rows that were read.
    """
    from align.trainers import OnlineTrainer, PreferenceTrainer

    given: dict[str, Any] = {
        "model": model_path(recipe) if model is None else model,
        "method": method,
        "args": arguments(recipe),
        "train_dataset": streams(recipe.data.trained) if train is None else train,
        "eval_dataset": streams(recipe.data.eval) or None,
        "peft_config": _peft(recipe.model.peft),
        "quantization_config": _quantization(recipe.model),
    }
    if method.rollouts() is None:
        return PreferenceTrainer(**given)
    context = FeedbackContext(folder=Path.cwd())
    judges = [(one, open_feedback(one, context)) for one in recipe.feedback]
    return OnlineTrainer(
        **given,
        feedback=[judge for one, judge in judges if not one.held_out],
        eval_feedback=[judge for one, judge in judges if one.held_out],
        health=recipe.health,
    )


def streams(named: Sequence[Stream]) -> list[dict[str, Any]]:
    """The streams of a recipe as `prepare_data` and `open_sources` take them."""
    return [_stream(stream) for stream in named]


def arguments(recipe: Recipe) -> Any:
    """The `AlignConfig` of a recipe.

    Raises:
        ConfigError: transformers refuses a value (an optimiser's name), or the processes of a launch do not see each
            other.
    """
    import torch

    from align.trainers import AlignConfig, OnlineConfig

    values = {**_shared_names(recipe), **_renamed(recipe)}
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without it, transformers takes every process of a launch on CPUs for the only one, in silence.
    values["use_cpu"] = launched > 1 and not torch.accelerator.is_available()
    kind: type[AlignConfig] = AlignConfig
    if recipe.data.prompts:
        kind, values = OnlineConfig, {**values, **_online(recipe)}
    try:
        made = kind(**values)
    except AlignError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError("the `train` section cannot be used", why=str(error)) from error
    if made.world_size != launched:
        raise ConfigError(
            f"{launched} processes were launched, and this one sees {made.world_size}",
            why="they would train apart and write the same files",
            mend="start them with torchrun or accelerate, on devices of one kind",
        )
    return made


def _shared_names(recipe: Recipe) -> dict[str, Any]:
    """Options that have the same name in the recipe and in `AlignConfig`."""
    model, data, train = recipe.model, recipe.data, recipe.train
    values = {name: getattr(model, name) for name in ("dtype", "backend", "gradient_checkpointing")}
    values["trust_remote_code"] = model.trust_remote_code
    for name in ("score", "max_length", "truncation", "pairs", "max_bad_fraction", "shuffle"):
        values[name] = getattr(data, name)
    for name in (
        "learning_rate",
        "global_batch_size",
        "num_train_epochs",
        "lr_scheduler_type",
        "weight_decay",
        "max_grad_norm",
        "optim",
        "seed",
        "tokens_per_micro_batch",
        "value_learning_rate",
        "value_max_grad_norm",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "report_to",
    ):
        values[name] = getattr(train, name)
    return values


def _renamed(recipe: Recipe) -> dict[str, Any]:
    data, train, reference = recipe.data, recipe.train, recipe.reference
    return {
        "output_dir": str(Path(train.output_dir).expanduser()),
        "max_steps": -1 if train.max_steps is None else train.max_steps,
        "warmup_steps": 0 if train.lr_scheduler_type == "constant" else train.warmup_steps,
        "resume": train.resume if train.resume in ("auto", "never") else str(Path(train.resume).expanduser()),
        "chat_template": None if data.chat_template == "model" else str(Path(data.chat_template).expanduser()),
        "reference": reference.kind,
        "reference_model": _expanded(reference.model),
        "guide_model": _expanded(reference.guide),
        "previous_model": _expanded(reference.previous),
        "reference_cache": _expanded(reference.cache_dir),
        "ema_decay": reference.decay,
        "ema_every": reference.every,
        "eval_every": recipe.eval.every,
        "best_metric": recipe.eval.best,
        "patience": recipe.eval.patience,
    }


def reward_weights(recipe: Recipe) -> dict[str, float]:
    """The weight of each reward that is trained on, by name."""
    return {one.name: one.weight for one in recipe.feedback if not one.held_out and one.weight != 1}


def _online(recipe: Recipe) -> dict[str, Any]:
    """What an `OnlineConfig` has beyond an `AlignConfig`."""
    rollout, sampler = recipe.rollout or Rollout(), recipe.sampler or SamplerSpec()
    return {
        "rollout_prompts": rollout.prompts,
        "rollout_epochs": rollout.epochs,
        "rollout_minibatches": rollout.minibatches,
        "rollout_keep": rollout.keep,
        "max_redraws": rollout.redraws,
        **{name: getattr(rollout, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")},
        "eval_prompts": rollout.eval_prompts,
        "sampler": sampler,
        "reward_weights": reward_weights(recipe),
        "shaping": [dict(stage) for stage in recipe.shaping] or None,
    }


def model_path(recipe: Recipe) -> str:
    """The model's folder or hub id; a revision is fetched by itself, so that what is trained is what was named."""
    if recipe.model.revision is None:
        return str(_expanded(recipe.model.name))
    from huggingface_hub import snapshot_download

    return snapshot_download(recipe.model.name, revision=recipe.model.revision)


def _stream(stream: Stream) -> dict[str, Any]:
    values = {field.name: getattr(stream, field.name) for field in dataclasses.fields(stream)}
    return {**values, "name": _expanded(stream.name)}


def _peft(peft: Peft | None) -> Any:
    if peft is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules=peft.target_modules,
        modules_to_save=peft.modules_to_save,
        bias=peft.bias,
        use_rslora=peft.use_rslora,
    )


def _quantization(model: Model) -> Any:
    if model.quantization is None or not model.quantization.load_in_4bit:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    given = model.quantization
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=given.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=given.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        llm_int8_skip_modules=given.llm_int8_skip_modules,
    )


def _expanded(name: str | None) -> str | None:
    return str(Path(name).expanduser()) if name and name.startswith("~") else name
