"""The sections of a recipe: their options, defaults, ranges and what each means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from align.core.options import option
from align.feedback.spec import FeedbackSpec
from align.sampling.spec import SamplerSpec
from align.trainers.health import HealthOptions


@dataclass(frozen=True, kw_only=True)
class Peft:
    """A LoRA adapter, in PEFT's names."""

    r: int = option(64, at_least=1, doc="rank")
    lora_alpha: float = option(64.0, above=0, doc="scale of the update, times 1/r")
    lora_dropout: float = option(0.0, at_least=0, below=1, doc="dropout of the adapter's input")
    target_modules: Any = option(
        "all-linear", doc="`all-linear`, a regular expression, a list of module names; null: PEFT's own list"
    )
    modules_to_save: Any = option(None, doc="modules trained in full beside the adapter, a list of names")
    bias: Literal["none", "all", "lora_only"] = option("none", doc="which biases are trained")
    use_rslora: bool = option(False, doc="scale by 1/sqrt(r) instead of 1/r")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Frozen weights in 4 bits under an adapter (QLoRA), in the names of transformers' `BitsAndBytesConfig`.

    Computed in `model.dtype`. 8 bits are not offered: LLM.int8 looks for outlier columns in the whole input of a layer,
    so a log-probability would depend on what else is in its micro-batch.
    """

    load_in_4bit: bool = option(True, doc="4 bits a weight; false: as if the section were not there")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", doc="the 16 values that a weight may take")
    bnb_4bit_use_double_quant: bool = option(True, doc="quantise the scales of the blocks too")
    llm_int8_skip_modules: Any = option(None, doc="modules left as they are, a list of names; null: the output head")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to train."""

    name: str = option(doc="hub id or folder")
    revision: str | None = option(None, doc="branch, tag or commit of a hub model")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", doc="compute and frozen weights; trained ones are float32"
    )
    backend: Literal["auto", "tree", "sdpa", "flex", "padded"] = option("auto", doc="how packed prompts are attended")
    gradient_checkpointing: bool = option(False, doc="recompute activations in the backward pass")
    trust_remote_code: bool = option(False, doc="run code that a model folder brings")
    peft: Peft | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One source of rows. Public data sets that are known are read without any of these but `name`."""

    name: str = option(doc="hub id, file or folder")
    split: str | None = option(None, doc="split of a data set that has several")
    config: str | None = option(None, doc="configuration of a hub data set")
    data_dir: str | None = option(None, doc="folder within a hub data set")
    revision: str | None = option(None, doc="branch, tag or commit of a hub data set")
    format: str | None = option(None, doc="which known data set the rows are; `columns`: none; null: recognised")
    columns: Any = option(None, doc="part -> column, where names do not tell: {prompt: task, chosen: good}")
    winner: Any = option(None, doc="how a row says which answer won: a column, or a mapping")
    axis: str | None = option(None, doc="what answers are compared by, where a data set has several")
    transcripts: Literal["text", "messages"] = option("text", doc="`Human:`/`Assistant:` transcripts stay text or not")
    chat: bool | None = option(None, doc="plain prompts are what a user says; null: by data set, else no")
    ties: Literal["drop", "keep"] | None = option(None, doc="null: drop, unless the method reads ties")
    diverging: Literal["keep", "drop"] = option("keep", doc="answers that part before their last turn")
    filters: Any = option(None, doc="column -> condition for rows to keep (`>= 8`), or `recommended`")
    max_rows: int | None = option(None, at_least=1, doc="rows read, from the first; null: all")
    weight: float = option(1.0, above=0, doc="share of the stream in the mixture; all 1: streams are joined")
    only: str | None = option(None, doc="JSON file with the ids of the rows to read, as errors name them")
    where: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and how it becomes tokens."""

    train: tuple[Stream, ...] = ()
    prompts: tuple[Stream, ...] = ()
    eval: tuple[Stream, ...] = ()
    score: Literal["last", "all"] | None = option(None, doc="assistant turns that count; null: by the method's view")
    chat_template: str = option("model", doc="`model`, or the path of a Jinja file")
    max_length: int = option(2048, at_least=2, doc="tokens of prompt and completion together")
    truncation: Literal["drop", "cut_prompt", "cut_completion"] = option("drop", doc="what becomes of longer rows")
    pairs: Literal["best_worst", "all", "adjacent"] = option("best_worst", doc="pairs out of more than two answers")
    max_bad_fraction: float = option(0.01, at_least=0, at_most=1, doc="share of bad rows above which a run stops")
    shuffle: bool = option(True, doc="mix the rows of every epoch; false: file order")

    @property
    def trained(self) -> tuple[Stream, ...]:
        """The streams of an epoch: `train`, or `prompts` of a method that samples its own answers."""
        return self.train or self.prompts


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where the reference's log-probabilities come from."""

    kind: Literal["auto", "frozen", "adapter_off", "cached", "ema"] = option("auto", doc="auto: by adapter")
    model: str | None = option(None, doc="hub id or folder; null: the starting policy")
    guide: str | None = option(None, doc="hub id or folder of a second frozen policy, for `tgdpo` or `brain`")
    previous: str | None = option(
        None, doc="hub id or folder of the last round's policy, for `inpo` or `alpha_spin`; null: the starting one"
    )
    cache_dir: str | None = option(None, doc="folder of cached log-probabilities, with `kind: cached`")
    decay: float = option(0.6, above=0, at_most=1, doc="weight of the policy in a refresh, with `kind: ema`")
    every: int = option(512, at_least=1, doc="optimiser steps between refreshes, with `kind: ema`")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The run."""

    output_dir: str = option(doc="folder of the run")
    learning_rate: float | None = option(None, above=0, doc="peak; null: by method and adapter kind")
    global_batch_size: int = option(64, at_least=1, doc="units of the method (pairs, ...) a step, over all ranks")
    num_train_epochs: float = option(1.0, above=0, doc="passes over the data")
    max_steps: int | None = option(None, at_least=1, doc="optimiser steps, instead of epochs")
    warmup_steps: float = option(0.1, at_least=0, doc="steps (>= 1) or share of the run (< 1) of warm-up")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"] = (
        option("linear", doc="the learning rate's course")
    )
    weight_decay: float = option(0.0, at_least=0, doc="decoupled weight decay")
    max_grad_norm: float = option(1.0, at_least=0, doc="clip norm; 0: no clipping")
    optim: str = option("adamw_torch", doc="an optimiser of transformers")
    seed: int = option(42, at_least=0, doc="seed of everything random")
    tokens_per_micro_batch: int | None = option(None, at_least=1, doc="memory budget; null: by device")
    value_learning_rate: float | None = option(None, above=0, doc="of a value role; null: the policy's")
    value_max_grad_norm: float | None = option(None, above=0, doc="own clip norm of a value role")
    logging_steps: float = option(10.0, above=0, doc="steps (>= 1) or share of the run (< 1) between log lines")
    save_steps: float = option(500.0, above=0, doc="steps (>= 1) or share of the run (< 1) between checkpoints")
    save_total_limit: int | None = option(2, at_least=1, doc="checkpoints kept; null: all")
    resume: str = option("auto", doc="auto, never, or a checkpoint folder")
    report_to: Literal["none", "wandb", "tensorboard", "mlflow", "trackio", "swanlab", "comet_ml", "clearml"] = option(
        "none", doc="where metrics go besides the run's own log"
    )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation on held-out rows."""

    every: float | None = option(0.1, above=0, doc="steps (>= 1) or share of the run (< 1) between evaluations")
    best: str | None = option(None, doc="metric that names the best checkpoint; of equals the later")
    patience: int | None = option(None, at_least=1, doc="evaluations without a better one before the run stops")


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Several trainings of one policy, each on the data that the one before chose and made.

    `sera` (arXiv 2410.09362): from the second round on, the offline pairs of largest margin under the last policy, and
    pairs of its own samples. Every round starts from the last policy; the reference stays the initial one.
    """

    kind: Literal["sera"] = option("sera", doc="how data are chosen")
    count: int = option(3, at_least=2, doc="rounds; the first trains on everything")
    keep: float = option(0.7, above=0, at_most=1, doc="share of the offline pairs that is kept; published 0.5 to 0.8")
    bootstrap: float = option(0.3, at_least=0, doc="own pairs added, as a share of the offline pairs kept")
    samples: int = option(4, at_least=2, doc="samples a prompt, R")
    ensemble: float = option(0.3, at_least=0, at_most=1, doc="weight g of the margins of the round before the last")
    per_token: bool = option(False, doc="log-ratios as means over tokens instead of sums")
    max_new_tokens: int = option(256, at_least=1, doc="tokens of a sample, its end token included")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What an online method samples before its steps."""

    prompts: int | None = option(None, at_least=1, doc="prompts of a batch of rollouts; null: a step's x minibatches")
    epochs: int = option(1, at_least=1, doc="passes over a batch of rollouts")
    minibatches: int = option(1, at_least=1, doc="optimiser steps of one pass")
    keep: Literal["none", "last", "all"] = option("none", doc="rollouts kept in the run's folder")
    redraws: int = option(0, at_least=0, doc="times that prompts are drawn again in place of filtered groups")
    max_new_tokens: int = option(256, at_least=1, doc="tokens of a completion, its end token included")
    temperature: float = option(1.0, above=0, doc="of sampling; log-probs are taken at it too")
    top_p: float = option(1.0, above=0, at_most=1, doc="smallest set of tokens with this much probability; 1: all")
    top_k: int = option(0, at_least=0, doc="so many likeliest tokens; 0: all")
    eval_prompts: int = option(256, at_least=1, doc="held-out prompts of an evaluation, at most")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the numbers of a recipe come from. Read by people."""

    paper: str = option("", doc="arXiv number or address")
    claim: str = option("", doc="what the source reports")
    checked: str = option("", doc="what was checked here")


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """The method's id (or `my_pkg.my_file:MyMethod`) and all its options, by public name."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run, checked, with every default filled in."""

    model: Model
    method: MethodChoice
    data: Data
    train: Train
    reference: Reference = field(default_factory=Reference)
    eval: Eval = field(default_factory=Eval)
    provenance: Provenance = field(default_factory=Provenance)
    rounds: Rounds | None = None
    rollout: Rollout | None = None
    sampler: SamplerSpec | None = None
    feedback: tuple[FeedbackSpec, ...] = ()
    shaping: tuple[Mapping[str, Any], ...] = ()
    health: HealthOptions | None = None
