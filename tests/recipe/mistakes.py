"""Users' mistakes: each breaks one thing of a run that would work, and says what the error must name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from align.cli.main import main
from align.testing.tiny import random_pairs, tiny_tokenizer

GOOD = random_pairs(12, seed=5)


class Case:
    """A run that would work; cases break one thing each."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.rows: list[Any] = [dict(row) for row in GOOD]
        self.lines: list[str] | None = None
        self.recipe: dict[str, Any] = {
            "model": {"name": str(model)},
            "method": {"name": "dpo", "beta": 0.1},
            "data": {"train": [str(folder / "rows.jsonl")], "max_length": 200, "max_bad_fraction": 0.0},
            "train": {
                "learning_rate": 1e-4,
                "global_batch_size": 4,
                "max_steps": 2,
                "save_steps": 1,
                "output_dir": str(folder / "out"),
            },
        }
        self.text: str | None = None
        self.words: list[str] = []

    def copy_model(self) -> Path:
        copied = self.folder / "model"
        shutil.copytree(self.model, copied)
        self.recipe["model"]["name"] = str(copied)
        return copied

    def run(self) -> int:
        lines = [json.dumps(row) for row in self.rows] if self.lines is None else self.lines
        (self.folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe) if self.text is None else self.text)
        return main(["train", str(path), *self.words])


def each(change: Callable[[dict], None]) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        for row in case.rows:
            change(row)

    return apply


def one(change: Callable[[dict], None]) -> Callable[[Case], None]:
    return lambda case: change(case.rows[3])


def setting(path: str, value: Any) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        *parents, last = path.split(".")
        section: dict = case.recipe
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value

    return apply


def broken_line(case: Case) -> None:
    case.lines = [json.dumps(row) for row in case.rows]
    case.lines[3] = case.lines[3][:20]


def wrong_roles(row: dict) -> None:
    row["prompt"] = [{"role": "user", "content": "hello"}]
    row["chosen"] = [{"role": "user", "content": "I am the user"}]
    row["rejected"] = [{"role": "assistant", "content": "no"}]


def conversational(row: dict) -> None:
    for key in ("prompt", "chosen", "rejected"):
        row[key] = [{"role": "user" if key == "prompt" else "assistant", "content": row[key]}]


def without_template(case: Case) -> None:
    each(conversational)(case)
    folder = case.copy_model()
    tiny_tokenizer(chat_template=False).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def without_eos(case: Case) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    folder = case.copy_model()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def pickled(case: Case) -> None:
    folder = case.copy_model()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def foreign_output(case: Case) -> None:
    out = case.folder / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")


def encoder_decoder(case: Case) -> None:
    folder = case.copy_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5"], "is_encoder_decoder": True})
    )
    assert config


def truncated_checkpoint(case: Case) -> None:
    assert case.run() == 0
    for name in ("checkpoint-1", "checkpoint-2"):
        file = case.folder / "out" / name / "policy" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])


def another_recipe(case: Case) -> None:
    assert case.run() == 0
    case.recipe["method"]["beta"] = 0.3


def words(*given: str) -> Callable[[Case], None]:
    return lambda case: setattr(case, "words", list(given))


def over(base: str, top: str) -> Callable[[Case], None]:
    """The recipe is `top`, beside a file `base.yaml`; `{good}` stands for the recipe that would work."""

    def apply(case: Case) -> None:
        good = yaml.safe_dump(case.recipe)
        (case.folder / "base.yaml").write_text(base.replace("{good}", good))
        case.text = top

    return apply


def stream(**options: Any) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        case.recipe["data"]["train"] = [{"name": str(case.folder / "rows.jsonl"), **options}]

    return apply


def quantized(**changes: Any) -> Callable[[Case], None]:
    def apply(case: Case) -> None:
        section: dict[str, Any] = {"load_in_4bit": True, **changes.pop("quantization", {})}
        case.recipe["model"] |= {"peft": {"r": 4}, "quantization": section, **changes}

    return apply


CASES: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {
    "missing column": (each(lambda row: row.pop("rejected")), ("rejected", "winner")),
    "ambiguous direction": (
        lambda case: setattr(
            case, "rows", [{"prompt": r["prompt"], "a": r["chosen"], "b": r["rejected"], "score": 1} for r in case.rows]
        ),
        ("score", "winner"),
    ),
    "empty completion": (one(lambda row: row.update(chosen="  ")), ("rows.jsonl:4", "chosen", "max_bad_fraction")),
    "identical completions": (one(lambda row: row.update(chosen=row["rejected"])), ("rows.jsonl:4", "identical")),
    "non-string content": (one(lambda row: row.update(chosen=5)), ("rows.jsonl:4", "chosen")),
    "null content": (one(lambda row: row.update(prompt=None)), ("rows.jsonl:4", "prompt")),
    "broken JSON line": (broken_line, ("rows.jsonl:4", "JSON")),
    "a row that is no object": (lambda case: case.rows.__setitem__(3, [1, 2]), ("rows.jsonl:4",)),
    "wrong role order": (lambda case: (each(conversational)(case), wrong_roles(case.rows[3])), ("rows.jsonl:4",)),
    "a missing value in one row": (one(lambda row: row.pop("chosen")), ("rows.jsonl:4", "chosen")),
    "no rows": (lambda case: setattr(case, "lines", [""]), ("rows.jsonl",)),
    "data file missing": (setting("data.train", ["nowhere.jsonl"]), ("nowhere.jsonl",)),
    "all prompts too long": (setting("data.max_length", 8), ("max_length",)),
    "labels for a pair method": (
        lambda case: setattr(
            case, "rows", [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in case.rows]
        ),
        ("better", "label", "winner"),
    ),
    "a label that is no label": (
        lambda case: (
            setattr(
                case,
                "rows",
                [
                    {"prompt": r["prompt"], "completion": r["chosen"], "label": n % 2 == 0}
                    for n, r in enumerate(case.rows)
                ],
            ),
            case.rows[3].update(label="perhaps"),
            case.recipe.update(method={"name": "kto"}),
        ),
        ("rows.jsonl", "label", "perhaps"),
    ),
    "tokenizer without EOS": (without_eos, ("EOS", "eos_token")),
    "tokenizer without chat template": (without_template, ("chat template",)),
    "model folder missing": (setting("model.name", "./no/such/model"), ("no/such/model",)),
    "model folder without a config": (lambda case: (case.copy_model() / "config.json").unlink(), ("config.json",)),
    "pickled weights": (pickled, ("pickle", "safetensors")),
    "encoder-decoder model": (encoder_decoder, ("encoder-decoder",)),
    "truncated checkpoints": (truncated_checkpoint, ("checkpoint",)),
    "misspelt section": (lambda case: case.recipe.update(trian=case.recipe.pop("train")), ("trian", "train")),
    "misspelt option": (setting("train.learning_rat", 1e-4), ("learning_rat", "learning_rate", "recipe.yaml:")),
    "unknown method": (setting("method.name", "smpo_dpo"), ("smpo_dpo",)),
    "another library's name of a method": (setting("method.name", "sigmoid"), ("sigmoid", "dpo")),
    "value out of range": (setting("method.beta", -0.1), ("beta", "-0.1", "> 0", "recipe.yaml:")),
    "value of another type": (setting("train.global_batch_size", "many"), ("global_batch_size", "many")),
    "unused option of the method": (setting("method.gamma_ratio", 0.5), ("gamma_ratio", "recipe.yaml:")),
    "reference for a method without one": (
        lambda case: case.recipe.update(method={"name": "simpo"}, reference={"kind": "frozen"}),
        ("reference",),
    ),
    "best metric without evaluation": (setting("eval.best", "accuracy"), ("eval",)),
    "patience without a metric": (setting("eval.patience", 2), ("patience",)),
    "adapter_off without an adapter": (setting("reference.kind", "adapter_off"), ("adapter",)),
    "no YAML": (lambda case: setattr(case, "text", "model: [unclosed"), ("recipe.yaml",)),
    "a key twice": (
        lambda case: setattr(case, "text", "model: {name: a}\nmodel: {name: b}\n"),
        ("recipe.yaml:2", "model"),
    ),
    "an output folder of somebody else": (foreign_output, ("out",)),
    "another recipe in the same folder": (another_recipe, ("beta",)),
    # -- one recipe over another
    "a base that is not there": (over("{good}", "extends: bass.yaml\n"), ("recipe.yaml:1", "bass.yaml", "`base.yaml`")),
    "an unknown shipped recipe": (over("", "extends: mistral-7b/dpq\n"), ("recipe.yaml:1", "`mistral-7b/dpo`")),
    "a circle of bases": (over("extends: recipe.yaml\n", "\nextends: base.yaml\n"), ("base.yaml:1", "circle", "->")),
    "two bases": (over("{good}", "extends: [base.yaml, other.yaml]\n"), ("recipe.yaml:1", "a base may extend another")),
    "a fault in the base": (over("model: {nmae: x}\n{good}", "extends: base.yaml\n"), ("base.yaml:", "model", "twice")),
    "a value in the base that is out of range": (
        over("model: {name: a/b}\ntrain: {seed: -1}\n", "extends: base.yaml\nmethod: dpo\n"),
        ("base.yaml:2", "seed", "-1", ">= 0", "`data` is missing"),
    ),
    "a base as an override": (words("extends=base.yaml"), ("command line", "extends", "top of the recipe")),
    # -- overrides
    "an override that is a word": (words("nonsense"), ("command line", "`nonsense`", "key.option=value")),
    "an override of an unknown option": (
        words("train.learning_rat=1e-6"),
        ("argument train.learning_rat=1e-6", "did you mean `learning_rate`"),
    ),
    "an override out of range": (words("--method.beta", "-1"), ("argument method.beta=-1", "> 0")),
    "an override of an entry that is not there": (words("data.train.7.split=x"), ("a list of 1 has no `7`", "below")),
    "an override that is no YAML": (words("method.beta=["), ("argument method.beta=[", "YAML")),
    # -- quantisation
    "4 bits without an adapter": (
        lambda case: case.recipe["model"].update(quantization={"load_in_4bit": True}),
        ("recipe.yaml:", "`model.quantization` without `model.peft`", "no gradient", "add `model.peft"),
    ),
    "8 bits": (quantized(quantization={"load_in_8bit": True}), ("recipe.yaml:", "load_in_8bit", "outliers", "4bit")),
    "a short name of the quantisation": (
        quantized(quantization={"type": "nf4"}),
        ("recipe.yaml:", "no option `type`", "`bnb_4bit_quant_type`"),
    ),
    "an unknown quantisation": (
        quantized(quantization={"bnb_4bit_quant_type": "nf3"}),
        ("recipe.yaml:", "nf3", "'nf4', 'fp4'"),
    ),
    "its own compute dtype": (
        quantized(quantization={"bnb_4bit_compute_dtype": "float16"}),
        ("recipe.yaml:", "bnb_4bit_compute_dtype", "`model.dtype`"),
    ),
    "trained biases over 4 bits": (
        quantized(peft={"r": 4, "bias": "all"}),
        ("recipe.yaml:", "bias: all", "cannot be trained", "bias: none"),
    ),
    "a moving reference over 4 bits": (
        lambda case: (quantized()(case), case.recipe.update(reference={"kind": "ema"})),
        ("recipe.yaml:", "kind: ema", "do not move", "adapter_off"),
    ),
    # -- streams
    "a misspelt option of a stream": (stream(splitt="train"), ("recipe.yaml:", "`splitt`", "did you mean `split`")),
    "a weight of nothing": (stream(weight=0), ("recipe.yaml:", "weight", "> 0")),
    "a winner that is no rule": (stream(winner={"best": "a"}), ("recipe.yaml:", "winner", "{chosen: COLUMN")),
    "an unknown format": (stream(format="nectarr"), ("recipe.yaml:", "nectarr", "nectar")),
    "a part that there is not": (stream(columns={"promt": "prompt"}), ("recipe.yaml:", "promt", "prompt")),
    "a column that there is not": (stream(columns={"prompt": "task"}), ("task",)),
    "a hub option for a file": (stream(revision="main"), ("recipe.yaml:", "revision", "no hub id", "remove it")),
    # -- options of elsewhere, and of other libraries
    "an option of the trainer's": (
        setting("train.gradient_accumulation_steps", 4),
        ("recipe.yaml:", "global_batch_size"),
    ),
    "warmup_ratio": (setting("train.warmup_ratio", 0.1), ("recipe.yaml:", "warmup_ratio", "warmup_steps")),
    "epochs and steps": (setting("train.num_train_epochs", 2), ("recipe.yaml:", "num_train_epochs", "max_steps")),
    "a tool that is not installed": (setting("train.report_to", "swanlab"), ("recipe.yaml:", "swanlab", "pip install")),
    "an optimiser that there is not": (
        setting("train.optim", "adamw_torhc"),
        ("recipe.yaml:", "adamw_torhc", "did you mean `adamw_torch`"),
    ),
}
