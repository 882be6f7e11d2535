"""A TRL configuration as a recipe, with a word on every key: what it became, or why there is nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import AlignError, ConfigError, raise_all, suggestion
from align.recipe import document, schema
from align.recipe.document import Item
from align.recipe.trl_data import streams_of
from align.recipe.trl_keys import FORMER, NOT_NEEDED, REFUSED, STRAIGHT, method_of, refuse_online, trainer_of


@dataclass(frozen=True)
class Note:
    """What became of a key. `became` is the option it set, empty where it set none; `line` is 0 for a default."""

    key: str
    value: Any
    line: int
    became: str
    says: str

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else "TRL's default"
        arrow = f" -> {self.became}" if self.became else ""
        return f"{place}: {self.key}: {self.value!r}{arrow}" + (f" ({self.says})" if self.says else "")


@dataclass
class Converted:
    """A recipe as nested values and as text, and what became of each key."""

    trainer: str
    recipe: dict[str, Any]
    text: str
    notes: list[Note]


def convert(path: str | Path, trainer: str | None = None, processes: int | None = None) -> Converted:
    """Read the flat YAML of TRL's scripts and write a recipe that trains the same objective on the same data.

    Where TRL's default differs from that of `align`, TRL's is written out, so that an option which the file does not
    name keeps its meaning.

    Args:
        trainer: `dpo`, `kto`, `sft`, `cpo`, `orpo` or `bco`; by the keys of the file where they tell.
        processes: how many processes it was launched with; they multiply the batch.

    Raises:
        ConfigError: a file that is not such a configuration, or one of a trainer that samples; options that change the
            objective and have no counterpart, all at once.
    """
    root = document.read(path)
    env = root.value.pop("env", None)
    refuse_online(root, trainer, Path(path))
    kind = trainer or trainer_of(root, Path(path))
    work = _Work(root, kind, str(path), processes)
    if env is not None:
        work.say("env", env, "", "environment variables are set in the shell")
    work.all()
    raise_all(work.errors)
    text = _text(work.recipe, Path(path).name, kind)
    _check(work, text, str(path))
    return Converted(kind, work.recipe, text, work.notes)


def _text(recipe: Mapping[str, Any], name: str, kind: str) -> str:
    order = ("model", "method", "data", "reference", "train", "eval")
    plain = {key: recipe[key] for key in order if recipe.get(key)}
    return f"# From {name}, a configuration of TRL's {kind.upper()}Trainer.\n" + yaml.safe_dump(
        plain, sort_keys=False, allow_unicode=True
    )


def _check(work: _Work, text: str, path: str) -> None:
    """The recipe must load. What this machine lacks (a folder, a package) is said, and no reason not to convert."""
    try:
        schema.build(document.parse(text, f"the recipe from {path}", numbered=False))
    except ConfigError as error:
        for one in getattr(error, "errors", (error,)):
            work.notes.append(Note("(the recipe)", None, 0, "", f"does not load here yet: {one.what}; {one.mend}"))


@dataclass
class _Work:
    """One conversion: keys are taken out of `left` as they are understood."""

    root: Item
    trainer: str
    path: str
    processes: int | None
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    errors: list[AlignError] = field(default_factory=list)

    def __post_init__(self) -> None:
        from align.compat.trl_configs import options_of

        self.given: dict[str, Item] = dict(self.root.value)
        self.defaults = options_of(self.trainer)
        self.done: set[str] = set()

    def all(self) -> None:
        self.unknown()
        self.method()
        self.model()
        self.data()
        self.batch()
        self.schedule()
        self.evaluation()
        self.reference()
        self.rest()

    # -- small words ------------------------------------------------------------------------------------------------

    def value(self, key: str) -> Any:
        """What the file says, or TRL's default; the key is then done."""
        self.done.add(key)
        return self.given[key].plain() if key in self.given else self.defaults.get(key)

    def set(self, key: str, became: str, value: Any, says: str = "") -> None:
        """Write an option, and say from which key."""
        section, _, name = became.partition(".")
        owner = self.recipe.setdefault(section, {})
        *parents, last = name.split(".")
        for parent in parents:
            owner = owner.setdefault(parent, {})
        owner[last] = value
        self.done.add(key)
        item = self.given.get(key)
        plain = item.plain() if item is not None else self.defaults.get(key)
        self.notes.append(Note(key, plain, _line(item), became, says))

    def say(self, key: str, item: Item | None, became: str, says: str) -> None:
        self.done.add(key)
        plain = item.plain() if item is not None else self.defaults.get(key)
        self.notes.append(Note(key, plain, _line(item), became, says))

    def fault(self, key: str, what: str, why: str = "", mend: str = "") -> None:
        self.done.add(key)
        where = self.given[key].where if key in self.given else self.path
        self.errors.append(ConfigError(what, where=where, why=why, mend=mend))

    # -- sections ---------------------------------------------------------------------------------------------------

    def unknown(self) -> None:
        for key, item in self.given.items():
            if key not in self.defaults and key not in FORMER:
                self.fault(
                    key,
                    f"TRL's {self.trainer.upper()}Config, ModelConfig and ScriptArguments have no `{key}`",
                    mend=suggestion(key, [*self.defaults, *FORMER]),
                )
            elif item.value is None and self.defaults.get(key) is not None:
                self.done.add(key)

    def method(self) -> None:
        method_of(self)

    def model(self) -> None:
        name = self.value("model_name_or_path")
        if not name:
            self.fault("model_name_or_path", "`model_name_or_path` is missing", mend="add it")
        else:
            self.set("model_name_or_path", "model.name", name)
        revision = self.value("model_revision")
        if revision not in (None, "main"):
            self.set("model_revision", "model.revision", revision)
        self.dtype()
        if self.value("gradient_checkpointing"):
            self.set("gradient_checkpointing", "model.gradient_checkpointing", True)
        if self.value("trust_remote_code"):
            self.set("trust_remote_code", "model.trust_remote_code", True)
        self.adapter()

    def dtype(self) -> None:
        """TRL's `bf16` is autocast over weights of `dtype`; `model.dtype` is compute, trained weights being float32."""
        half = self.value("bf16")
        weights = self.value("dtype")
        if "torch_dtype" in self.given:
            weights = self.value("torch_dtype")
            self.say("torch_dtype", self.given["torch_dtype"], "model.dtype", "the former name of `dtype`")
        if self.value("fp16") or weights in ("float16", "half"):
            key = "fp16" if "fp16" in self.given else "dtype" if "dtype" in self.given else "torch_dtype"
            self.fault(key, "float16 is not supported", mend="write `bf16: true`, or float32")
            return
        low = half is not False or weights == "bfloat16"
        says = "compute; trained weights and the optimiser are float32"
        self.set("bf16", "model.dtype", "bfloat16" if low else "float32", says)
        if "dtype" in self.given:
            self.say("dtype", self.given["dtype"], "model.dtype", says)

    def adapter(self) -> None:
        four, eight = self.value("load_in_4bit"), self.value("load_in_8bit")
        if eight:
            why = "LLM.int8 looks for outliers in the whole batch, so a log-probability would depend on its neighbours"
            self.fault("load_in_8bit", "8-bit weights have no counterpart", why, "use `load_in_4bit`")
        if not self.value("use_peft"):
            if four:
                self.fault("load_in_4bit", "`load_in_4bit` without `use_peft`", mend="add `use_peft: true`")
            for key in [key for key in self.given if key.startswith(("lora_", "use_rslora", "bnb_", "use_bnb"))]:
                self.say(key, self.given[key], "", "unused: `use_peft` is off")
            return
        self.say("use_peft", self.given.get("use_peft"), "model.peft", "")
        for key, name in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
            self.set(key, f"model.peft.{name}", self.value(key))
        modules = self.value("lora_target_modules")
        if modules is None:
            self.set("lora_target_modules", "model.peft.target_modules", None, "PEFT's own list for the architecture")
        else:
            one = modules[0] if isinstance(modules, list) and modules == ["all-linear"] else modules
            self.set("lora_target_modules", "model.peft.target_modules", one)
        if self.value("lora_modules_to_save"):
            self.set("lora_modules_to_save", "model.peft.modules_to_save", self.value("lora_modules_to_save"))
        if self.value("use_rslora"):
            self.set("use_rslora", "model.peft.use_rslora", True)
        if four and not eight:
            self.set("load_in_4bit", "model.quantization.load_in_4bit", True)
            kind = "model.quantization.bnb_4bit_quant_type"
            self.set("bnb_4bit_quant_type", kind, self.value("bnb_4bit_quant_type"))
            double = "model.quantization.bnb_4bit_use_double_quant"
            self.set("use_bnb_nested_quant", double, bool(self.value("use_bnb_nested_quant")))

    def data(self) -> None:
        evaluates = self.value("eval_strategy" if "eval_strategy" in self.given else "evaluation_strategy") not in (
            None,
            "no",
            False,
        )
        mixture = self.value("datasets")
        if mixture:
            self.mixture(mixture)
        else:
            name = self.value("dataset_name")
            if not name:
                self.fault("dataset_name", "`dataset_name` is missing", mend="add it, or `datasets:`")
                return
            stream: dict[str, Any] = {"name": name}
            if self.value("dataset_config"):
                stream["config"] = self.value("dataset_config")
                self.say("dataset_config", self.given["dataset_config"], "data.train", "`config` of the stream")
            split = self.value("dataset_train_split")
            self.set("dataset_name", "data.train", [{**stream, "split": split}])
            self.say(
                "dataset_train_split", self.given.get("dataset_train_split"), "data.train", "`split` of the stream"
            )
            if evaluates:
                self.set("dataset_test_split", "data.eval", [{**stream, "split": self.value("dataset_test_split")}])
        length = self.value("max_length")
        if length is None:
            self.fault("max_length", "`max_length` is null", why="rows have a limit here", mend="write a large number")
        else:
            says = "longer rows are dropped and counted, not cut: see `data.truncation`"
            self.set("max_length", "data.max_length", length, says)

    def mixture(self, mixture: Any) -> None:
        streams: list[dict[str, Any]] = []
        for entry in mixture if isinstance(mixture, list) else ():
            if not isinstance(entry, dict) or not entry.get("path"):
                self.fault("datasets", f"an entry of `datasets` is {entry!r}", mend="give `path:`")
                return
            try:
                streams += streams_of(entry)
            except ConfigError as error:
                self.fault("datasets", error.what, error.why, error.mend)
            if entry.get("columns"):
                says = f"`columns` of `{entry['path']}`: columns that nothing reads are left out"
                self.say("datasets", self.given.get("datasets"), "data.train", says)
        self.set("datasets", "data.train", streams, "joined, as TRL joins them")
        if self.value("test_split_size"):
            self.fault(
                "test_split_size",
                "`test_split_size` has no counterpart",
                why="a split that is cut at the start of a run changes with the rows",
                mend="name a held-out split or file in `data.eval`",
            )

    def batch(self) -> None:
        device, steps = self.value("per_device_train_batch_size"), self.value("gradient_accumulation_steps")
        count = self.processes or 1
        said = f"{device} a device x {steps} accumulated x {count} process" + ("es" if count > 1 else "")
        if self.processes is None:
            said += ", which is assumed: give --processes"
        self.set("per_device_train_batch_size", "train.global_batch_size", int(device) * int(steps) * count, said)
        if "gradient_accumulation_steps" in self.given:
            item = self.given["gradient_accumulation_steps"]
            self.say("gradient_accumulation_steps", item, "train.global_batch_size", "in the product above")
        self.done.add("gradient_accumulation_steps")

    def schedule(self) -> None:
        self.set("output_dir", "train.output_dir", self.value("output_dir") or f"runs/{Path(self.path).stem}")
        self.set("learning_rate", "train.learning_rate", float(self.value("learning_rate")))
        limit = self.value("max_steps")
        if isinstance(limit, int) and limit > 0:
            self.set("max_steps", "train.max_steps", limit)
            self.done.add("num_train_epochs")
        else:
            self.set("num_train_epochs", "train.num_train_epochs", float(self.value("num_train_epochs")))
        kind = str(self.value("lr_scheduler_type"))
        self.set("lr_scheduler_type", "train.lr_scheduler_type", kind)
        ratio = self.value("warmup_ratio") if "warmup_ratio" in self.given else None
        steps = self.value("warmup_steps")
        if kind == "constant":
            self.done |= {"warmup_ratio", "warmup_steps"}
        elif ratio and not steps:
            self.set("warmup_ratio", "train.warmup_steps", float(ratio), "a share of the run below 1")
        else:
            self.set("warmup_steps", "train.warmup_steps", float(steps or 0))
        saving = self.value("save_strategy")
        if saving == "epoch":
            self.set("save_strategy", "train.save_steps", self._epoch_share(), "once an epoch, as a share of the run")
            self.done.add("save_steps")
        elif "save_steps" in self.given:
            self.set("save_steps", "train.save_steps", float(self.value("save_steps")))
        if "save_strategy" in self.given and saving != "epoch":
            says = "" if saving == "steps" else "checkpoints are always written; `train.save_total_limit` bounds them"
            self.say("save_strategy", self.given["save_strategy"], "", says)
        tools = self.value("report_to")
        if "report_to" in self.given:
            names = tools if isinstance(tools, list) else [tools]
            says = "" if len(names) < 2 else "the first of them: one place, besides the run's own log"
            self.set("report_to", "train.report_to", names[0] if names else "none", says)

    def _epoch_share(self) -> float:
        return min(0.99, round(1.0 / float(self.value("num_train_epochs") or 1), 4))

    def evaluation(self) -> None:
        key = "eval_strategy" if "eval_strategy" in self.given else "evaluation_strategy"
        when = self.value(key)
        if when in (None, "no", False) or "eval" not in self.recipe.get("data", {}):
            if "do_eval" in self.given:
                self.say(
                    "do_eval", self.given["do_eval"], "", "without `eval_strategy` TRL evaluates nothing in training"
                )
            if "eval_steps" in self.given:
                self.say("eval_steps", self.given["eval_steps"], "", "unused: `eval_strategy` is off")
            if key in self.given:
                self.say(key, self.given[key], "", "no evaluation")
            return
        steps = self._epoch_share() if when == "epoch" else self.value("eval_steps") or self.value("logging_steps")
        self.set("eval_steps", "eval.every", float(steps))
        if self.value("load_best_model_at_end"):
            metric = str(self.value("metric_for_best_model") or "loss").removeprefix("eval_")
            best = {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}.get(metric, metric)
            self.set("metric_for_best_model", "eval.best", best, "the best checkpoint is what the run leaves")
        self.say(key, self.given.get(key), "eval.every", "")
        self.done.add("do_eval")

    def reference(self) -> None:
        if self.value("sync_ref_model"):
            self.set("sync_ref_model", "reference.kind", "ema")
            self.set("ref_model_mixup_alpha", "reference.decay", float(self.value("ref_model_mixup_alpha")))
            self.set("ref_model_sync_steps", "reference.every", int(self.value("ref_model_sync_steps")))
        elif self.value("precompute_ref_log_probs"):
            self.set("precompute_ref_log_probs", "reference.kind", "cached", "filled while it trains, kept on disk")

    def rest(self) -> None:
        for key, item in self.given.items():
            if key in self.done:
                continue
            value, default = item.plain(), self.defaults.get(key)
            if value == default:
                self.say(key, item, "", "TRL's default")
            elif key in STRAIGHT:
                convert_value: Callable[[Any], Any] = STRAIGHT[key][1]
                self.set(key, STRAIGHT[key][0], convert_value(value))
            elif key in REFUSED:
                self.fault(key, f"`{key}: {value}` has no counterpart", *REFUSED[key])
            elif key in NOT_NEEDED or key in FORMER:
                self.say(key, item, "", NOT_NEEDED[key] if key in NOT_NEEDED else FORMER[key])
            else:
                self.say(key, item, "", "has no counterpart; it does not change what is trained on, but look at it")


def _line(item: Item | None) -> int:
    tail = item.where.rpartition(":")[2] if item is not None else ""
    return int(tail) if tail.isdecimal() else 0
