"""Attention over prompt trees and the log-probability head on a GPU in bfloat16: milliseconds and peak memory.

    python -m bench.gpu_kernels --out kernels.json

Every figure is the median of 10 timed runs of forward and backward after 3 warm-up runs, by CUDA events.
Attention: one layer of the 0.5 B and 3 B shapes over a row of pairs with HH's or UltraFeedback's lengths. Head: 4,096
response tokens and a vocabulary of 151,936, ours in chunks, TRL's kernel, and plain float32 logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import provenance

VOCABULARY = 151_936
HEADS = {"0.5b": (14, 2, 64), "3b": (16, 2, 128)}
PAIRS = {"hh": (64, 126, (41, 52)), "ultrafeedback": (24, 150, (300, 300))}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "gpu-kernels", "device": torch.cuda.get_device_name(0), **provenance()}
    result["masks"] = guarded(masks)
    for shape in HEADS:
        for data in PAIRS:
            result[f"attention-{shape}-{data}"] = guarded(partial(attention, shape, data))
            print(shape, data, json.dumps(result[f"attention-{shape}-{data}"]), flush=True)
    for hidden in (896, 2048):
        result[f"head-{hidden}"] = guarded(partial(heads, hidden))
        print("head", hidden, json.dumps(result[f"head-{hidden}"]), flush=True)
    text = json.dumps(result, indent=1)
    print(json.dumps(result["masks"]))
    if options.out is not None:
        options.out.write_text(text + "\n")


def guarded(body: Callable[[], Any]) -> Any:
    """The result, or the error's first line: one kernel that fails must not cost the others' figures."""
    import torch

    try:
        return body()
    except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    finally:
        torch.cuda.empty_cache()


def timed(body: Callable[[], Any], warm: int = 3, runs: int = 10) -> dict[str, float]:
    """Median milliseconds, and what it allocates beyond what stood before, in MiB."""
    import torch

    for _ in range(warm):
        body()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        body()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": round(statistics.median(times), 3), "peak_mib": round(peak / 2**20, 1)}


def row(data: str, seed: int = 0) -> Any:
    """Trees of pairs with log-normal lengths around the data set's means."""
    from align.scoring.layout import Tree

    count, prompt, responses = PAIRS[data]
    rng = np.random.default_rng(seed)

    def draw(mean: float) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(mean) - 0.125, 0.5), 2, 4 * mean))
        return rng.integers(0, 1000, length).tolist()

    return [Tree.of(draw(prompt), [draw(mean) for mean in responses]) for _ in range(count)]


def masks() -> dict[str, Any]:
    """Seconds to make a batch's block mask, by length of its row."""
    from align.scoring.facts import Windows
    from align.scoring.packing import pack_flex

    found = {}
    for times in (1, 2):
        trees = row("hh") * times
        tokens = sum(tree.tokens for tree in trees)
        found[f"flex-{tokens}"] = timed(partial(pack_flex, trees, Windows(), "cuda"), 1, 3)
        found[f"tree-{tokens}"] = timed(partial(_tree_on_card, trees), 1, 3)
    return found


def _tree_on_card(trees: Any) -> Any:
    from align.scoring.packing import pack_tree

    return pack_tree(trees).to("cuda")


def attention(shape: str, data: str) -> dict[str, Any]:
    """One layer, forward and backward: `tree` and `flex`."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from align.scoring.attention import tree_attention
    from align.scoring.facts import Windows
    from align.scoring.packing import pack_flex, pack_tree

    heads, kv_heads, size = HEADS[shape]
    trees = row(data)
    found: dict[str, Any] = {"trees": len(trees), "tokens": sum(tree.tokens for tree in trees)}
    compiled = torch.compile(flex_attention, dynamic=True)
    module = torch.nn.Module()

    def inputs(length: int) -> list[Any]:
        options: Any = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
        return [torch.randn(1, n, length, size, **options) for n in (heads, kv_heads, kv_heads)]

    packed = pack_tree(trees).to("cuda")
    qkv = inputs(packed.input_ids.shape[1])
    upstream = torch.randn(1, qkv[0].shape[2], heads, size, device="cuda", dtype=torch.bfloat16)

    def tree() -> None:
        out, _ = tree_attention(module, qkv[0], qkv[1], qkv[2], None, tree_layout=packed.attention)
        torch.autograd.grad(out, qkv, upstream)

    found["tree"] = timed(tree)
    block = pack_flex(trees, Windows(), "cuda")
    padded = inputs(block.input_ids.shape[1])
    wide = torch.randn_like(padded[0])
    gqa = heads & (heads - 1) == 0

    def flex() -> None:
        key, value = padded[1:] if gqa else (part.repeat_interleave(heads // kv_heads, 1) for part in padded[1:])
        out = compiled(padded[0], key, value, block_mask=block.attention, enable_gqa=gqa)
        torch.autograd.grad(out, padded, wide)

    found["flex"] = guarded(lambda: timed(flex))
    return found


def heads(hidden: int, tokens: int = 4096) -> dict[str, Any]:
    """Values and gradients of the head with a float32 weight under bfloat16 autocast."""
    import torch

    from align.scoring import head

    torch.manual_seed(0)
    layer = torch.nn.Linear(hidden, VOCABULARY, bias=False, device="cuda")
    states = torch.randn(tokens, hidden, device="cuda", requires_grad=True)
    targets, upstream = torch.randint(0, VOCABULARY, (tokens,), device="cuda"), torch.rand(tokens, device="cuda")
    right = head._takes_kernel
    found: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "vocabulary": VOCABULARY}
    numbers = {}

    def ours(grad: bool) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            logp = head.evaluate(layer, states, targets, ("logp",))["logp"]
        return (logp, *torch.autograd.grad(logp, [states, layer.weight], upstream)) if grad else (logp,)

    def plain(grad: bool) -> Any:
        with torch.set_grad_enabled(grad), torch.autocast("cuda", dtype=torch.bfloat16):
            logp = -torch.nn.functional.cross_entropy(layer(states).float(), targets, reduction="none")
        return (logp, *torch.autograd.grad(logp, [states, layer.weight], upstream)) if grad else (logp,)

    for name, body, kernel in (("kernel", ours, True), ("chunks", ours, False), ("plain", plain, False)):
        head._takes_kernel = lambda *a, kernel=kernel: kernel
        found[name] = guarded(partial(timed, partial(body, True)))
        found[f"{name}_forward"] = guarded(partial(timed, partial(body, False)))
        numbers[name] = [part.detach() for part in body(True)]
    head._takes_kernel = right
    logits = states.detach().double() @ layer.weight.detach().double().T
    exact = logits.log_softmax(-1)
    softmax = exact.exp()
    exact = exact.gather(1, targets[:, None])[:, 0]
    delta = softmax.mul_(-upstream[:, None].double())
    delta.scatter_add_(1, targets[:, None], upstream[:, None].double())
    wanted = [exact, delta @ layer.weight.detach().double(), delta.T @ states.detach().double()]
    for name, parts in numbers.items():
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(parts, wanted, strict=True)]
        found[f"{name}_error"] = dict(zip(("logp", "hidden", "weight"), errors, strict=True))
    return found


if __name__ == "__main__":
    main()
