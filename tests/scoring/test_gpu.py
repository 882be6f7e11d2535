"""On a GPU: back ends, the log-probability kernel, step zero. Skipped where there is none."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from align.scoring import head
from align.scoring.backends import Backend, prepare
from align.scoring.engine import score
from align.scoring.facts import LogitTransform
from align.scoring.layout import Tree
from align.testing.tiny import random_pairs, save_tiny, tiny_model
from tests.scoring.golden import curved_loss, golden_logp, gradient_error, gradients

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.timeout(600),
]

LOGP_BAR = GRADIENT_BAR = 1e-5
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.05}
FAMILIES = ["llama", "qwen3", "mistral", "gemma2"]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def trees_of(branches: int, seed: int = 0, count: int = 5, longest: int = 90) -> list[Tree]:
    rng = np.random.default_rng(seed)

    def draw() -> list[int]:
        return rng.integers(0, 320, rng.integers(1, longest)).tolist()

    return [Tree.of(draw(), [draw() for _ in range(branches)]) for _ in range(count)]


def models(family: str, name: str) -> tuple[nn.Module, nn.Module, Backend]:
    """The model on the GPU, its plain twin on the CPU, and the prepared back end."""
    own = {"query_pre_attn_scalar": 32} if family == "gemma2" else {}
    model = tiny_model(family, seed=3, **SIZES, **own)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    model.cuda()
    return model, twin, prepare(model, name)  # type: ignore[arg-type]


def to_cpu(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.cpu() for name, grad in grads.items()}


@pytest.mark.parametrize("branches", [2, 8])
@pytest.mark.parametrize("name", ["tree", "flex", "sdpa", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_that_of_single_sequences_on_a_cpu(family: str, name: str, branches: int) -> None:
    model, twin, backend = models(family, name)
    trees = trees_of(branches)
    expected = golden_logp(twin, trees)
    found = score(model, backend.pack(trees))["logp"]
    error = float((found.cpu() - expected).detach().abs().max())
    wanted = gradients(twin, curved_loss(expected))
    gradient, where = gradient_error(to_cpu(gradients(model, curved_loss(found))), wanted)
    print(f"MEASURED float32 {family} {name} K={branches}: logp {error:.1e}, gradient {gradient:.1e}")
    assert error <= LOGP_BAR
    assert gradient <= GRADIENT_BAR, where


@pytest.mark.parametrize("branches", [2, 8])
@pytest.mark.parametrize("name", ["tree", "flex"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_no_more_than_padded_sequences(family: str, name: str, branches: int) -> None:
    trees = trees_of(branches)
    errors: dict[str, tuple[float, float]] = {}
    for one in (name, "padded"):
        model, twin, backend = models(family, one)
        expected = golden_logp(twin, trees)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = score(model, backend.pack(trees))["logp"]
        error = float((found.cpu() - expected).detach().abs().mean())
        wanted = gradients(twin, curved_loss(expected))
        errors[one] = error, gradient_error(to_cpu(gradients(model, curved_loss(found))), wanted)[0]
    print(f"MEASURED bfloat16 {family} {name} K={branches}: {errors}")
    assert 1e-4 < errors[name][0] <= 1.3 * errors["padded"][0]
    assert errors[name][1] <= 1.5 * errors["padded"][1]


def test_auto_on_a_gpu() -> None:
    chosen = {family: models(family, "auto")[2].name for family in FAMILIES}
    print("MEASURED auto", chosen)
    assert set(chosen.values()) == {"flex"}


def test_flex_is_not_compiled_again_for_every_length() -> None:
    model, _, backend = models("qwen3", "flex")

    def run(seed: int) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            score(model, backend.pack(trees_of(2, seed, count=2 + seed)))["logp"].sum().backward()

    from torch._dynamo.utils import counters

    for seed in range(3):
        run(seed)
    before = counters["stats"]["unique_graphs"]
    for seed in range(3, 12):
        run(seed)
    print("MEASURED flex graphs", before, counters["stats"]["unique_graphs"])
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [LogitTransform(), LogitTransform(0.7, 5.0)])
def test_the_kernel_of_the_head_agrees_with_our_chunks(
    rule: LogitTransform, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 50_001, bias=False, device="cuda")
    hidden = torch.randn(700, 256, device="cuda", requires_grad=True)
    targets, upstream = torch.randint(0, 50_001, (700,), device="cuda"), torch.rand(700, device="cuda")

    def run(kernel: bool) -> list[Tensor]:
        monkeypatch.setattr(head, "_takes_kernel", lambda *a: kernel)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logp = head.evaluate(layer, hidden, targets, ("logp",), rule)["logp"]
        return [logp.detach(), *torch.autograd.grad((logp * upstream).sum(), [hidden, layer.weight])]

    exact = torch.nn.functional.linear(hidden.double(), layer.weight.double())
    exact = exact * rule.scale
    if rule.cap is not None:
        exact = torch.tanh(exact / rule.cap) * rule.cap
    exact = exact.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    wanted = [exact, *torch.autograd.grad((exact * upstream).sum(), [hidden, layer.weight])]
    bar = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for kernel in (True, False):
        errors = [float((a.double() - b).norm() / b.double().norm()) for a, b in zip(run(kernel), wanted, strict=True)]
        print(f"MEASURED head kernel={kernel} {dtype} {rule}: {errors}")
        assert max(errors) <= bar


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_starts_at_log_two_and_keeps_float32_weights(dtype: str, tmp_path: Path) -> None:
    from align.trainers import AlignConfig, PreferenceTrainer

    folder = save_tiny(tmp_path / "model", "qwen3", **SIZES)
    args = AlignConfig(
        output_dir=str(tmp_path / "run"),
        global_batch_size=8,
        max_steps=3,
        logging_steps=1,
        dtype=dtype,
        learning_rate=1e-3,
        warmup_steps=0,
        save_strategy="no",
    )
    trainer = PreferenceTrainer(model=str(folder), method="dpo", args=args, train_dataset=random_pairs(32))
    losses = []
    trainer.add_callback(_recorder(losses))
    trainer.train()
    print("MEASURED dpo", dtype, losses)
    assert abs(losses[0] - math.log(2)) <= (2e-3 if dtype == "bfloat16" else 1e-5)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.optimizer is not None
    states = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.dim()]
    assert states and {v.dtype for v in states} == {torch.float32}


def _recorder(losses: list[float]) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    return Recorder()
