"""An adapter and its base into one plain model folder, checked against the two that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from align.core.errors import ConfigError, ModelError
from align.core.files import atomic_directory
from align.sampling.prompts import stop_at_end_of_turn
from align.scoring.adapters import adapter_config, base_of, load_adapter
from align.scoring.loading import DTYPES, first_line, load_model, load_tokenizer, refuse_config
from align.trainers.checkpoints import share

MergedDtype = Literal["float32", "bfloat16"]
_ADDED_TOKENS = 24
"""Tokens decoded behind each prompt of the check."""
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference of a logit, relative to the largest logit: sums in another order; rounding of every weight."""
_PROBES = (
    "Why is the sky blue?",
    "Write one sentence about a river.",
    "2 + 2 =",
    "The committee met in the morning and",
    "List three uses of a long rope.",
    "Once upon a time",
)


@dataclass(frozen=True)
class Merged:
    """What was written, and how far it is from base and adapter.

    Attributes:
        output, adapter, base: folders (or the base's hub id).
        dtype: of the saved weights.
        parameters: number of weights, tied ones once. bytes: of the safetensors files.
        untied: whether input and output embeddings, one matrix in the base, are two in the result.
        positions: positions of the check: all tokens of its prompts and of up to 24 decoded greedily behind each.
        largest_logit_difference: over those, of the saved folder read again; largest_logit: to compare it with.
        same_next_token: share of positions with the same likeliest next token.
    """

    output: str
    adapter: str
    base: str
    dtype: str
    parameters: int
    bytes: int
    untied: bool
    positions: int
    largest_logit_difference: float
    largest_logit: float
    same_next_token: float


@dataclass(frozen=True, eq=False)
class _Expected:
    """What base and adapter say: sequences [T] and their logits [T, V] in float32."""

    ids: list[Tensor]
    logits: list[Tensor]


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: MergedDtype | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write base + adapter as one folder with weights, tokenizer, chat template and generation configuration.

    Weights are added in float32 and saved in `dtype` (by default bfloat16 where the base is stored in it, else
    float32). The folder is read again and compared before it appears under its name. A base that is stored quantised
    is turned into floats first: the result is what the adapter was trained on, and no longer small.

    Raises:
        ConfigError: the output is in use. ModelError: no adapter, no base, an adapter of another base or of a kind
            that cannot be merged; or the result does not compute what base and adapter compute.
    """
    folder, target = Path(adapter).expanduser(), Path(output).expanduser()
    config = adapter_config(folder)
    _refuse_kind(config, folder)
    _refuse_output(target)
    name = base_of(config, folder, base)
    model = _load_base(name, base is None, trust_remote_code)
    kind: MergedDtype = dtype or _stored_dtype(name, trust_remote_code)
    has_own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder) if has_own else name, trust_remote_code)
    tied = _is_tied(model)
    wrapped = load_adapter(model, folder, name)
    expected = _expected(wrapped, tokenizer)
    plain = _merge(wrapped, folder)
    stop_at_end_of_turn(plain, tokenizer)
    untied = tied and not _is_tied(plain)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    plain.to(DTYPES[kind])  # type: ignore[arg-type]
    with atomic_directory(target, {"kind": "merged model", "adapter": str(folder), "base": name}) as partial:
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        share(partial)
        del model, wrapped, plain
        again = load_model(str(partial), torch.float32, trust_remote_code)
        check = _compare(again, expected, kind, target)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return Merged(str(target), str(folder), name, kind, parameters, size, untied, **check)


def _merge(wrapped: Any, folder: Path) -> Any:
    _untie(wrapped)
    try:
        # It sets `tie_word_embeddings` to false where there are two matrices now: loading would lose one (peft 0.21).
        return wrapped.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise ModelError(
            "this adapter cannot be merged", where=str(folder), why=first_line(error), mend="serve it as an adapter"
        ) from error


def _untie(wrapped: Any) -> None:
    """A matrix that is both input and output embedding gets a second copy: adding to one must not add to the other."""
    inner = wrapped.get_base_model()
    start, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None or start is head:
        return
    touched = any(hasattr(layer, "base_layer") or hasattr(layer, "modules_to_save") for layer in (start, head))
    layer = getattr(head, "base_layer", None) or getattr(head, "original_module", None) or head
    first = getattr(start, "base_layer", None) or getattr(start, "original_module", None) or start
    if touched and layer.weight.data_ptr() == first.weight.data_ptr():
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _is_tied(model: Any) -> bool:
    start, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and start.weight.data_ptr() == head.weight.data_ptr()


def _refuse_kind(config: Mapping[str, Any], folder: Path) -> None:
    kind = str(config.get("peft_type", ""))
    if "PROMPT" in kind or "PREFIX" in kind or kind in ("P_TUNING", "CARTRIDGE"):
        raise ModelError(
            f"an adapter of type {kind} cannot be merged",
            where=str(folder),
            why="it adds virtual tokens to the input and no weights to the model",
            mend="serve it as an adapter",
        )
    if config.get("alora_invocation_tokens"):
        raise ModelError(
            "an activated LoRA cannot be merged",
            where=str(folder),
            why="it changes the model behind its invocation tokens only",
            mend="serve it as an adapter",
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"this adapter is for the task {task}", where=str(folder), mend="align merges adapters of causal models"
        )


def _refuse_output(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(
            "the output folder is not empty" if target.is_dir() else "the output is a file",
            where=str(target),
            mend="name a new folder with --output, or empty this one",
        )


def _load_base(name: str, recorded: bool, trust_remote_code: bool) -> Any:
    try:
        quantised = _config(name, trust_remote_code)
        if getattr(quantised, "quantization_config", None) is not None:
            return _dequantised(name, quantised, trust_remote_code)
        return load_model(name, torch.float32, trust_remote_code)
    except ModelError as error:
        if not recorded:
            raise
        raise ModelError(
            f"the base model `{name}`, as the adapter names it, cannot be loaded",
            where=error.where if error.where != name else "",
            why=error.what + (f": {error.why}" if error.why else ""),
            mend="if it was moved, name it with --base MODEL",
        ) from error


def _config(name: str, trust_remote_code: bool) -> Any:
    """The model's configuration, or None where there is none; `load_model` then says why."""
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def _dequantised(name: str, config: Any, trust_remote_code: bool) -> Any:
    """A base that is stored quantised, as floats."""
    from transformers import AutoModelForCausalLM

    refuse_config(config, name)
    try:
        packed = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, trust_remote_code=trust_remote_code)
        weights = packed.dequantize().float().state_dict()
        del config.quantization_config
        # A model that was loaded quantised wants to be saved quantised (transformers 5.17), hence a fresh one.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        model.load_state_dict(weights)
        return model.eval()
    except (OSError, ValueError, ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            "the base model is stored quantised, and cannot be turned into floats here",
            where=name,
            why=first_line(error),
            mend="name the unquantised model with --base MODEL, or install the library that quantised it",
        ) from error


def _stored_dtype(name: str, trust_remote_code: bool) -> MergedDtype:
    stored = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).dtype
    return "bfloat16" if stored == torch.bfloat16 else "float32"


@torch.inference_mode()
def _expected(model: Any, tokenizer: Any) -> _Expected:
    ids, logits = [], []
    for text in _PROBES:
        row = torch.tensor([_probe_ids(tokenizer, text)])
        # Named, or else generation_config's sampling options would be warned of.
        row = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=_ADDED_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        ids.append(row)
        logits.append(model(row).logits[0].float())
    return _Expected(ids, logits)


def _probe_ids(tokenizer: Any, text: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


@torch.inference_mode()
def _compare(model: nn.Module, expected: _Expected, kind: str, target: Path) -> dict[str, Any]:
    difference = largest = 0.0
    same = positions = 0
    for row, wanted in zip(expected.ids, expected.logits, strict=True):
        found = model(row).logits[0].float()
        difference = max(difference, float((found - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        positions += wanted.shape[0]
    if not difference <= _TOLERANCE[kind] * largest:
        raise ModelError(
            "the merged model does not compute what base and adapter compute; nothing was written",
            where=str(target),
            why=f"a logit differs by {difference:.3g}, the largest logit is {largest:.3g}",
            mend="serve the adapter as it is, and report this kind of adapter",
        )
    return {
        "positions": positions,
        "largest_logit_difference": difference,
        "largest_logit": largest,
        "same_next_token": same / positions,
    }
