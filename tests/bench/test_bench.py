"""The benchmarks' rows, models and arithmetic; the measurements themselves are not run here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import data, models
from bench.gpu import flops_per_pair
from bench.machine import provenance
from bench.offline import loss_difference, summary
from bench.profile_step import Stopwatch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rows", [data.ultrafeedback_like(8189), data.worst_case(8189)], ids=["ultrafeedback", "worst"])
def test_one_word_is_one_token(rows: list[data.Row]) -> None:
    """For the prompt alone, and for prompt, response and end token encoded together."""
    tokenizer = models.word_tokenizer(8192)
    for row in rows[:20]:
        prompt = tokenizer(row["prompt"]).input_ids
        assert len(prompt) == len(row["prompt"].split())
        for name in ("chosen", "rejected"):
            joint = tokenizer(row["prompt"] + row[name] + tokenizer.eos_token).input_ids
            assert joint[: len(prompt)] == prompt
            assert len(joint) - len(prompt) == len(row[name].split()) + 1
            assert joint[-1] == tokenizer.eos_token_id and tokenizer.pad_token_id not in joint


def test_lengths_are_as_described() -> None:
    lengths = np.array([[len(text.split()) for text in row.values()] for row in data.ultrafeedback_like(8189)])
    assert 130 < lengths[:, 0].mean() < 170
    assert 270 < lengths[:, 1:].mean() < 330
    assert (lengths[:, 0] + lengths[:, 1:].max(1) + 1).max() <= 1024
    worst = np.array([[len(text.split()) + 1 for text in row.values()] for row in data.worst_case(8189)])
    assert (worst == [2, 300, 300]).all()


def test_generators_are_seeded() -> None:
    assert data.ultrafeedback_like(100, 5) == data.ultrafeedback_like(100, 5)
    assert data.ultrafeedback_like(100, 5) != data.ultrafeedback_like(100, 5, seed=9)


def test_hh() -> None:
    if data.hh_path() is None:
        pytest.skip(f"{data.HH_FILE} is not at hand: put it in ../shared/data or name its folder in ALIGN_SHARED")
    rows = data.hh_rows()
    assert len(rows) > 2000
    for row in rows:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in row["chosen"] and row["chosen"] != row["rejected"]


@pytest.mark.parametrize(("size", "millions"), [("7m", 7.2), ("59m", 59.2)])
def test_model_sizes(size: models.Size, millions: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(models, "word_tokenizer", lambda _: _Tokenizer())
    with torch.device("meta"):
        facts = models.build(size, "worst", [], tmp_path)
    assert facts["parameters"] / 1e6 == pytest.approx(millions, rel=0.02)


class _Tokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """The tokenizer is not what this test is about."""

    def __len__(self) -> int:
        return 1


def test_summary() -> None:
    def side(speeds: list[float], memory: int, losses: list[float]) -> list[dict[str, Any]]:
        return [
            {"pairs_per_second": s, "seconds_per_pair": 1 / s, "peak_rss_bytes": memory, "losses": losses}
            for s in speeds
        ]

    found = summary(
        {"ours": side([10.0, 12.0, 9.0], 2**30, [0.5, 0.4]), "trl": side([2.0, 2.0, 3.0], 2**31, [0.5, 0.3])}
    )
    assert found["ours"]["pairs_per_second"] == 10.0
    ratio = found["ours/trl"]
    assert (ratio["speed"], ratio["speed_least"], ratio["memory"]) == (5.0, 3.0, 0.5)
    assert ratio["largest_loss_difference"] == pytest.approx(0.1)
    assert math.isnan(loss_difference([], []))


def test_flops() -> None:
    """A model without layers is its head: 2 H V per response token and pass."""
    shape = models.Shape(vocabulary=10, hidden=3, layers=0, heads=1, kv_heads=1, head_dim=3, intermediate=1)
    lengths = {"mean_prompt_tokens": 7.0, "mean_chosen_tokens": 2.0, "mean_rejected_tokens": 3.0}
    assert flops_per_pair(shape, lengths) == 4 * 2 * 3 * 10 * 5


def test_the_stopwatch_is_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.profile_step.time.perf_counter", lambda: now[0])

    class Work:
        def outer(self) -> None:
            now[0] += 1.0
            self.inner()
            now[0] += 2.0

        def inner(self) -> None:
            now[0] += 5.0

    watch = Stopwatch()
    watch.wrap(Work, "outer", "outer")
    watch.wrap(Work, "inner", "inner")
    Work().outer()
    assert watch.seconds == {"outer": 3.0, "inner": 5.0}


def test_provenance() -> None:
    found = provenance()
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] and json.dumps(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "this benchmark needs an NVIDIA GPU and a CUDA build of torch; there is none here"
