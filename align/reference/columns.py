"""Frozen policies as named columns: where the log-probs of a reference come from.

A column is asked once per micro-batch and answers with [N, T] tensors without gradient, under the names that views use:
`ref_logp` of the column `ref` is `logp` of the frozen model. Call it in the policy's own autocast context, otherwise
the two differ by the rounding of the compute dtype at step zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from align.core.errors import CheckpointError, ConfigError, DataError, ModelError
from align.reference.store import MemoryStore, entry_key
from align.scoring.engine import score
from align.scoring.layout import PackedBatch, Tree

Score = Callable[[PackedBatch, Collection[str]], Mapping[str, Tensor]]
"""(packed, functionals) -> functional -> [N, T]: how a column calls its model, perhaps through the wrapped module."""


class Column(Protocol):
    """A frozen policy. `name` is `ref`, `previous`, `guide`, ...

    `model`, entered in `context()`, is the `other` of `kl_*` functionals; None where there is no live model.
    """

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> nn.Module | None: ...

    def context(self) -> AbstractContextManager[Any]: ...

    def column(self, packed: PackedBatch, trees: Sequence[Tree], needs: Collection[str]) -> dict[str, Tensor]:
        """`{name}_{functional}` -> [N, T] for those of `needs` that are this policy's; others are left out."""
        ...

    def check(self, needs: Collection[str]) -> None:
        """Refuse, with a `ConfigError`, needs that this kind of column can never give."""
        ...


class Lookup(Protocol):
    """What `Cached` reads and writes: a `LogpStore`, or a `MemoryStore` of values that came with the data."""

    def get_many(self, keys: Sequence[bytes]) -> list[np.ndarray | None]: ...

    def put_many(self, entries: Mapping[bytes, np.ndarray]) -> None: ...


class Frozen:
    """A second copy of a model: evaluation mode, no gradients.

    Args:
        model: the copy. It may be replaced later by its wrapped form (`prepare_deepspeed`).
        name: the column's name.
        call: how to score it; `scoring.engine.score` of `model` by default.
    """

    def __init__(self, model: nn.Module, name: str = "ref", call: Score | None = None) -> None:
        self.name = name
        self._call = call
        self.model = model

    @property
    def model(self) -> nn.Module:
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model.eval().requires_grad_(False)

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check(self, needs: Collection[str]) -> None:
        """A live model gives everything."""

    def column(self, packed: PackedBatch, trees: Sequence[Tree], needs: Collection[str]) -> dict[str, Tensor]:
        own = _own_functionals(self.name, needs)
        if not own:
            return {}
        with torch.no_grad():
            outputs = self._call(packed, own) if self._call else score(self._model, packed, own)
        return {f"{self.name}_{functional}": outputs[functional].detach() for functional in own}


class AdapterOff:
    """The policy with its adapter switched off: the base model, without a second copy.

    Args:
        policy: the unwrapped peft model.
        call: how to score it, through the wrapped module so that its hooks run; the policy itself by default.
        name: the column's name.
    """

    def __init__(self, policy: nn.Module, call: Score | None = None, name: str = "ref") -> None:
        if not hasattr(policy, "disable_adapter"):
            raise ConfigError(
                "reference `adapter_off` needs a policy with an adapter",
                mend="train with `peft`, or take the reference `frozen`",
            )
        self.name = name
        self.model = policy
        self._call = call

    @contextmanager
    def context(self) -> Iterator[None]:
        """Adapter off, evaluation mode."""
        policy: Any = self.model
        with _evaluating(policy), policy.disable_adapter():
            yield

    def check(self, needs: Collection[str]) -> None:
        """A live model gives everything."""

    def column(self, packed: PackedBatch, trees: Sequence[Tree], needs: Collection[str]) -> dict[str, Tensor]:
        own = _own_functionals(self.name, needs)
        if not own:
            return {}
        with torch.no_grad(), self.context():
            outputs = self._call(packed, own) if self._call else score(self.model, packed, own)
        return {f"{self.name}_{functional}": outputs[functional].detach() for functional in own}


class Cached:
    """Log-probs from a store; what is missing is computed by `live`, stored, and returned.

    Every call runs at most one forward pass of `live`. Where that pass is a collective (ZeRO-3, FSDP), pass
    `any_rank`: then either all ranks run it or none does.

    Args:
        store: a `LogpStore`, or a `MemoryStore` of supplied values.
        live: the column that computes what is missing; None refuses instead.
        pack: packs the trees that lack a value; without it the whole micro-batch is computed.
        name: the column's name; that of `live` by default.
        any_rank: whether a bool is true on any rank.

    Raises:
        ConfigError: `live` changes while training (`Ema`), or a `kl_*` is asked for.
    """

    model = None

    def __init__(
        self,
        store: Lookup,
        live: Column | None = None,
        pack: Callable[[Sequence[Tree]], PackedBatch] | None = None,
        name: str = "ref",
        any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        if isinstance(live, Ema):
            raise ConfigError(
                "a moving reference (`ema`) cannot be cached",
                why="its log-probs change while training",
                mend="take the reference `frozen` with a cache, or `ema` without one",
            )
        self.name = live.name if live is not None else name
        self._store, self._live, self._pack, self._any_rank = store, live, pack, any_rank

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check(self, needs: Collection[str]) -> None:
        own = {f"{self.name}_{functional}" for functional in _own_functionals(self.name, needs)}
        refused = sorted(need for need in needs if need.startswith("kl_") or need in own - {f"{self.name}_logp"})
        if refused:
            raise ConfigError(
                f"a cached `{self.name}` holds log-probs only, not " + ", ".join(f"`{need}`" for need in refused),
                why="these need the frozen model's distribution over the vocabulary in the same pass",
                mend="take a live reference (frozen, adapter_off or ema)",
            )

    def column(self, packed: PackedBatch, trees: Sequence[Tree], needs: Collection[str]) -> dict[str, Tensor]:
        self.check(needs)
        if not _own_functionals(self.name, needs):
            return {}
        keys = [_tree_keys(tree) for tree in trees]
        found = iter(self._store.get_many([key for tree_keys in keys for key in tree_keys]))
        values = [[next(found) for _ in tree_keys] for tree_keys in keys]
        missing = [i for i, row in enumerate(values) if any(v is None for v in row)]
        if self._any_rank(bool(missing)):
            self._compute(packed, trees, keys, values, missing)
        flat = [v for row in values for v in row if v is not None]
        return {f"{self.name}_logp": _grid(flat, _device(packed))}

    def _compute(
        self,
        packed: PackedBatch,
        trees: Sequence[Tree],
        keys: Sequence[Sequence[bytes]],
        values: list[list[np.ndarray | None]],
        missing: Sequence[int],
    ) -> None:
        """Fill `values` of the missing trees in place and store them."""
        live = self._live
        if live is None:
            raise DataError(
                f"{len(missing)} of {len(trees)} groups have no `{self.name}_logp`",
                mend="supply it for every completion, or name a reference model",
            )
        repack = self._pack is not None and 0 < len(missing) < len(trees)
        chosen = list(missing) if repack else list(range(len(trees)))
        batch = self._pack([trees[i] for i in chosen]) if repack and self._pack else packed
        need = f"{self.name}_logp"
        rows = iter(live.column(batch, [trees[i] for i in chosen], {need})[need].float().cpu().numpy())
        lacking = set(missing)
        fresh: dict[bytes, np.ndarray] = {}
        for i in chosen:
            computed = [next(rows)[: len(branch)].copy() for branch in trees[i].branches]
            if i in lacking:
                values[i] = list(computed)
                fresh.update(zip(keys[i], computed, strict=True))
        self._store.put_many(fresh)


class Ema:
    """A moving reference (TR-DPO): every `every` steps, reference <- alpha * policy + (1 - alpha) * reference.

    Source: arXiv 2404.09656, the soft update; `alpha` 1 is its hard update. `alpha` is the weight of the policy, which
    other writers call one minus the decay. The copy is held in float32: at bfloat16 a small `alpha` moves nothing.

    Args:
        model: a copy of the policy with the same parameter names; not shared with it.
        alpha: weight of the policy, in (0, 1].
        every: optimiser steps between updates.
    """

    def __init__(
        self, model: nn.Module, alpha: float, every: int = 1, name: str = "ref", call: Score | None = None
    ) -> None:
        if not 0.0 < alpha <= 1.0:
            raise ConfigError(f"`alpha` of an EMA reference is {alpha}", mend="the policy's weight lies in (0, 1]")
        if every < 1:
            raise ConfigError(f"`every` of an EMA reference is {every}", mend="count optimiser steps from 1")
        self.alpha, self.every, self.steps = alpha, every, 0
        self._frozen = Frozen(model.float(), name, call)

    @property
    def name(self) -> str:
        return self._frozen.name

    @property
    def model(self) -> nn.Module:
        return self._frozen.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._frozen.model = model

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check(self, needs: Collection[str]) -> None:
        """A live model gives everything."""

    def column(self, packed: PackedBatch, trees: Sequence[Tree], needs: Collection[str]) -> dict[str, Tensor]:
        return self._frozen.column(packed, trees, needs)

    @torch.no_grad()
    def after_step(self, policy: nn.Module) -> None:
        """Call after each optimiser step. Sharded parameters are moved shard by shard; the update is elementwise."""
        self.steps += 1
        if self.steps % self.every:
            return
        sources = dict(_plain_names(policy))
        for name, target in _plain_names(self.model):
            source = sources.get(name)
            if source is None:
                raise ModelError(f"the policy has no parameter `{name}`", why="an EMA copies the policy's names")
            ours, theirs = _shard(target), _shard(source)
            if ours.shape != theirs.shape:
                raise ModelError(f"`{name}` is {tuple(theirs.shape)} in the policy, {tuple(ours.shape)} in its EMA")
            ours.lerp_(theirs.to(dtype=ours.dtype, device=ours.device), self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """`steps` and the (local) weights."""
        weights = {name: _shard(parameter).clone() for name, parameter in _plain_names(self.model)}
        return {"steps": self.steps, "weights": weights}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own, saved = dict(_plain_names(self.model)), state["weights"]
        if own.keys() != saved.keys():
            odd = sorted(own.keys() ^ saved.keys())
            raise CheckpointError("the saved EMA reference is of another model", why="differing: " + ", ".join(odd[:5]))
        for name, parameter in own.items():
            _shard(parameter).copy_(saved[name])
        self.steps = int(state["steps"])


def supplied(
    rows: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], store: MemoryStore | None = None
) -> MemoryStore:
    """Log-probs that came with the data, for `Cached(supplied(rows))`.

    Args:
        rows: (prompt ids [P], completion ids [T], scored [T], log-prob of each completion token [T]).
        store: an earlier result to add to.

    Raises:
        DataError: a completion and its log-probs differ in length.
    """
    store = MemoryStore() if store is None else store
    for prompt, completion, scored, logp in rows:
        if len(logp) != len(completion):
            raise DataError(
                f"a completion of {len(completion)} tokens comes with {len(logp)} reference log-probs",
                mend="supply one number per completion token, the end token included",
            )
        values = np.where(np.asarray(scored, dtype=bool), np.asarray(logp, dtype=np.float32), np.float32(0))
        store.put_many({entry_key(prompt, completion, scored): values.astype(np.float32)})
    return store


def _own_functionals(name: str, needs: Collection[str]) -> list[str]:
    prefix = f"{name}_"
    return sorted(need.removeprefix(prefix) for need in needs if need.startswith(prefix))


def _tree_keys(tree: Tree) -> list[bytes]:
    return [entry_key(tree.prompt, ids, scored) for ids, scored in zip(tree.branches, tree.scored, strict=True)]


def _grid(values: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """[N, T] float32, zeros behind each row's end."""
    grid = np.zeros((len(values), max((len(row) for row in values), default=0)), dtype=np.float32)
    for row, target in zip(values, grid, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(grid).to(device)


def _device(packed: PackedBatch) -> torch.device:
    return packed.input_ids.device


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and each submodule's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _plain_names(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by name, without the prefix that wrappers (DDP, DeepSpeed) put before it."""
    for name, parameter in module.named_parameters():
        yield name.removeprefix("module."), parameter


def _shard(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: all of it, its ZeRO-3 partition, or its DTensor's local part."""
    partition: Tensor | None = getattr(parameter, "ds_tensor", None)
    if partition is not None:
        return partition
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter.data
    return local
