"""Warnings with a source: settings that are allowed, and far from what is published. They never stop a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align.recipe.sections import Recipe, Stream

FULL, ADAPTER = (1e-7, 2e-6), (1e-6, 5e-5)
"""Published peak learning rates of preference training: of all weights, and of a LoRA adapter."""
_FULL_BY_METHOD = {
    "orpo": (1e-7, 5e-6, "Mistral-ORPO-beta and zephyr-orpo-141b took 5e-6"),
    "kto": (1e-7, 5e-6, "TRL's page on KTO says 5e-7 to 5e-6, the HALOs repository takes 5e-6"),
}
_FULL_SOURCE = (
    "alignment handbook, SimPO, TRL's paper index and open-instruct, on models of 0.36 to 70 billion parameters"
)
_ADAPTER_SOURCE = "alignment handbook's QLoRA recipe 5e-6, TRL's DPO page about 1e-5: some ten times full fine-tuning"
_HOT_FULL, _HOT_ADAPTER = 1e-5, 1e-4
UNRATED = frozenset(
    {
        "iqlearn_sft",
        "ps_kd",
        "sft",
        "sft_fdiv",
    }
)
"""Methods for which no range of learning rates is known here: plain SFT is not preference training."""
LOG_RATIO_BETAS = frozenset(
    {
        "alpha_spin",
        "aot",
        "aot_unpaired",
        "apo_down",
        "apo_zero",
        "bco",
        "cdpo",
        "cpo",
        "d2o",
        "demo_reg",
        "discopop",
        "dpo",
        "dpo_hinge",
        "dpop",
        "elr",
        "hypo",
        "infonca",
        "kto",
        "ld_dpo",
        "lipo",
        "lipo_lambda",
        "list_hinge",
        "list_softmax",
        "mapl",
        "nca",
        "online_dpo",
        "pl_dpo",
        "r_dpo",
        "rdpo",
        "regret_pref",
        "robust_bt",
        "rpo",
        "rrpo",
        "seppo",
        "smpo",
        "soft_dpo",
        "t_reg",
        "tdpo",
        "tgdpo",
        "vpo",
        "wpo",
        "xpo",
    }
)
"""Methods whose `beta` multiplies a log-ratio summed over tokens."""
OTHER_SCALES = frozenset(
    {
        "beta_dpo",
        "brain",
        "cal_dpo",
        "chi_po",
        "cpl",
        "dapo",
        "dno",
        "dno_prct",
        "dpo_norm",
        "dr_grpo",
        "dro_v",
        "exo_pref",
        "exo_rw",
        "f_dpo",
        "flex_dpo",
        "grpo",
        "gspo",
        "inpo",
        "ipo",
        "iqlearn_sft",
        "nash_md",
        "online_ipo",
        "orpo",
        "ps_kd",
        "rebel",
        "reinforce_pp",
        "reinforce_pp_baseline",
        "rloo",
        "sft",
        "sft_fdiv",
        "simpo",
        "slic",
        "spac",
        "spin",
        "sppo",
    }
)
"""Methods without such a beta: length-normalised, or with a scale of another meaning."""
_SMALL_BATCH, _SMALL_UNPAIRED_BATCH = 32, 16
_MANY_ROWS = 100_000
_MOST_EPOCHS = {"orpo": 5.0}
_TRUNCATED = 0.05
_KTO_BALANCE = (1.0, 1.5)
_HELD_OUT = ("test", "validation", "valid", "eval", "dev")


@dataclass(frozen=True)
class Advice:
    """A warning: what is unusual, where it was written, why it matters and by whose word, what to do.

    `key` is the option, `section.name`.
    """

    key: str
    what: str
    where: str
    why: str
    mend: str

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"warning: {place}{self.what}\n  why: {self.why}\n  mend: {self.mend}"


@dataclass(frozen=True)
class Facts:
    """What is known of a run once data and tokenizer were looked at; None where it is not.

    Attributes:
        rows: rows of training data.
        too_long: share of them that are longer than `data.max_length`, whatever becomes of them.
        chat_template: whether the tokenizer has one, or the recipe names one.
        desirable, undesirable: labelled completions of each kind.
    """

    rows: int | None = None
    too_long: float | None = None
    chat_template: bool | None = None
    desirable: int | None = None
    undesirable: int | None = None


def advise(recipe: Recipe, given: Mapping[str, str], facts: Facts | None = None) -> list[Advice]:
    """All warnings for a checked recipe.

    Args:
        given: `section.key` -> where it was written, from `schema.read`.
        facts: what a look at the data told; without it, what depends on the data is left out.
    """
    known = facts or Facts()
    found: list[Advice] = []
    for rule in _RULES:
        found += rule(recipe, given, known)
    return found


def facts_of(report: Mapping[str, Any], tokenizer: Any, chat_template: str) -> Facts:
    """Facts from the data report of a trainer, its tokenizer and the recipe's `data.chat_template`."""
    looked = report.get("looked") or 0
    reasons = report.get("reasons") or {}
    long = sum(_count(value) for reason, value in reasons.items() if "too long" in reason)
    has_template = chat_template != "model" or bool(getattr(tokenizer, "chat_template", None))
    return Facts(
        rows=report.get("rows"), too_long=long / looked if looked and long else None, chat_template=has_template
    )


def _count(value: Any) -> int:
    return int(value["count"]) if isinstance(value, Mapping) else int(value)


def _learning_rate(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    rate, method = recipe.train.learning_rate, recipe.method.name
    if rate is None or method in UNRATED or ":" in method:  # of a user's own method nothing is published
        return
    adapter = recipe.model.peft is not None
    low, high, source = (*ADAPTER, _ADAPTER_SOURCE) if adapter else _FULL_BY_METHOD.get(method, (*FULL, _FULL_SOURCE))
    if low * 0.999 <= rate <= high * 1.001:
        return
    why = f"source: {source}"
    if adapter and rate >= _HOT_ADAPTER:
        why += "; examples with 1e-4 to 5e-4 (axolotl, torchtune) show a syntax, not a setting that was measured"
    elif not adapter and rate >= _HOT_FULL:
        why += "; SimPO's authors saw incoherent and repetitive text at 1e-5"
    kind = "a LoRA adapter" if adapter else "all weights"
    yield Advice(
        "train.learning_rate",
        f"a learning rate of {rate:g} for {kind} is {'above' if rate > high else 'below'} what is published for "
        f"`{method}`, {low:g} to {high:g}",
        given.get("train.learning_rate", ""),
        why,
        "leave `train.learning_rate` out for the default of the method, or compare both on held-out rows",
    )


def _beta(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    method, beta = recipe.method.name, recipe.method.options.get("beta")
    if not isinstance(beta, (int, float)):
        return
    where = given.get("method.beta", "")
    if method == "simpo" and beta < 1:
        yield Advice(
            "method.beta",
            f"`beta` is {beta:g} for `simpo`",
            where,
            "its reward is a mean over tokens, so beta is far larger than dpo's; published: 2 to 10 (SimPO README)",
            "start with `beta: 2.0` and `gamma_ratio: 0.5`",
        )
    elif method in LOG_RATIO_BETAS and not 0.001 <= beta <= 0.5:
        large = beta > 0.5
        yield Advice(
            "method.beta",
            f"`beta` is {beta:g} for `{method}`",
            where,
            "published for log-ratios summed over tokens: 0.001 (SPPO) to 0.5 (SmolLM2, alignment handbook), mostly "
            "0.01 to 0.1; values of 2 to 10 belong to length-normalised methods",
            "with so large a beta the policy hardly moves: try 0.1" if large else "the policy may drift far: try 0.01",
        )


def _batch(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    size, method = recipe.train.global_batch_size, recipe.method.name
    unpaired = method in ("kto", "bco")
    if recipe.method.options.get("num_generations"):
        return  # the batch counts prompts, each with a group of answers; what is published counts pairs
    if ":" in method or size >= (_SMALL_UNPAIRED_BATCH if unpaired else _SMALL_BATCH):
        return
    if unpaired:
        why = "its reference point is estimated from the batch; published: 16 to 128 (HALOs 32, BCO 128, TRL's index)"
    else:
        why = "published: most often 128 (SimPO, Zephyr, Tulu 3), 64 in DPO's original code"
    yield Advice(
        "train.global_batch_size",
        f"a global batch of {size} is small for `{method}`",
        given.get("train.global_batch_size", ""),
        f"{why}; on a device with little memory the batch can stay large, since it is cut by `tokens_per_micro_batch`",
        f"raise `train.global_batch_size` to {32 if unpaired else 64} or more",
    )


def _epochs(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    rows, train = facts.rows, recipe.train
    if not rows or rows >= _MANY_ROWS or recipe.data.prompts:  # of prompts, each pass has answers of its own
        return
    steps = train.max_steps
    epochs = train.num_train_epochs if steps is None else steps * train.global_batch_size / rows
    most = _MOST_EPOCHS.get(recipe.method.name, 3.0)
    if epochs <= most * 1.001:
        return
    key = "train.num_train_epochs" if steps is None else "train.max_steps"
    yield Advice(
        key,
        f"{epochs:.3g} passes over {rows:,} rows",
        given.get(key, ""),
        "published: 1 to 3 epochs on fewer than 100,000 pairs (SimPO 1, SmolLM2 2 to 3, Zephyr 1 to 3; ORPO 5); "
        "preference losses memorise quickly",
        f"write `{'num_train_epochs: 1' if steps is None else 'max_steps: ' + str(_one_pass(rows, train))}`, and watch "
        "the accuracy on held-out rows",
    )


def _one_pass(rows: int, train: Any) -> int:
    return max(1, math.ceil(rows / train.global_batch_size))


def _too_long(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    if facts.too_long is None or facts.too_long <= _TRUNCATED:
        return
    limit, cut = recipe.data.max_length, recipe.data.truncation
    fate = {"drop": "they are dropped", "cut_prompt": "their prompts are cut", "cut_completion": "their ends are cut"}
    yield Advice(
        "data.max_length",
        f"{facts.too_long:.1%} of the rows are longer than {limit} tokens: {fate[cut]}",
        given.get("data.max_length", given.get("data.train", "")),
        "what is left is biased towards short answers, and a cut answer teaches to stop nowhere; published limits were "
        "chosen so that this is rare (1,024 to 2,048 for UltraFeedback)",
        "raise `data.max_length`; the same budget of tokens a micro-batch then holds fewer rows",
    )


def _template(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    if facts.chat_template is not False:
        return
    yield Advice(
        "data.chat_template",
        "the model has no chat template",
        given.get("model.name", ""),
        "a base model: plain prompts are text to be continued, and what is trained is not met in a chat; published "
        "runs start from an SFT model with the template that it was tuned with",
        "start from an instruction-tuned model, or give `data.chat_template` the path of a Jinja file",
    )


def _held_out(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    evaluated = {_identity(stream) for stream in recipe.data.eval}
    key, streams = ("data.prompts", recipe.data.prompts) if recipe.data.prompts else ("data.train", recipe.data.train)
    for number, stream in enumerate(streams):
        where = given.get(f"{key}.{number}.split", given.get(f"{key}.{number}.name", given.get(key, "")))
        words = (stream.split or "").lower().replace("-", "_").split("_")
        if _identity(stream) in evaluated:
            what = f"`{stream.name}` is trained on and evaluated on"
        elif any(word in _HELD_OUT for word in words):
            what = f"the split `{stream.split}` of `{stream.name}` is trained on"
        else:
            continue
        yield Advice(
            f"{key}.{number}",
            what,
            where,
            "its scores then say nothing about new prompts, and public comparisons use these rows; the alignment "
            "handbook mixes UltraFeedback's test pairs into training in this way",
            "train on the training split alone",
        )


def _identity(stream: Stream) -> tuple[Any, ...]:
    return (stream.name, stream.split, getattr(stream, "config", None), getattr(stream, "data_dir", None))


def _balance(recipe: Recipe, given: Mapping[str, str], facts: Facts) -> Iterator[Advice]:
    if recipe.method.name != "kto" or not facts.desirable or not facts.undesirable:
        return
    options = recipe.method.options
    wanted, unwanted = options["desirable_weight"] * facts.desirable, options["undesirable_weight"] * facts.undesirable
    if unwanted and _KTO_BALANCE[0] * 0.95 <= wanted / unwanted <= _KTO_BALANCE[1] * 1.05:
        return
    weight = options["undesirable_weight"] * facts.undesirable / facts.desirable
    yield Advice(
        "method.desirable_weight",
        f"{facts.desirable:,} desirable and {facts.undesirable:,} undesirable answers weigh {wanted:.6g} to "
        f"{unwanted:.6g}",
        given.get("method.desirable_weight", given.get("method.name", "")),
        "KTO's authors keep the ratio of the weighted counts between 1 and 1.5 (arXiv 2402.01306)",
        f"write `desirable_weight: {weight:.3g}`",
    )


_RULES: tuple[Callable[[Recipe, Mapping[str, str], Facts], Iterator[Advice]], ...] = (
    _learning_rate,
    _beta,
    _batch,
    _epochs,
    _too_long,
    _template,
    _held_out,
    _balance,
)
