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
    "dpo": ("f_divergence_type", "ld_alpha", "use_weighting", "loss_weights", "discopop_tau", "rpo_alpha"),
}
"""Keys that only one configuration has."""
_LOSSES = {
    "kto": ("kto", "apo_zero_unpaired"),
    "bco": ("bco",),
    "sft": ("nll", "dft", "chunked_nll"),
    "cpo": ("simpo", "alphapo"),
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
    "rpo_alpha": "an option of earlier DPOTrainers",
}
"""Keys that TRL or transformers had and dropped."""

ONLINE = {"grpo": "grpo", "rloo": "rloo", "online_dpo": "online_dpo"}
"""Trainers of TRL that sample -> the method to write instead."""
_ONLINE_KEYS = {
    "num_generations": "grpo",
    "steps_per_generation": "grpo",
    "num_iterations": "grpo",
    "scale_rewards": "grpo",
    "reward_funcs": "grpo",
    "normalize_advantages": "rloo",
    "reward_model_path": "online_dpo",
    "missing_eos_penalty": "online_dpo",
}
"""Keys that only trainers have that sample -> the likeliest of them."""
_ONLINE_LOSSES = {"grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo"}


def refuse_online(root: Item, trainer: str | None, path: Path) -> None:
    """A configuration of a trainer that samples is no whole run: who judges stands in the script.

    Raises:
        ConfigError: with the recipe's own sections for it.
    """
    keys = [key for key in _ONLINE_KEYS if key in root.value]
    keys += [key for key in ("loss_type",) if set(_losses(root.value.get(key))) & _ONLINE_LOSSES]
    named = [kind for kind in ONLINE if kind in path.stem.lower().replace("-", "_")] if trainer is None else []
    # The name of the file says which, where a key says that it is one of them.
    kind = trainer if trainer in ONLINE else next(iter(named), _ONLINE_KEYS.get(keys[0], "grpo") if keys else None)
    if kind is None or (trainer is not None and trainer not in ONLINE):
        return
    raise ConfigError(
        f"configurations of TRL trainers that sample are not imported, and this is one of `{kind}`",
        where=root.value[keys[0]].where if keys else str(path),
        why="who judges the answers stands in a script, and without it half of the run would be missing",
        mend=f"write `method: {{name: {ONLINE[kind]}}}`, `data.prompts`, `rollout` and `feedback`; the page `From TRL` "
        "has a table of keys, and `align recipes import --trainer dpo` and others take files of trainers on data",
    )


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
    weights = _weights(work, losses)
    changed = _changed(work)
    beta, smoothing = float(work.value("beta")), float(work.value("label_smoothing"))
    if len(losses) > 1:
        if sorted(losses) == ["sft", "sigmoid"] and not changed:
            share = dict(zip(losses, weights, strict=True))
            _rpo(work, "loss_weights", beta, share["sft"] / share["sigmoid"])
            _unread(work, "sigmoid", smoothing)
        else:
            said = ", ".join([*losses, *(f"`{key}`" for key in changed)])
            why = "a method is one objective; of sums, `sigmoid` and `sft` alone have a counterpart, `rpo`"
            work.fault("loss_type", f"several losses at once: {said}", why, "choose one, or write a method of your own")
        return
    loss = losses[0]
    if loss == "sft":
        changed = [key for key in changed if key != "f_divergence_type"]  # TRL's `sft` does not read it
    if changed:
        _changed_loss(work, loss, changed, beta, smoothing)
    elif loss == "sigmoid":
        work.set("loss_type", "method.name", "dpo")
        _scale(work, "beta", beta)
        _unread(work, loss, smoothing)
    elif loss == "ipo":
        work.set("loss_type", "method.name", "ipo", "log-ratios per token, as in TRL")
        _scale(work, "tau", beta)
        work.recipe["method"]["normalize"] = "token"
        _unread(work, loss, smoothing)
    elif loss == "exo_pair":
        work.set("loss_type", "method.name", "exo_pref")
        _scale(work, "beta_pi", beta)
        if smoothing:
            work.set("label_smoothing", "method.eps", smoothing)
        else:
            work.say("label_smoothing", None, "", "TRL refuses 0 with `exo_pair`; `eps` is the paper's 0.001")
    elif loss in _PAIRWISE:
        _pairwise(work, loss, beta, smoothing)
    elif loss == "sft":
        work.set("loss_type", "method.name", "sft", "on the chosen answers, a mean over the global batch's tokens")
        work.done |= {"beta", "f_divergence_type", "f_alpha_divergence_coef"}
        _unread(work, loss, smoothing)
    else:
        _absent(work, loss)


def _scale(work: _Work, option: str, value: float) -> None:
    """Write TRL's `beta`, and say where it is a default that differs from the method's own."""
    name = work.recipe["method"]["name"]
    cls = METHODS.get(name)
    own = getattr(cls(), option)
    differs = "beta" not in work.given and own != value
    work.set("beta", f"method.{option}", value, f"TRL's default; that of `{name}` is {own:g}" if differs else "")


def _unread(work: _Work, loss: str, smoothing: float) -> None:
    if smoothing:
        mend = "; conservative DPO is `cdpo` with `eps`" if loss == "sigmoid" else ""
        says = f"TRL's `{loss}` does not read it either{mend}"
        work.say("label_smoothing", work.given["label_smoothing"], "", says)


def _weights(work: _Work, losses: list[str]) -> list[float]:
    """TRL's `loss_weights`, one for each loss; a factor on everything is said, and left out."""
    given = work.value("loss_weights")
    weights = [1.0] * len(losses) if given is None else [float(weight) for weight in given]
    if len(weights) != len(losses) or min(weights) <= 0:
        what = f"`loss_weights: {given}` for `loss_type: {losses}`"
        work.fault("loss_weights", what, mend="give one weight above 0 for each loss")
        return [1.0] * len(losses)
    common = weights[losses.index("sigmoid")] if "sigmoid" in losses else weights[0]
    if given is not None:
        says = "one loss of weight 1" if len(losses) == 1 else "see `method.eta`"
        if common != 1:
            says = (
                f"the whole loss is divided by {common:g}: AdamW's step does not depend on it; divide `max_grad_norm` "
                "by it too for the same clipping"
            )
        work.say("loss_weights", work.given.get("loss_weights"), "", says)
    return weights


def _changed(work: _Work) -> list[str]:
    """The keys beside `loss_type` that make another objective, all of them then done."""
    coefficient = float(work.value("f_alpha_divergence_coef"))
    kind = work.value("f_divergence_type")
    plain = kind == "reverse_kl" or (kind == "alpha_divergence" and abs(coefficient - 1) < 1e-6)
    if plain and kind != "reverse_kl":
        says = "with a coefficient of 1 this is the reverse KL of `dpo`"
        work.say("f_divergence_type", work.given["f_divergence_type"], "", says)
    former = work.given.get("rpo_alpha")
    return [
        *(["f_divergence_type"] if not plain else []),
        *(["ld_alpha"] if work.value("ld_alpha") is not None else []),
        *(["use_weighting"] if work.value("use_weighting") else []),
        *(["rpo_alpha"] if former is not None and former.plain() is not None else []),
    ]


_VARIANTS = {"f_divergence_type": "f_dpo", "ld_alpha": "ld_dpo", "use_weighting": "wpo", "rpo_alpha": "rpo"}
"""A key that changes `sigmoid` -> the method that this is."""


def _changed_loss(work: _Work, loss: str, changed: list[str], beta: float, smoothing: float) -> None:
    """`sigmoid` with one of these keys is a method; another loss with one, or `sigmoid` with two, is none."""
    if loss != "sigmoid" or len(changed) > 1:
        for key in changed:
            value = work.given[key].plain()
            beside = f"`loss_type: {loss}`" if loss != "sigmoid" else " and ".join(k for k in changed if k != key)
            mend = f"`{key}` with `loss_type: sigmoid` alone is `{_VARIANTS[key]}`: drop it, or what is beside it"
            work.fault(key, f"`{key}: {value}` beside {beside} has no counterpart", "no method here is that", mend)
        return
    key = changed[0]
    if key == "f_divergence_type":
        _divergence(work)
        if "method" in work.recipe:
            _scale(work, "beta", beta)
    elif key == "ld_alpha":
        work.set("loss_type", "method.name", "ld_dpo")
        work.set(key, "method.alpha", float(work.value(key)))
        _scale(work, "beta", beta)
    elif key == "use_weighting":
        says = "`clamp: null`, as TRL does not cut weights above 1; the authors and `wpo`'s default do"
        work.set("loss_type", "method.name", "wpo")
        work.set(key, "method.clamp", None, says)
        _scale(work, "beta", beta)
    else:
        _rpo(work, key, beta, float(work.value(key)))
    _unread(work, loss, smoothing)


def _rpo(work: _Work, key: str, beta: float, eta: float) -> None:
    work.set("loss_type", "method.name", "rpo")
    _scale(work, "beta", beta)
    says = "TRL's SFT term is a mean over the chosen tokens of a micro-batch; here over each chosen answer, then pairs"
    work.set(key, "method.eta", eta, says)
    work.recipe["method"]["sft_reduction"] = "token_mean"


def _pairwise(work: _Work, loss: str, beta: float, smoothing: float) -> None:
    ours, rate, says = _PAIRWISE[loss]
    work.set("loss_type", "method.name", ours, says)
    _scale(work, "beta", beta)
    if rate:
        work.set("label_smoothing", f"method.{rate}", smoothing)
    else:
        _unread(work, loss, smoothing)
    if loss == "discopop":
        work.set("discopop_tau", "method.tau", float(work.value("discopop_tau")))
    elif loss == "nca_pair":
        work.recipe["method"]["alpha"] = 0.01


def _divergence(work: _Work) -> None:
    theirs = str(work.value("f_divergence_type"))
    ours = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}.get(theirs)
    if ours is None:
        work.fault("f_divergence_type", f"TRL has no `f_divergence_type: {theirs}`")
        return
    coefficient = float(work.value("f_alpha_divergence_coef"))
    if ours == "alpha" and not 0 <= coefficient < 1:
        why = "the paper's alpha, 1 minus it, lies between 0 and 1; beyond, f has no such optimum"
        work.fault("f_alpha_divergence_coef", f"`f_alpha_divergence_coef: {coefficient:g}`", why, "use 0 to 1")
        return
    if ours == "alpha" and not coefficient:
        ours = "forward_kl"
        work.say("f_alpha_divergence_coef", work.given["f_alpha_divergence_coef"], "", "alpha 1 is the forward KL")
    work.set("loss_type", "method.name", "f_dpo")
    work.set("f_divergence_type", "method.divergence", ours)
    if ours == "alpha":
        says = "the paper's alpha is 1 minus TRL's"
        work.set("f_alpha_divergence_coef", "method.alpha", round(1 - coefficient, 12), says)


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


def _one_loss(work: _Work, default: str) -> str:
    """The one loss of a trainer that takes no list; several are an error, and the name is then all of them."""
    return " and ".join(_losses(work.given.get("loss_type"))) or default


def _kto(work: _Work) -> None:
    loss = _one_loss(work, "kto")
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
    _scale(work, "beta", float(work.value("beta")))
    low, high = float(work.value("min_density_ratio")), float(work.value("max_density_ratio"))
    work.set("min_density_ratio", "method.clip", [low, high])
    work.done.add("max_density_ratio")


def _sft(work: _Work) -> None:
    loss = _one_loss(work, "nll")
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


_CPO_MENDS = {
    "hinge": "with `cpo_alpha: 0` it is beta times `slic` with `delta` 1 / beta and `lambda` 0: write that by hand",
    "ipo": "`ipo` is that loss with a reference",
}


def _cpo(work: _Work) -> None:
    loss = _one_loss(work, "sigmoid")
    if float(work.value("alpha") or 0):
        work.fault("alpha", "AlphaPO's `alpha` has no counterpart", "it changes the reward", "write `alpha: 0.0`")
        return
    beta, smoothing, weight = (float(work.value(key)) for key in ("beta", "label_smoothing", "cpo_alpha"))
    means = "TRL's SFT term is a mean over the chosen tokens of a micro-batch; here over "
    if loss == "sigmoid":
        work.set("loss_type", "method.name", "cpo")
        _scale(work, "beta", beta)
        work.set("cpo_alpha", "method.lambda", weight, means + "those of the global batch" if weight else "")
        if smoothing:
            why = "`cpo` is the paper's loss, without it"
            work.fault("label_smoothing", f"`label_smoothing: {smoothing:g}` has no counterpart", why, "remove it")
        if "simpo_gamma" in work.given:
            work.say("simpo_gamma", work.given["simpo_gamma"], "", "unused: it belongs to `loss_type: simpo`")
    elif loss in ("simpo", "alphapo"):
        weight = 0.0 if loss == "alphapo" else weight  # TRL sets it so
        work.set("loss_type", "method.name", "simpo", "AlphaPO with alpha 0" if loss == "alphapo" else "")
        _scale(work, "beta", beta)
        work.set("simpo_gamma", "method.gamma_ratio", float(work.value("simpo_gamma")) / beta, "divided by beta")
        if smoothing:
            work.set("label_smoothing", "method.label_smoothing", smoothing)
        work.set("cpo_alpha", "method.sft_weight", weight, means + "each chosen answer, then pairs" if weight else "")
    else:
        why = "of CPOTrainer's losses `sigmoid` and `simpo` have a counterpart"
        mend = _CPO_MENDS.get(loss, "write `loss_type: sigmoid` or `simpo`")
        work.fault("loss_type", f"CPOTrainer's `loss_type: {loss}` is not converted", why, mend)


def _orpo(work: _Work) -> None:
    says = "TRL's NLL is a mean over all tokens of a micro-batch, prompts included; here over each chosen answer"
    work.recipe["method"] = {"name": "orpo"}
    work.set("beta", "method.lambda", float(work.value("beta")), says)
