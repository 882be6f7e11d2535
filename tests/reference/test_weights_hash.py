"""Hashes of weights: one bit, one name or one number of the configuration changes them; the place does not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from align.core.errors import ModelError
from align.reference.weights_hash import folder_hash, module_hash, tensors_hash
from align.testing.tiny import tiny_model


def test_modules() -> None:
    first, second = tiny_model("qwen3"), tiny_model("qwen3")
    start = module_hash(first)
    assert module_hash(second) == start
    assert module_hash(tiny_model("qwen3", seed=1)) != start
    assert module_hash(tiny_model("qwen3", rms_norm_eps=1e-5)) != start, "the configuration counts"
    second.config._name_or_path = "elsewhere"
    second.config.use_cache = False
    assert module_hash(second) == start, "what changes no number does not"
    with torch.no_grad():
        next(second.parameters()).view(-1).view(torch.int32)[0] ^= 1
    assert module_hash(second) != start


def test_tensors() -> None:
    weight = torch.arange(6, dtype=torch.float32)
    start = tensors_hash({"a": weight, "b": weight})
    assert tensors_hash({"b": weight, "a": weight.clone()}) == start
    assert tensors_hash({"a": weight, "c": weight}) != start
    assert tensors_hash({"a": weight, "b": weight.reshape(2, 3)}) != start
    assert tensors_hash({"a": weight, "b": weight.to(torch.bfloat16)}) != start
    assert tensors_hash({"a": weight.reshape(2, 3).T, "b": weight}) != start
    assert tensors_hash({"a": torch.empty(0), "b": torch.tensor(1.0)}) != start


def test_sharded_weights_have_no_hash_of_their_own() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="sharded"):
        tensors_hash({"weight": parameter})


def test_folders(tmp_path: Path) -> None:
    folder, memo = tmp_path / "model", tmp_path / "memo"
    tiny_model("qwen3").save_pretrained(folder)
    start = folder_hash(folder, memo)
    assert folder_hash(folder, memo) == folder_hash(folder) == start
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert folder_hash(moved, memo) == start
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert folder_hash(moved, memo) != start
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file)
    assert folder_hash(folder, memo) != start
    with pytest.raises(ModelError, match="no safetensors"):
        folder_hash(memo)


def test_a_memo_spares_the_reading(tmp_path: Path) -> None:
    folder, memo = tmp_path / "model", tmp_path / "memo"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    start = folder_hash(folder, memo)
    note = next(memo.iterdir())
    note.write_text("0" * 32)
    assert folder_hash(folder, memo) != start, "the note is believed"
    note.write_text("cut")
    assert folder_hash(folder, memo) == start, "half a note is not"
