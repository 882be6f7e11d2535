"""TRL's option names: which say the objective, which go over as they are, which are not needed, which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core.clashes import METHOD_CLASHES
from align.core.errors import ConfigError
from align.core.registry import METHODS
from align.recipe.document import Item

if TYPE_CHECKING:
    from align.recipe.from_trl import _Work

_ONLY = {
    "cpo": ("cpo_alpha", "simpo_gamma"),
    "kto": ("desirable_weight", "undesirable_weight"),
    "bco": ("prompt_sample_size", "min_density_ratio", "max_density_ratio"),
    "sft": ("completion_only_loss", "assistant_only_loss", "packing", "dataset_text_field", "eval_packing"),
    "dpo": ("f_divergence_type", "ld_alpha", "use_weighting", "loss_weights", "discopop_tau"),
}
"""Keys that only one configuration has."""
_LOSSES = {
    "kto": ("kto", "apo_zero_unpaired"),
    "bco": ("bco",),
    "sft": ("nll", "dft", "chunked_nll"),
    "cpo": ("simpo",),
    "dpo": [
        "sigmoid_norm",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
    ],
}
_PAIRWISE: dict[str, tuple[str, str, str]] = {
    "hinge": ("dpo_hinge", "", ""),
    "robust": ("rdpo", "eps", ""),
    "sigmoid_norm": ("dpo_norm", "", ""),
    "nca_pair": ("nca", "", "a pair is a list of two"),
    "aot": ("aot", "eps", "sorted over the global batch, not over each device's micro-batch"),
    "aot_unpaired": ("aot_unpaired", "eps", "sorted over the global batch, not over each device's micro-batch"),
    "apo_zero": ("apo_zero", "", ""),
    "apo_down": ("apo_down", "", ""),
    "discopop": ("discopop", "", ""),
}
"""A `loss_type` of DPOTrainer -> our method, the option that `label_smoothing` becomes (none: TRL does not read it),
and what differs."""
STRAIGHT: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "weight_decay": ("train.weight_decay", float),
    "max_grad_norm": ("train.max_grad_norm", float),
    "optim": ("train.optim", str),
    "seed": ("train.seed", int),
    "logging_steps": ("train.logging_steps", float),
    "save_total_limit": ("train.save_total_limit", int),
    "chat_template_path": ("data.chat_template", str),
    "resume_from_checkpoint": ("train.resume", lambda value: "auto" if value is True else str(value)),
}
_NO_HUB = "upload the `policy` folder of the finished run"
_NO_PACK = "rows are always packed, prompts shared, and every step is one exact global batch"
_LAUNCH = "give it to `accelerate launch`"
NOT_NEEDED: dict[str, str] = {
    **dict.fromkeys(("packing", "padding_free", "pad_to_multiple_of", "eval_packing", "packing_strategy"), _NO_PACK),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_token"), _NO_HUB),
    **dict.fromkeys(("deepspeed", "ddp_timeout", "ddp_find_unused_parameters", "local_rank"), _LAUNCH),
    "attn_implementation": "`model.backend: auto` chooses by model and device, and checks that it is exact",
    "use_liger_kernel": "the log-prob head is fused and chunked as it is",
    "activation_offloading": "set `model.gradient_checkpointing`",
    "gradient_checkpointing_kwargs": "checkpointing is never reentrant",
    "per_device_eval_batch_size": "evaluation takes the batches of training",
    "bnb_4bit_quant_storage": "weights are kept as bytes",
    "dataset_streaming": "rows are read as they are needed",
    "dataset_num_proc": "rows are tokenised while training",
    "truncation_mode": "rows that are too long are dropped; see `data.truncation`",
    "precompute_ref_batch_size": "the cache is filled in the run's own micro-batches",
    "prompt_sample_size": "weights of undesirable completions come with the data, as `weight`",
    "dataset_text_field": "the column is found by its name: `text`, `messages`, `prompt` and `completion`",
    "remove_unused_columns": "columns that nothing reads are left out",
    "generate_during_eval": "`align generate` and `align evaluate` do it after a run",
    "run_name": "the run is named by its folder",
    "logging_dir": "the log is in the run's folder",
    "logging_strategy": "every `train.logging_steps`",
    "logging_first_step": "every `train.logging_steps`",
    "log_level": "",
    "greater_is_better": "known by the metric",
    "shuffle_dataset": "rows are mixed in every epoch: `data.shuffle`",
    "streaming": "rows are read as they are needed",
    "overwrite_output_dir": "a used folder is resumed or refused: `train.resume`",
    "tf32": "a setting of the device",
    "label_names": "",
    "bf16_full_eval": "evaluation computes as training does",
}
REFUSED: dict[str, tuple[str, str]] = {
    "disable_dropout": ("with dropout the policy is not its reference at step zero", "remove it"),
    "use_dora": ("adapters are plain LoRA", "remove it, or use `use_rslora`"),
    "lora_target_parameters": ("adapters lie over modules", "name modules in `lora_target_modules`"),
    "lora_task_type": ("causal language models are trained", "remove it"),
    "label_smoothing_factor": ("it is an option of classifiers", "remove it"),
    "neftune_noise_alpha": ("noise in the embeddings makes the policy another than its reference", "remove it"),
    "lr_scheduler_kwargs": ("schedules have their usual form", "remove it"),
    "adam_beta1": ("moments keep their defaults, 0.9 and 0.999", "remove it"),
    "adam_beta2": ("moments keep their defaults, 0.9 and 0.999", "remove it"),
    "fsdp": ("sharding is that of DeepSpeed ZeRO", "remove it, and launch with a ZeRO configuration"),
    "router_aux_loss_coef": ("no term is added for the load of experts", "remove it, or set it to 0"),
    "model_init_kwargs": ("options of the model have names of their own", "write them as keys"),
}
FORMER: dict[str, str] = {
    "warmup_ratio": "a share of the run",
    "torch_dtype": "the former name of `dtype`",
    "evaluation_strategy": "the former name of `eval_strategy`",
    "max_prompt_length": "prompt and completion share `max_length`; prompts are not cut by themselves",
    "max_completion_length": "prompt and completion share `max_length`; completions are never cut in silence",
    "preprocessing_num_workers": "rows are tokenised while training",
    "use_flash_attention_2": "`model.backend: auto` chooses by model and device",
    "overwrite_output_dir": "a used folder is resumed or refused: `train.resume`",
    "logging_dir": "the log is in the run's folder",
    "group_by_length": "micro-batches are balanced by tokens",
}
"""Keys that TRL or transformers had and dropped."""


def trainer_of(root: Item, path: Path) -> str:
    """Whose configuration a file is: by its keys, by its loss, by its name.

    Raises:
        ConfigError: nothing tells, or two things disagree.
    """
    found = {kind: key for kind, keys in _ONLY.items() for key in keys if key in root.value}
    for loss in _losses(root.value.get("loss_type")):
        for kind, names in _LOSSES.items():
            if loss in names and not ({"dpo", "cpo"} >= {kind, *found} and found):
                found.setdefault(kind, "loss_type")
    if not found:
        found = {kind: "file name" for kind in ("dpo", "kto", "sft", "cpo", "orpo", "bco") if kind in path.stem.lower()}
    if len(found) == 1:
        return next(iter(found))
    if not found and "loss_type" in root.value:
        return "dpo"
    hints = ", ".join(f"`{key}` of {kind}" for kind, key in found.items())
    raise ConfigError(
        "which trainer is this configuration for?",
        where=str(path),
        why=f"there is {hints}" if hints else "no key of it belongs to one trainer alone",
        mend="give --trainer dpo, kto, sft, cpo, orpo or bco",
    )


def method_of(work: _Work) -> None:
    """Set `method` and `data.score`, or say why the objective has no counterpart."""
    {"dpo": _dpo, "kto": _kto, "sft": _sft, "cpo": _cpo, "orpo": _orpo, "bco": _bco}[work.trainer](work)


def _losses(item: Item | None) -> list[str]:
    plain = item.plain() if item is not None else None
    return [str(one) for one in plain] if isinstance(plain, list) else [] if plain is None else [str(plain)]


def _dpo(work: _Work) -> None:
    losses = _losses(work.given.get("loss_type")) or ["sigmoid"]
    work.value("loss_weights")
    if len(losses) > 1:
        mend = "choose one"
        if set(losses) == {"sigmoid", "sft"}:
            mend = (
                "`rpo` with `sft_reduction: token_mean` is DPO and SFT; its mean is over each answer, then over pairs"
            )
        work.fault("loss_type", f"several losses at once: {', '.join(losses)}", "a method is one objective", mend)
        return
    changed = {
        "f_divergence_type": "reverse_kl" if losses[0] != "sigmoid" else work.value("f_divergence_type"),
        "ld_alpha": None,
        "use_weighting": False,
    }
    for key, plain in changed.items():
        if work.value(key) != plain:
            why = "it changes the loss, and no method here is that"
            work.fault(key, f"`{key}: {work.value(key)}` has no counterpart", why, "see `align methods`")
    beta, smoothing = float(work.value("beta")), float(work.value("label_smoothing"))
    loss = losses[0]
    if loss == "sigmoid":
        _sigmoid(work, beta, smoothing)
    elif loss == "ipo":
        work.set("loss_type", "method.name", "ipo", "log-ratios per token, as in TRL")
        work.set("beta", "method.tau", beta)
        work.recipe["method"]["normalize"] = "token"
    elif loss == "exo_pair":
        work.set("loss_type", "method.name", "exo_pref")
        work.set("beta", "method.beta_pi", beta)
        if smoothing:
            work.set("label_smoothing", "method.eps", smoothing)
    elif loss in _PAIRWISE:
        _pairwise(work, loss, beta, smoothing)
    elif loss == "sft":
        work.set("loss_type", "method.name", "sft", "on the chosen answers")
        work.done.add("beta")
    else:
        _absent(work, loss)


def _pairwise(work: _Work, loss: str, beta: float, smoothing: float) -> None:
    ours, rate, says = _PAIRWISE[loss]
    work.set("loss_type", "method.name", ours, says)
    work.set("beta", "method.beta", beta)
    if rate:
        work.set("label_smoothing", f"method.{rate}", smoothing)
    elif smoothing:
        work.say("label_smoothing", work.given["label_smoothing"], "", f"TRL's `{loss}` does not read it either")
    if loss == "discopop":
        work.set("discopop_tau", "method.tau", float(work.value("discopop_tau")))
    elif loss == "nca_pair":
        work.recipe["method"]["alpha"] = 0.01


def _sigmoid(work: _Work, beta: float, smoothing: float) -> None:
    if work.value("f_divergence_type") == "reverse_kl":
        work.set("loss_type", "method.name", "dpo")
    else:
        _divergence(work)
    work.set("beta", "method.beta", beta)
    if smoothing:
        work.say("label_smoothing", work.given["label_smoothing"], "", "TRL's `sigmoid` does not read it either")


def _divergence(work: _Work) -> None:
    theirs = str(work.value("f_divergence_type"))
    ours = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}.get(theirs)
    if ours is None:
        work.fault("f_divergence_type", f"TRL has no `f_divergence_type: {theirs}`")
        return
    work.set("loss_type", "method.name", "f_dpo")
    work.set("f_divergence_type", "method.divergence", ours)
    if ours == "alpha":
        alpha = 1 - float(work.value("f_alpha_divergence_coef"))
        work.set("f_alpha_divergence_coef", "method.alpha", alpha, "the paper's alpha is 1 minus TRL's")


def _absent(work: _Work, loss: str) -> None:
    clash = METHOD_CLASHES.get(loss)
    ours = clash.ours if clash and clash.ours else loss
    there = ours in METHODS.entries()
    work.fault(
        "loss_type",
        f"`loss_type: {loss}` is not converted",
        why=clash.sentence if clash else "",
        mend=f"look at `{ours}` in `align methods` and write the recipe by hand"
        if there
        else f"`{ours}` is not here yet",
    )


def _kto(work: _Work) -> None:
    (loss,) = _losses(work.given.get("loss_type")) or ["kto"]
    if loss != "kto":
        _absent(work, loss)
        return
    work.set("loss_type", "method.name", "kto", "z0 over the global batch, not over each device's")
    for key in ("beta", "desirable_weight", "undesirable_weight"):
        work.set(key, f"method.{key}", float(work.value(key)))
    if "train_sampling_strategy" in work.given:
        work.say("train_sampling_strategy", work.given["train_sampling_strategy"], "", "rows are mixed; `data.shuffle`")


def _bco(work: _Work) -> None:
    work.set("loss_type", "method.name", "bco", "the centre is the mean of the two classes' means, as in the paper")
    work.set("beta", "method.beta", float(work.value("beta")))
    low, high = float(work.value("min_density_ratio")), float(work.value("max_density_ratio"))
    work.set("min_density_ratio", "method.clip", [low, high])
    work.done.add("max_density_ratio")


def _sft(work: _Work) -> None:
    (loss,) = _losses(work.given.get("loss_type")) or ["nll"]
    if loss not in ("nll", "chunked_nll"):
        _absent(work, loss)
        return
    work.set("loss_type", "method.name", "sft", "mean over the tokens of the global batch")
    only = work.value("completion_only_loss")
    if only is False:
        work.fault(
            "completion_only_loss",
            "`completion_only_loss: false` has no counterpart",
            why="prompts are never trained on here",
            mend="remove it, or give the rows as `text`",
        )
    elif only:
        work.say("completion_only_loss", work.given.get("completion_only_loss"), "", "always so")
    if work.value("assistant_only_loss"):
        work.set("assistant_only_loss", "data.score", "all", "every assistant turn, and nothing else")
    else:
        says = (
            "rows of `messages`: TRL trains on user turns too unless told otherwise; here assistant turns alone count"
        )
        work.say("assistant_only_loss", work.given.get("assistant_only_loss"), "", says)


def _cpo(work: _Work) -> None:
    (loss,) = _losses(work.given.get("loss_type")) or ["sigmoid"]
    if loss != "simpo":
        mend = "" if "cpo" in METHODS.entries() else "; method `cpo` is not here yet"
        work.fault(
            "loss_type",
            f"CPOTrainer's `loss_type: {loss}` is not converted",
            why="of CPOTrainer's losses `simpo` has a counterpart",
            mend="write `loss_type: simpo`, or use another method" + mend,
        )
        return
    if float(work.value("alpha") or 0):
        work.fault("alpha", "AlphaPO's `alpha` has no counterpart", "it changes the reward", "write `alpha: 0.0`")
    beta = float(work.value("beta"))
    work.set("loss_type", "method.name", "simpo")
    work.set("beta", "method.beta", beta)
    gamma = float(work.value("simpo_gamma"))
    work.set("simpo_gamma", "method.gamma_ratio", gamma / beta, "divided by beta")
    if work.value("label_smoothing"):
        work.set("label_smoothing", "method.label_smoothing", float(work.value("label_smoothing")))
    weight = float(work.value("cpo_alpha"))
    says = "TRL's SFT term is a mean over all tokens of a micro-batch, prompts included; here over each chosen answer"
    work.set("cpo_alpha", "method.sft_weight", weight, says if weight else "")


def _orpo(work: _Work) -> None:
    says = "TRL's NLL is a mean over all tokens of a micro-batch, prompts included; here over each chosen answer"
    work.recipe["method"] = {"name": "orpo"}
    work.set("beta", "method.lambda", float(work.value("beta")), says)
