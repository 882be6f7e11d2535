"""TRL configurations as recipes: what each key becomes, what is refused, and that the result loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.core.errors import ConfigError, ErrorList
from align.data.sources import open_source
from align.recipe import schema
from align.recipe.from_trl import Converted, convert

COMMON = "model_name_or_path: Qwen/Qwen2-0.5B-Instruct\ndataset_name: a/b\noutput_dir: out\n"
DPO = """\
model_name_or_path: alignment-handbook/zephyr-7b-sft-full
attn_implementation: flash_attention_2
dataset_name: HuggingFaceH4/ultrafeedback_binarized
dataset_train_split: train_prefs
dataset_test_split: test_prefs
bf16: true
loss_type: sigmoid
beta: 0.01
eval_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
per_device_train_batch_size: 8
learning_rate: 5.0e-7
lr_scheduler_type: cosine
warmup_ratio: 0.1
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_torch
output_dir: data/zephyr-7b-dpo-full
push_to_hub: true
save_strategy: steps
save_steps: 50
"""


def made(folder: Path, text: str, name: str = "config", **options: Any) -> Converted:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    found = convert(path, **options)
    recipe = folder / f"{name}-recipe.yaml"
    recipe.write_text(found.text)
    loaded = schema.load(recipe)
    assert loaded.method.name == found.recipe["method"]["name"]
    return found


def faults(folder: Path, text: str, **options: Any) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        convert(path, **options)
    error = caught.value
    return [str(one) for one in (error.errors if isinstance(error, ErrorList) else (error,))]


def test_dpo(tmp_path: Path) -> None:
    found = made(tmp_path, DPO, trainer="dpo", processes=8)
    assert found.recipe["model"] == {
        "name": "alignment-handbook/zephyr-7b-sft-full",
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
    }
    assert found.recipe["method"] == {"name": "dpo", "beta": 0.01}
    assert found.recipe["data"] == {
        "train": [{"name": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}],
        "eval": [{"name": "HuggingFaceH4/ultrafeedback_binarized", "split": "test_prefs"}],
        "max_length": 1024,
    }
    train = found.recipe["train"]
    assert (train["learning_rate"], train["global_batch_size"], train["warmup_steps"]) == (5e-7, 128, 0.1)
    assert (train["num_train_epochs"], train["lr_scheduler_type"], train["save_steps"]) == (1, "cosine", 50)
    assert found.recipe["eval"] == {"every": 100}
    said = {note.key: note for note in found.notes}
    assert set(yaml.safe_load(DPO)) <= set(said)  # every key is accounted for
    assert said["attn_implementation"].became == "" and "model.backend" in said["attn_implementation"].says
    assert said["beta"].line == 8 and said["max_prompt_length"].became == ""
    assert "8 a device x 2 accumulated x 8 processes" in said["per_device_train_batch_size"].says


def test_defaults_of_trl_that_differ_are_written_out(tmp_path: Path) -> None:
    from trl import DPOConfig

    found = made(tmp_path, COMMON, trainer="dpo")
    theirs = DPOConfig(output_dir=str(tmp_path / "o"), bf16=False)
    train = found.recipe["train"]
    assert train["learning_rate"] == theirs.learning_rate
    assert train["num_train_epochs"] == theirs.num_train_epochs
    assert train["global_batch_size"] == theirs.per_device_train_batch_size
    assert train["warmup_steps"] == theirs.warmup_steps and train["lr_scheduler_type"] == theirs.lr_scheduler_type
    assert found.recipe["data"]["max_length"] == theirs.max_length
    assert found.recipe["method"]["beta"] == theirs.beta
    assert "eval" not in found.recipe and "eval" not in found.recipe["data"]
    assert any("assumed" in note.says and "--processes" in note.says for note in found.notes)


def test_qlora(tmp_path: Path) -> None:
    adapter = "use_peft: true\nload_in_4bit: true\nlora_r: 128\nuse_bnb_nested_quant: true\n"
    adapter += "lora_target_modules: [all-linear]\n"
    found = made(tmp_path, COMMON + adapter, trainer="dpo")
    assert found.recipe["model"]["peft"] == {
        "r": 128,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert found.recipe["model"]["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    plain = made(tmp_path, COMMON + "use_peft: true\n", trainer="dpo").recipe["model"]
    assert plain["peft"]["target_modules"] is None and "quantization" not in plain  # PEFT's own list, as in TRL
    unused = made(tmp_path, COMMON + "lora_r: 8\n", trainer="dpo")
    assert "peft" not in unused.recipe["model"]
    assert next(note for note in unused.notes if note.key == "lora_r").says == "unused: `use_peft` is off"


@pytest.mark.parametrize(
    ("text", "trainer", "method"),
    [
        ("loss_type: ipo\nbeta: 0.3\n", None, {"name": "ipo", "tau": 0.3, "normalize": "token"}),
        ("loss_type: [sigmoid]\nbeta: 0.3\n", None, {"name": "dpo", "beta": 0.3}),
        ("loss_type: sigmoid\nlabel_smoothing: 0.1\n", None, {"name": "dpo", "beta": 0.1}),
        (
            "desirable_weight: 1.5\nbeta: 0.2\n",
            None,
            {"name": "kto", "beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 1.0},
        ),
        (
            "loss_type: simpo\nbeta: 2.5\nsimpo_gamma: 1.25\ncpo_alpha: 0\n",
            None,
            {"name": "simpo", "beta": 2.5, "gamma_ratio": 0.5, "sft_weight": 0.0},
        ),
        (
            "loss_type: simpo\nbeta: 2\nlabel_smoothing: 0.1\n",
            "cpo",
            {"name": "simpo", "beta": 2.0, "gamma_ratio": 0.25, "label_smoothing": 0.1, "sft_weight": 1.0},
        ),
        ("beta: 0.05\n", "orpo", {"name": "orpo", "lambda": 0.05}),
        ("min_density_ratio: 0.4\n", None, {"name": "bco", "beta": 0.1, "clip": [0.4, 10.0]}),
        ("packing: true\nassistant_only_loss: true\n", None, {"name": "sft"}),
        ("cpo_alpha: 0.5\n", None, {"name": "cpo", "beta": 0.1, "lambda": 0.5}),
        ("loss_type: alphapo\nbeta: 2\n", None, {"name": "simpo", "beta": 2.0, "gamma_ratio": 0.25, "sft_weight": 0.0}),
    ],
)
def test_objectives(tmp_path: Path, text: str, trainer: str | None, method: dict[str, Any]) -> None:
    found = made(tmp_path, COMMON + text, trainer=trainer)
    assert found.recipe["method"] == method
    if "assistant_only_loss" in text:
        assert found.recipe["data"]["score"] == "all"


def test_reference_schedule_and_rest(tmp_path: Path) -> None:
    text = COMMON + (
        "sync_ref_model: true\nref_model_mixup_alpha: 0.5\nref_model_sync_steps: 64\nmax_steps: 300\nwarmup_steps: 30\n"
        "eval_strategy: epoch\nnum_train_epochs: 4\nload_best_model_at_end: true\nreport_to: [none]\n"
        "metric_for_best_model: eval_rewards/accuracies\nseed: 7\nmax_grad_norm: 0.5\nweight_decay: 0.1\nbf16: false\n"
    )
    recipe = made(tmp_path, text, trainer="dpo").recipe
    assert recipe["reference"] == {"kind": "ema", "decay": 0.5, "every": 64}
    assert recipe["train"]["max_steps"] == 300 and "num_train_epochs" not in recipe["train"]
    assert recipe["train"]["warmup_steps"] == 30
    assert (recipe["train"]["seed"], recipe["train"]["max_grad_norm"], recipe["train"]["weight_decay"]) == (7, 0.5, 0.1)
    assert recipe["eval"] == {"every": 0.25, "best": "accuracy"} and recipe["model"]["dtype"] == "float32"
    cached = made(tmp_path, COMMON + "precompute_ref_log_probs: true\n", trainer="dpo").recipe
    assert cached["reference"] == {"kind": "cached"}


def test_mixtures(tmp_path: Path) -> None:
    text = "model_name_or_path: m/m\ndatasets:\n  - {path: a/b}\n  - {path: c/d, split: train_prefs}\n"
    recipe = made(tmp_path, text, trainer="dpo").recipe
    assert recipe["data"]["train"] == [{"name": "a/b", "split": "train"}, {"name": "c/d", "split": "train_prefs"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss_type: [sigmoid, bco_pair]\n", (":4: several losses at once: sigmoid, bco_pair", "`rpo`")),
        (
            "loss_type: [sigmoid, sft]\nld_alpha: 0.5\n",
            (":4: several losses at once: sigmoid, sft, `ld_alpha`", "one objective"),
        ),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1.0]\n", (":5: `loss_weights: [1.0]`", "one weight above 0")),
        ("loss_type: ipo\nloss_weights: [0]\n", (":5: `loss_weights: [0]`",)),
        ("loss_type: hinge\nld_alpha: 0.5\n", (":5: `ld_alpha: 0.5` beside `loss_type: hinge`", "`ld_dpo`")),
        ("loss_type: robust\nrpo_alpha: 1.0\n", (":5: `rpo_alpha: 1.0` beside", "is `rpo`")),
        (
            "f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 1.5\n",
            (":5: `f_alpha_divergence_coef: 1.5`", "use 0 to 1"),
        ),
        ("loss_type: sppo_hard\n", (":4: `loss_type: sppo_hard` is not converted", "sppo")),
        (
            "f_divergence_type: js_divergence\nloss_type: hinge\n",
            (":4: `f_divergence_type: js_divergence` beside `loss_type: hinge`", "`f_dpo`"),
        ),
        ("f_divergence_type: chi2\n", (":4: ", "no `f_divergence_type: chi2`")),
        ("use_weighting: true\nloss_type: ipo\n", (":4: `use_weighting: True` beside `loss_type: ipo`", "`wpo`")),
        ("load_in_8bit: true\nuse_peft: true\n", (":4: 8-bit", "load_in_4bit")),
        ("load_in_4bit: true\n", ("without `use_peft`",)),
        ("fp16: true\n", (":4: float16", "bf16")),
        ("learning_rat: 1\n", (":4: ", "no `learning_rat`", "did you mean `learning_rate`")),
        ("disable_dropout: false\n", (":4: ", "step zero")),
        ("adam_beta2: 0.95\n", (":4: ", "0.999")),
        ("lr_scheduler_kwargs: {min_lr: 1e-8}\n", (":4: ", "usual form")),
        ("max_length: null\n", (":4: `max_length` is null",)),
    ],
)
def test_what_changes_the_objective_and_has_no_counterpart_is_refused(
    tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    (one,) = faults(tmp_path, COMMON + text, trainer="dpo")
    assert one.startswith(str(tmp_path / "config.yaml"))
    assert all(word in one for word in words), one


def test_all_faults_at_once(tmp_path: Path) -> None:
    text = "dataset_nam: x\nloss_type: bco_pair\nfp16: true\n"
    found = faults(tmp_path, text, trainer="dpo")
    assert len(found) == 5  # the unknown key, the loss, fp16, no model, no data set


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("loss_type: hinge\nbeta: 0.2\n", {"name": "dpo_hinge", "beta": 0.2}),
        ("loss_type: robust\nlabel_smoothing: 0.2\n", {"name": "rdpo", "beta": 0.1, "eps": 0.2}),
        ("loss_type: sigmoid_norm\nbeta: 5\n", {"name": "dpo_norm", "beta": 5.0}),
        ("loss_type: nca_pair\nbeta: 0.01\n", {"name": "nca", "beta": 0.01, "alpha": 0.01}),
        ("loss_type: aot\n", {"name": "aot", "beta": 0.1, "eps": 0.0}),
        ("loss_type: aot_unpaired\nlabel_smoothing: 0.1\n", {"name": "aot_unpaired", "beta": 0.1, "eps": 0.1}),
        ("loss_type: apo_zero\n", {"name": "apo_zero", "beta": 0.1}),
        ("loss_type: apo_down\n", {"name": "apo_down", "beta": 0.1}),
        ("loss_type: exo_pair\nlabel_smoothing: 0.01\n", {"name": "exo_pref", "beta_pi": 0.1, "eps": 0.01}),
        ("loss_type: exo_pair\n", {"name": "exo_pref", "beta_pi": 0.1}),
        ("f_divergence_type: js_divergence\n", {"name": "f_dpo", "divergence": "js", "beta": 0.1}),
        (
            "f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.75\n",
            {"name": "f_dpo", "divergence": "alpha", "alpha": 0.25, "beta": 0.1},
        ),
        (
            "f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.7\n",
            {"name": "f_dpo", "divergence": "alpha", "alpha": 0.3, "beta": 0.1},
        ),
        (
            "f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.0\n",
            {"name": "f_dpo", "divergence": "forward_kl", "beta": 0.1},
        ),
        ("f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 1.0\n", {"name": "dpo", "beta": 0.1}),
        ("ld_alpha: 0.4\n", {"name": "ld_dpo", "alpha": 0.4, "beta": 0.1}),
        ("use_weighting: true\nbeta: 0.02\n", {"name": "wpo", "clamp": None, "beta": 0.02}),
        (
            "loss_type: [sft, sigmoid]\nloss_weights: [0.5, 2.0]\n",
            {"name": "rpo", "beta": 0.1, "eta": 0.25, "sft_reduction": "token_mean"},
        ),
        ("rpo_alpha: 0.7\n", {"name": "rpo", "beta": 0.1, "eta": 0.7, "sft_reduction": "token_mean"}),
        ("rpo_alpha: null\n", {"name": "dpo", "beta": 0.1}),
        ("loss_type: sft\nf_divergence_type: js_divergence\n", {"name": "sft"}),
        ("loss_type: discopop\ndiscopop_tau: 0.1\n", {"name": "discopop", "beta": 0.1, "tau": 0.1}),
    ],
)
def test_pairwise_losses(tmp_path: Path, text: str, method: dict[str, Any]) -> None:
    found = made(tmp_path, COMMON + text, trainer="dpo")
    assert found.recipe["method"] == method


def said_of(found: Converted, key: str) -> str:
    return " ".join(note.says for note in found.notes if note.key == key)


def test_what_differs_in_scale_is_said(tmp_path: Path) -> None:
    """A `beta` that the file leaves to TRL is written out, the method's own beside it; one that it names is not."""
    for loss, own in (("aot", "0.01"), ("sigmoid_norm", "5"), ("exo_pair", "0.5"), ("discopop", "0.05")):
        found = made(tmp_path, COMMON + f"loss_type: {loss}\n", trainer="dpo")
        assert said_of(found, "beta") == f"TRL's default; that of `{found.recipe['method']['name']}` is {own}"
        assert said_of(made(tmp_path, COMMON + f"loss_type: {loss}\nbeta: 0.1\n", trainer="dpo"), "beta") == ""
    assert said_of(made(tmp_path, COMMON + "loss_type: apo_zero\n", trainer="dpo"), "beta") == ""
    weighted = made(tmp_path, COMMON + "use_weighting: true\n", trainer="dpo")
    assert "does not cut weights above 1" in said_of(weighted, "use_weighting")
    several = made(tmp_path, COMMON + "loss_type: [sigmoid, sft]\nloss_weights: [2.0, 0.5]\n", trainer="dpo")
    assert "divided by 2" in said_of(several, "loss_weights") and "micro-batch" in said_of(several, "loss_weights")
    one = made(tmp_path, COMMON + "loss_type: ipo\nloss_weights: [4.0]\n", trainer="dpo")
    assert "divided by 4" in said_of(one, "loss_weights") and "max_grad_norm" in said_of(one, "loss_weights")


def test_files_of_a_mixture(tmp_path: Path) -> None:
    """`path: json` with `data_files` is a file, and the recipe reads it."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n')

    def streams(text: str) -> Any:
        head = "model_name_or_path: m/m\ndatasets:\n"
        (tmp_path / "mixed.yaml").write_text(head + text)
        return convert(tmp_path / "mixed.yaml", trainer="dpo").recipe["data"]["train"]

    whole = f"{tmp_path}/pairs.jsonl"
    assert streams(f"  - {{path: json, data_files: {whole}}}\n") == [{"name": whole}]
    made(tmp_path, f"model_name_or_path: m/m\ndatasets: [{{path: json, data_files: {whole}}}]\n", trainer="dpo")
    assert len(open_source(whole)) == 1
    assert streams("  - {path: json, data_files: [a.jsonl, b.json], columns: [prompt, chosen, rejected]}\n") == [
        {"name": "a.jsonl"},
        {"name": "b.json"},
    ]
    by_split = "{train: [a.parquet], test: b.parquet}"
    assert streams(f"  - {{path: parquet, data_files: {by_split}, data_dir: d, split: test}}\n  - path: h/b\n") == [
        {"name": "d/b.parquet"},
        {"name": "h/b", "split": "train"},
    ]
    assert streams("  - {path: ./rows, data_files: x.jsonl}\n") == [{"name": "./rows/x.jsonl"}]
    assert streams("  - {path: json, data_dir: rows}\n") == [{"name": "rows"}]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{path: csv, data_files: a.csv}", ("not read", "JSONL or Parquet")),
        ("{path: json}", ("names no file", "data_files")),
        ("{path: json, data_files: 'x/*.jsonl'}", ("is a pattern", "name each file")),
        ("{path: json, data_files: 'https://a/b.jsonl'}", ("download it",)),
        ("{path: json, data_files: a.jsonl, split: test}", ("`split: test`", "remove `split`")),
        ("{path: json, data_files: {test: a.jsonl}}", ("has no `train`",)),
        ("{path: a/b, data_files: a.jsonl}", ("`data_files` of `a/b`", "download the file")),
        ("{path: a/b, fraction: 0.5}", ("`fraction` of `a/b`", "`weight`")),
        ("{path: a/b, splt: x}", ("no `splt`", "did you mean `split`")),
        ("{name: x}", ("give `path:`",)),
    ],
)
def test_entries_of_a_mixture_that_have_no_counterpart(tmp_path: Path, entry: str, words: tuple[str, ...]) -> None:
    (one,) = faults(tmp_path, f"model_name_or_path: m/m\ndatasets:\n  - {entry}\n", trainer="dpo")
    assert all(word in one for word in words), one


def test_label_smoothing_that_a_loss_does_not_read_is_said(tmp_path: Path) -> None:
    found = made(tmp_path, COMMON + "loss_type: hinge\nlabel_smoothing: 0.2\n", trainer="dpo")
    assert "eps" not in found.recipe["method"]
    assert any(note.key == "label_smoothing" and "does not read" in note.says for note in found.notes)


def test_cpo_and_kto_losses_without_counterpart(tmp_path: Path) -> None:
    (one,) = faults(tmp_path, COMMON + "cpo_alpha: 1\nloss_type: hinge\n", trainer="cpo")
    assert "CPOTrainer's `loss_type: hinge`" in one and "`slic`" in one
    (one,) = faults(tmp_path, COMMON + "cpo_alpha: 1\nlabel_smoothing: 0.1\n")
    assert "`label_smoothing: 0.1` has no counterpart" in one
    (one,) = faults(tmp_path, COMMON + "loss_type: alphapo\nalpha: 0.5\n")
    assert "AlphaPO" in one
    (one,) = faults(tmp_path, COMMON + "loss_type: apo_zero_unpaired\n")
    assert "apo_zero_unpaired" in one and "anchor held at 0" in one
    (one,) = faults(tmp_path, COMMON + "loss_type: [kto, apo_zero_unpaired]\n", trainer="kto")
    assert "`loss_type: kto and apo_zero_unpaired` is not converted" in one
    (one,) = faults(tmp_path, COMMON + "loss_type: dft\n")
    assert "dft" in one and "own probability" in one


def test_whose_file_it_is(tmp_path: Path) -> None:
    assert made(tmp_path, COMMON, name="my_orpo").trainer == "orpo"
    (one,) = faults(tmp_path, COMMON)
    assert "--trainer" in one
    (one,) = faults(tmp_path, COMMON + "cpo_alpha: 1\ndesirable_weight: 1\n")
    assert "`cpo_alpha` of cpo" in one and "`desirable_weight` of kto" in one


@pytest.mark.parametrize(
    ("keys", "name", "trainer", "method"),
    [
        ("num_generations: 8\n", "config", None, "grpo"),
        ("num_generations: 2\n", "my-rloo", None, "rloo"),
        ("missing_eos_penalty: 1.0\n", "config", None, "online_dpo"),
        ("beta: 0.1\n", "grpo_config", None, "grpo"),
        ("loss_type: dr_grpo\n", "config", None, "grpo"),
        ("beta: 0.1\n", "config", "rloo", "rloo"),
    ],
)
def test_trainers_that_sample_are_refused_with_what_to_write(
    tmp_path: Path, keys: str, name: str, trainer: str | None, method: str
) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(COMMON + keys)
    with pytest.raises(ConfigError) as caught:
        convert(path, trainer)
    assert f"`method: {{name: {method}}}`" in str(caught.value) and "`feedback`" in str(caught.value)
    path.write_text(COMMON + "beta: 0.1\n")
    assert convert(path, "dpo").trainer == "dpo"  # a name alone does not outweigh a word


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "trl_dpo.yaml", tmp_path / "mine.yaml"
    source.write_text(DPO)
    words = ["recipes", "import", str(source), "--processes", "2"]
    assert main([*words, "--output", str(target)]) == 0
    said = capsys.readouterr()
    assert schema.load(target).train.global_batch_size == 32
    assert "line 7: loss_type: 'sigmoid' -> method.name" in said.err and "align check" in said.out
    assert main([*words, "--output", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["trainer"] == "dpo" and document["recipe"]["method"]["beta"] == 0.01
    assert {"key": "beta", "value": 0.01, "line": 8, "became": "method.beta", "says": ""} in document["keys"]
    assert main(words) == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"]["name"] == "dpo"
    assert main(["recipes", "import", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_shortage_of_this_machine_does_not_stop_the_conversion(tmp_path: Path) -> None:
    path = tmp_path / "dpo.yaml"
    path.write_text(COMMON + "report_to: [swanlab, wandb]\nmax_steps: 5\n")
    found = convert(path)
    assert found.recipe["train"]["report_to"] == "swanlab"
    assert any("does not load here yet" in note.says and "pip install swanlab" in note.says for note in found.notes)
