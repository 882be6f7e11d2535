"""`AlignConfig`: transformers' training arguments, and what the packed step needs beyond them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from align.core.errors import ConfigError

BACKENDS = ("auto", "tree", "sdpa", "flex", "padded")
REFERENCES = ("auto", "frozen", "adapter_off", "cached", "ema")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "backend": BACKENDS,
    "reference": REFERENCES,
    "dtype": ("float32", "bfloat16"),
    "score": (None, "last", "all"),
    "pairs": ("best_worst", "all", "adjacent"),
    "truncation": ("drop", "cut_prompt", "cut_completion"),
}
_POSITIVE = ("global_batch_size", "max_length", "ema_every")
INERT = {
    "per_device_train_batch_size": "set `global_batch_size`; micro-batches are cut by `tokens_per_micro_batch`",
    "per_device_eval_batch_size": "evaluation takes the batches of training",
    "auto_find_batch_size": "memory is bounded by `tokens_per_micro_batch`",
    "load_best_model_at_end": "set `best_metric`: the best checkpoint is what the run leaves",
    "label_smoothing_factor": "choose a method with label smoothing",
    "neftune_noise_alpha": "remove it",
    "dataloader_drop_last": "the last batch of an epoch is trained on, with its own counts",
    "save_only_model": "checkpoints resume exactly; the weights alone are in their `policy` folder",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint at the end of the step",
    "include_num_input_tokens_seen": "remove it",
    "torch_empty_cache_steps": "remove it",
    "train_sampling_strategy": "set `shuffle`",
    "data_seed": "set `seed`",
    "use_liger_kernel": "remove it",
    "torch_compile": "remove it",
    "fp16_full_eval": "set `dtype`",
    "bf16_full_eval": "set `dtype`",
    "push_to_hub": "upload the `policy` folder of the finished run",
    "hub_model_id": "upload the `policy` folder of the finished run",
    "batch_eval_metrics": "remove it",
    "prediction_loss_only": "remove it",
    "eval_accumulation_steps": "remove it",
    "parallelism_config": "shard with DeepSpeed ZeRO",
}
"""Fields of `transformers.TrainingArguments` that are refused where they differ from their default -> what to do."""


def launched() -> int:
    """Processes that a launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _doc(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class AlignConfig(TrainingArguments):
    """Arguments of a run. Everything of `transformers.TrainingArguments` holds, except:

    one step is one global batch of `global_batch_size` units, cut into micro-batches by tokens, so
    `per_device_train_batch_size` has no effect and `gradient_accumulation_steps` must stay 1; `learning_rate` defaults
    by method and adapter kind, never to 5e-5; `bf16` means `dtype="bfloat16"`: compute in bfloat16, trainable weights
    and optimiser state in float32.
    """

    learning_rate: float | None = _doc(None, "peak learning rate; None: by method and adapter kind")  # type: ignore[assignment]
    global_batch_size: int = _doc(64, "units of the method per optimiser step, over all ranks")
    max_length: int = _doc(2048, "tokens of prompt and completion together")
    tokens_per_micro_batch: int | None = _doc(None, "token budget of a micro-batch; None: 1024 on CPU, 16384 on GPU")
    backend: str = _doc("auto", "attention back end")
    dtype: str = _doc("float32", "dtype of compute and of frozen weights")
    score: str | None = _doc(None, "which assistant turns count: last, all; None: by view")
    pairs: str = _doc("best_worst", "pairs out of more than two completions")
    truncation: str = _doc("drop", "what becomes of rows longer than max_length")
    chat_template: str | None = _doc(None, "path of a Jinja chat template; None: the tokenizer's")
    max_bad_fraction: float = _doc(0.01, "share of bad rows above which the run stops")
    shuffle: bool = _doc(True, "block-shuffle the rows of every epoch; False: file order")
    reference: str = _doc("auto", "where reference log-probabilities come from")
    reference_model: str | None = _doc(None, "path or hub id of the reference; None: the starting policy")
    reference_cache: str | None = _doc(None, "folder of the log-prob cache; None: ~/.cache/align/logps")
    guide_model: str | None = _doc(None, "path or hub id of the policy that gives `anchor.guide` (tgdpo, brain)")
    previous_model: str | None = _doc(
        None, "path of the policy that gives `anchor.previous`; None: the starting policy"
    )
    ema_decay: float = _doc(0.6, "weight of the policy in an EMA refresh")
    ema_every: int = _doc(512, "optimiser steps between EMA refreshes")
    value_learning_rate: float | None = _doc(None, "learning rate of the value role; None: the policy's")
    value_max_grad_norm: float | None = _doc(None, "own clip norm of the value role; None: clipped with the policy")
    resume: str = _doc("auto", "auto, never, or a checkpoint folder")
    eval_every: float | None = _doc(None, "steps (>= 1) or share of the run (< 1) between evaluations")
    best_metric: str | None = _doc(None, "evaluation metric that names the best checkpoint")
    patience: int | None = _doc(None, "evaluations without a better best_metric before the run stops")
    trust_remote_code: bool = _doc(False, "run code that a model folder brings")
    logging_steps: float = _doc(10, "steps between log lines")
    report_to: str | list[str] | None = _doc("none", "where metrics go besides the local log")
    warmup_steps: float = _doc(0.1, "steps (>= 1) or share of the run (< 1) of linear warm-up")

    def __post_init__(self) -> None:
        self._refuse()
        if self.bf16:
            self.dtype, self.bf16 = "bfloat16", False
        if self.fp16:
            raise ConfigError("`fp16` is not supported", mend="use dtype bfloat16 or float32")
        # A shown NaN is a mended NaN: the filter would replace it by a running mean.
        self.logging_nan_inf_filter = False
        self.remove_unused_columns = False
        if self.eval_every is not None:
            self.eval_strategy, self.eval_steps = "steps", self.eval_every  # type: ignore[assignment]
        if launched() > 1 and not torch.accelerator.is_available():
            # Without it every process of a CPU launch takes itself for the only one, in silence.
            self.use_cpu = True
        given = self.learning_rate
        self.learning_rate = 0.0 if given is None else given
        super().__post_init__()
        self.learning_rate = given
        # Several GPUs without a launcher: Trainer would wrap nn.DataParallel, which cannot split a packed batch.
        self._n_gpu = min(self.n_gpu, 1)
        if self.world_size != launched():
            raise ConfigError(
                f"{launched()} processes were launched, and this one sees {self.world_size}",
                why="they would train apart and write the same files",
                mend="start them with torchrun or accelerate, on devices of one kind",
            )

    def _refuse_inert(self) -> None:
        """Options of Trainer that the packed step does not have, and ours that another option makes void."""
        defaults = {field.name: field.default for field in fields(TrainingArguments)}
        for name, instead in INERT.items():
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ConfigError(f"`{name}` has no effect here", mend=instead)
        void = {
            "ema_decay": self.reference != "ema",
            "ema_every": self.reference != "ema",
            "patience": self.best_metric is None,
            "value_max_grad_norm": self.max_grad_norm <= 0,
        }
        own = {field.name: field.default for field in fields(AlignConfig)}
        for name, unused in void.items():
            if unused and getattr(self, name) != own[name]:
                raise ConfigError(f"`{name}` is set, and nothing uses it", mend="remove it, or set what it belongs to")

    def _refuse(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"`{name}` is {getattr(self, name)!r}", mend="use one of " + ", ".join(map(str, choices))
                )
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}", mend="use a whole number >= 1")
        if self.gradient_accumulation_steps != 1:
            raise ConfigError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}",
                why="one step is one global batch; accumulating several would count each by itself",
                mend="set `global_batch_size`, and `tokens_per_micro_batch` for memory",
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"`max_bad_fraction` is {self.max_bad_fraction}", mend="use a number from 0 to 1")
        if not 0 < self.ema_decay <= 1:
            raise ConfigError(f"`ema_decay` is {self.ema_decay}", mend="use a number > 0 and <= 1")
        self._refuse_inert()
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"`patience` is {self.patience}", mend="use a whole number >= 1")
        if self.eval_every is not None and self.eval_every <= 0:
            raise ConfigError(f"`eval_every` is {self.eval_every}", mend="use steps (>= 1) or a share of the run (< 1)")
        if (
            self.best_metric is not None
            and self.eval_every is None
            and str(self.eval_strategy) in ("no", "IntervalStrategy.NO")
        ):
            raise ConfigError("`best_metric` without evaluations", mend="set `eval_every`")


ALIASES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
"""Short names of metrics that recipes may use."""
_HIGHER = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "reward",
    "distinct",
    "logps",
    "logps/",
    "logps_per_token",
)
_LOWER = (
    "loss",
    "terms/",
    "length",
    "displacement",
    "kl",
    "truncated",
    "missing",
    "no_spread",
    "repeated",
    "rewards/rejected",
    "logps/rejected",
    "logps_per_token/rejected",
)


def metric_name(short: str) -> str:
    """The name that evaluation logs, without `eval_`."""
    plain = short.removeprefix("eval_")
    return ALIASES.get(plain, plain)


def higher_is_better(metric: str) -> bool:
    """The direction of a metric.

    Raises:
        ConfigError: it is not plain from the name.
    """
    plain = metric_name(metric)
    if plain.startswith(_LOWER):
        return False
    if plain.startswith(_HIGHER):
        return True
    raise ConfigError(
        f"`best_metric` is `{metric}`, and whether higher is better is not known",
        mend="use one of accuracy, margin, loss, or set `greater_is_better`",
    )


LEARNING_RATES = {
    "sft": 2.0e-5,  # the usual rate of instruction tuning at 7-8B; no preference paper's
    "simpo": 1.0e-6,  # SimPO's configurations, Llama-3-8B-Instruct
    "orpo": 5.0e-6,  # Mistral-ORPO-beta, as in TRL's paper index
    "tgdpo": 7.0e-7,  # TGDPO's runs
    "sft_fdiv": 5.0e-6,  # a quarter of sft's, the other half of its paper
    "iqlearn_sft": 2.0e-5,  # sft's
    "ps_kd": 2.0e-5,  # sft's
    "kto": 1.0e-6,  # TRL's KTO page: at most 1e-6 at beta 0.1
    "apo_zero": 2.0e-7,  # the authors' configuration (CLAIR and APO)
    "apo_down": 2.0e-7,
}
"""Full fine-tuning. Others take DPO's 5e-7 (the original code, Zephyr, SimPO's baselines)."""


def default_learning_rate(method_id: str, adapter: bool) -> float:
    """Peak rate of full fine-tuning; ten times it for an adapter (Zephyr's QLoRA recipe 5e-6 against 5e-7)."""
    rate = LEARNING_RATES.get(method_id, 5.0e-7)
    return rate * 10 if adapter else rate
