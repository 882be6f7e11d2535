"""What of the GPU benchmark does not need a GPU: cases, sizes, summaries."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from bench import gpu, gpu_side


def test_a_case_is_read_from_its_text() -> None:
    assert gpu.Case.of("3b:hh:64") == gpu.Case("3b", "hh", 64, cached=False)
    assert gpu.Case.of("0.5b:ultrafeedback:32:cached").name == "0.5b-ultrafeedback-b32-cached"


@pytest.mark.parametrize(("text", "reason"), [("3b:hh", "SIZE:DATA"), ("7b:hh:8", "7b"), ("3b:hh:8:cash", "cash")])
def test_a_wrong_case_is_refused(text: str, reason: str) -> None:
    with pytest.raises(SystemExit, match=reason):
        gpu.Case.of(text)


@pytest.mark.parametrize(("size", "millions"), [("0.5b", 494), ("3b", 3086)])
def test_model_sizes(size: str, millions: float) -> None:
    model = gpu_side.model_of(size, "meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_clock_starts_in_the_second_epoch_of_our_cached_run() -> None:
    setting = {"warm": 3, "windows": 2, "steps": 4, "cached": True, "side": "ours"}
    assert gpu_side._first_step(setting) == 14
    assert gpu_side._first_step(setting | {"side": "trl"}) == 3
    assert gpu_side._first_step(setting | {"cached": False}) == 3


def test_a_summary_takes_the_median_of_all_windows() -> None:
    facts = {"mean_prompt_tokens": 10.0, "mean_chosen_tokens": 4.0, "mean_rejected_tokens": 6.0}
    runs: list[Any] = [
        {"pairs_per_second": rates, "peak_gpu_bytes": peak * 2**30, "losses": [0.5]}
        for rates, peak in (([1.0, 9.0], 3), ([5.0], 2))
    ]
    found = gpu._summary(gpu.Case("0.5b", "hh", 8), runs, facts, Namespace(peak_tflops=100.0))
    assert found["pairs_per_second"] == 5.0 and found["windows"] == 3 and found["pairs_per_second_range"] == [1.0, 9.0]
    assert found["unique_tokens_per_second"] == 100.0 and found["peak_gpu_gib"] == 3
    cached = gpu._summary(gpu.Case("0.5b", "hh", 8, True), runs, facts, Namespace(peak_tflops=100.0))
    assert cached["utilisation"] == pytest.approx(0.75 * found["utilisation"])
