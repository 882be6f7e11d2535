"""Back ends with one meaning, and the choice among them for a loaded model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from align.compat.transformers import attention_of, set_attention
from align.core.errors import ConfigError, ModelError, suggestion
from align.scoring import probe as probing
from align.scoring.attention import TREE
from align.scoring.facts import attention_owner, caps_scores, refuse_unsuitable, windows_of
from align.scoring.layout import PackedBatch, Tree
from align.scoring.packing import pack_flex, pack_padded, pack_sdpa, pack_tree

Name = Literal["tree", "sdpa", "flex", "padded"]
NAMES: tuple[Name, ...] = get_args(Name)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Backend:
    """A prepared way to pack trees for one model (and for copies of it that were prepared alike).

    Attributes:
        name: the back end. reason: why it was chosen, one clause. device: where batches go by default.
        model: whose windows and dtype the masks follow.
    """

    name: Name
    reason: str
    device: torch.device
    model: nn.Module

    def pack(self, trees: Sequence[Tree], device: torch.device | str | None = None) -> PackedBatch:
        """Pack trees in order; branch n of the batch is branch n of the trees laid end to end."""
        where = self.device if device is None else device
        if self.name == "tree":
            return pack_tree(trees).to(where)
        if self.name == "padded":
            return pack_padded(trees).to(where)
        windows = windows_of(self.model)
        if self.name == "flex":
            return pack_flex(trees, windows, where)
        owner = attention_owner(self.model)
        additive = owner.dtype if attention_of(owner) == "eager" else None
        return pack_sdpa(trees, windows, self.row_width, additive).to(where)

    @property
    def row_width(self) -> int:
        """Tokens of a row with a dense mask: at twice the hidden size, attention is a quarter of a layer's work."""
        config: Any = attention_owner(self.model).config
        return 2 * int(getattr(config, "hidden_size", None) or config.n_embd)


def prepare(
    model: nn.Module,
    name: Name | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    *,
    probe: bool = True,
) -> Backend:
    """Set the model's attention for a back end and check that packed scores equal those of single sequences.

    Args:
        model: a causal LM, a `PeftModel` of one, or a `ValueModel`.
        name: `auto` is `tree` on CPU and `flex` on a GPU, and `padded` where the model cannot take it.
        device: where batches go; the model's device by default.
        probe: false where no forward can run yet (weights sharded before the engine exists). What the probe would
            catch then goes unnoticed, so prepare an unsharded twin of the model once.
    Raises:
        ModelError: a kind of model that cannot be scored; a forced back end that does not fit; or logits that the
            engine does not reproduce even on single sequences.
    """
    if name != "auto" and name not in NAMES:
        raise ConfigError(f"unknown back end `{name}`", mend=suggestion(name, ("auto", *NAMES)))
    refuse_unsuitable(model)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    plain = _plain_attention(model)
    if name != "auto":
        problem = _try(model, name, where, plain, probe)
        if problem:
            _set_plain(model, plain)
            raise ModelError(
                f"the `{name}` back end does not fit {_title(model)}", why=problem, mend=_mend(name, problem)
            )
        return Backend(name, "asked for", where, model)
    first: Name = "flex" if where.type == "cuda" else "tree"
    problem = _try(model, first, where, plain, probe)
    if not problem:
        reason = f"it is exact for {_title(model)}" if probe else f"the default on {where.type}, not probed"
        log.info("scoring with the `%s` back end: %s", first, reason)
        return Backend(first, reason, where, model)
    fallback = _try(model, "padded", where, plain, probe)
    if fallback:
        raise ModelError(f"{_title(model)} cannot be scored", why=fallback, mend=_mend("padded", fallback))
    log.warning("scoring with the `padded` back end: `%s` does not fit %s, %s", first, _title(model), problem)
    return Backend("padded", problem, where, model)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """The attention a model runs single sequences with, as `generate` needs it; a back end's own is put back.

    Under a back end's attention `generate` would drop a soft cap (`tree`), or compile for every length (`flex`).
    """
    owner = attention_owner(model)
    before = attention_of(owner)
    _set_plain(model, _plain_attention(model))
    try:
        yield
    finally:
        set_attention(owner, before)


def _try(model: nn.Module, name: Name, device: torch.device, plain: str, probe: bool) -> str:
    """Set the model up for a back end; why it does not fit, or nothing."""
    owner = attention_owner(model)
    problem = _unfit_by_configuration(model, name)
    if problem:
        return problem
    if not probe:
        return "" if _set(model, name, plain) else f"it does not accept the attention `{_attention_for(name, model)}`"
    try:
        for context in _computes(model, device):
            with probing.undisturbed(model), context:
                _set_plain(model, plain)
                trees = probing.probe_trees(model)
                expected = probing.reference(model, trees)
                if not _set(model, name, plain):
                    return f"it does not accept the attention `{_attention_for(name, model)}`"
                packed = Backend(name, "", device, model).pack(trees)
                problem = probing.difference(model, packed, expected)
            if problem:
                return problem
        return ""
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"its forward fails there ({type(error).__name__}: {first_line}, attention {attention_of(owner)})"
    except ModelError as error:
        return error.what


def _computes(model: nn.Module, device: torch.device) -> list[AbstractContextManager[Any]]:
    """In which dtypes to probe: on a GPU half precision runs other kernels than float32, so both must agree."""
    contexts: list[AbstractContextManager[Any]] = [nullcontext()]
    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if device.type == "cuda" and wide and torch.cuda.is_bf16_supported():
        contexts.append(torch.autocast(device.type, dtype=torch.bfloat16))
    return contexts


def _unfit_by_configuration(model: nn.Module, name: Name) -> str:
    other = windows_of(model).other
    if name != "padded" and other:
        return "it has layers of type " + ", ".join(other)
    return ""


def _attention_for(name: Name, model: nn.Module) -> str:
    if name == "tree":
        return TREE
    if name == "flex":
        return "flex_attention"
    return "eager" if caps_scores(model) else "sdpa"


def _set(model: nn.Module, name: Name, plain: str) -> bool:
    owner = attention_owner(model)
    if name == "padded":
        _set_plain(model, plain)
        return True
    return set_attention(owner, _attention_for(name, model)) or (name == "sdpa" and set_attention(owner, "eager"))


def _plain_attention(model: nn.Module) -> str:
    """What the model runs single sequences with: as it was loaded, unless a back end of ours was set before."""
    owner = attention_owner(model)
    if caps_scores(model):  # `sdpa` would drop the soft cap
        return "eager"
    loaded = attention_of(owner)
    return "sdpa" if loaded in (TREE, "flex_attention") else loaded


def _set_plain(model: nn.Module, plain: str) -> None:
    owner = attention_owner(model)
    if not set_attention(owner, plain):
        set_attention(owner, "eager")


def _title(model: nn.Module) -> str:
    return type(attention_owner(model)).__name__


def _mend(name: Name, problem: str) -> str:
    if name == "padded":
        return "the engine must know what this model does to its logits: see align/scoring/facts.py"
    return "use backend: auto, which falls back to `padded`"
