"""Models that give one number for a whole sequence: read from folders, run in batches that do not change the number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from align.core.errors import ConfigError, ModelError, suggestion
from align.core.progress import Progress, silent
from align.reference.weights_hash import module_hash
from align.scoring.backends import Backend, prepare
from align.scoring.batching import plan
from align.scoring.layout import Tree
from align.scoring.loading import DTYPES, first_line, load_tokenizer, refuse_config
from align.scoring.value import KIND_FILE, ValueModel, score_values

BUDGET = {"cpu": 4096, "cuda": 32768}
"""Tokens of one pass, padding included."""


class Sequencer(Protocol):
    """ids -> one row of numbers a sequence. `positions` is the longest sequence; `key` what determines the numbers."""

    positions: int | None
    key: dict[str, Any]

    def __call__(self, rows: Sequence[Sequence[int]], progress: Progress = silent) -> np.ndarray:
        """float64 [N, L]."""
        ...


@dataclass(eq=False)
class Classifier:
    """A sequence classification model.

    Rows are sorted by length, batched by `budget` tokens with their padding, and padded on the right. The number of a
    row is read where the model itself reads it: at its last token that is no padding. Where the model names no padding
    token, an id that the batch does not hold pads, so that the last token is meant.
    """

    model: nn.Module
    budget: int | None = None

    def __post_init__(self) -> None:
        self.model.eval()
        config: Any = self.model.config
        self._pad: int | None = config.pad_token_id
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self.device = next(self.model.parameters()).device
        self.key = {"weights": module_hash(self.model), "dtype": str(next(self.model.parameters()).dtype)}

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Sequence[int]], progress: Progress = silent) -> np.ndarray:
        labels = int(self.model.config.num_labels)  # type: ignore[union-attr,arg-type]
        out = np.zeros((len(rows), labels))
        for batch in self._batches([len(row) for row in rows]):
            out[batch] = self._logits([rows[i] for i in batch])
            progress(len(batch))
        return out

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Longest first, so that the first row of a batch is as wide as the batch."""
        budget = self.budget or BUDGET.get(self.device.type, BUDGET["cpu"])
        batches: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        config: Any = self.model.config
        pad = self._pad if self._pad is not None else _absent(rows, int(config.vocab_size))
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
            mask[number, : len(row)] = 1
        config.pad_token_id = pad
        try:
            found = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
        finally:
            config.pad_token_id = self._pad
        return found.double().cpu().numpy()  # type: ignore[no-any-return]


@dataclass(eq=False)
class Valued:
    """A value model that was trained here: V of the state after the last token."""

    model: ValueModel
    backend: Backend
    budget: int | None = None

    def __post_init__(self) -> None:
        self.model.eval()
        self.positions: int | None = getattr(self.model.config, "max_position_embeddings", None)
        dtype = str(next(self.model.trunk.parameters()).dtype)
        self.key = {"weights": module_hash(self.model), "dtype": dtype, "backend": self.backend.name}

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Sequence[int]], progress: Progress = silent) -> np.ndarray:
        out = np.zeros((len(rows), 1))
        budget = self.budget or BUDGET.get(self.backend.device.type, BUDGET["cpu"])
        for batch in plan([len(row) for row in rows], budget=budget)[0] if rows else []:
            trees = [Tree.of(rows[i][:-1], [rows[i][-1:]]) for i in batch]
            out[batch, 0] = score_values(self.model, self.backend.pack(trees))["value"][:, 1].double().cpu().numpy()
            progress(len(batch))
        return out


def load_sequencer(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    budget: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Classifier | Valued, Any]:
    """(a reward or preference model, its tokenizer) from a folder or hub id.

    Raises:
        ModelError: it cannot be loaded, or it has no trained head: transformers would make one up at random.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = DTYPES.get(dtype, torch.float32 if where.type == "cpu" else torch.bfloat16)
    if (Path(name) / KIND_FILE).is_file():
        told = json.loads((Path(name) / KIND_FILE).read_text())
        if told.get("kind") != "value":
            raise ModelError(f"a model of kind {told.get('kind')!r} gives no rewards", where=name)
        value = ValueModel.from_pretrained(name, dtype=kind).to(where).requires_grad_(False)
        return Valued(value, prepare(value), budget), load_tokenizer(name, trust_remote_code)
    try:
        model, told = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=kind, use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            "the model cannot be loaded",
            where=name,
            why=first_line(error),
            mend="check the path or id; it must be a sequence classification model in safetensors",
        ) from error
    refuse_config(model.config, name)
    if told["missing_keys"]:
        raise ModelError(
            "this is no reward model: its head is not among the saved weights",
            where=name,
            why=f"missing: {', '.join(sorted(told['missing_keys'])[:4])}; they would be random",
            mend="give a model that was trained and saved with its head",
        )
    return Classifier(model.to(where).requires_grad_(False), budget), load_tokenizer(name, trust_remote_code)


def column_of(sequencer: Classifier | Valued, label: str | int | None) -> Callable[[np.ndarray], np.ndarray]:
    """[N, L] logits -> [N] numbers: the single logit, or the log-odds of `label` against the other labels.

    Raises:
        ConfigError: several labels and none chosen, or no such label.
    """
    if isinstance(sequencer, Valued):
        return _only(label, 1)
    config: Any = sequencer.model.config
    count = int(config.num_labels)
    if count == 1:
        return _only(label, 1)
    names = {str(value): int(key) for key, value in config.id2label.items()}
    if label is None:
        raise ConfigError(
            f"the model has {count} labels, and `label` does not say which is the good one",
            mend="set `label` to one of " + ", ".join(names),
        )
    index = names.get(str(label), label if isinstance(label, int) and 0 <= label < count else None)
    if index is None:
        raise ConfigError(f"the model has no label `{label}`", mend=suggestion(str(label), names))
    chosen = int(index)

    def log_odds(logits: np.ndarray) -> np.ndarray:
        others = np.delete(logits, chosen, axis=1)
        top = others.max(axis=1, keepdims=True)
        rest = np.log(np.exp(others - top).sum(axis=1)) + top[:, 0]
        return logits[:, chosen] - rest  # type: ignore[no-any-return]

    return log_odds


def _only(label: str | int | None, count: int) -> Callable[[np.ndarray], np.ndarray]:
    if label is not None:
        raise ConfigError(f"`label` is {label!r}, and the model has {count} output", mend="leave `label` out")
    return lambda logits: logits[:, 0]


def _absent(rows: Sequence[Sequence[int]], vocabulary: int) -> int:
    used = {int(token) for row in rows for token in row}
    return next((token for token in range(vocabulary) if token not in used), 0)
