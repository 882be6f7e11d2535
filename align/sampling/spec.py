"""The section `sampler` of a recipe: who samples. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align.core.options import option

Kind = Literal["hf", "vllm", "server"]
_OF_KIND: Mapping[str, tuple[Kind, ...]] = {
    "urls": ("server",),
    "served_as": ("server",),
    "wait": ("server",),
    "deadline": ("server",),
    "retries": ("server",),
    "batch_size": ("hf",),
    "device": ("hf",),
    "dtype": ("hf", "vllm"),
    "gpu_memory_utilization": ("vllm",),
    "enforce_eager": ("vllm",),
    "max_model_len": ("vllm", "server"),
}


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """Who samples: Hugging Face `generate`, vLLM in this process, or running `vllm serve` processes."""

    kind: Kind = option("hf", doc="hf needs nothing more; vllm and server need vLLM")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", doc="auto: float32 on a CPU, bfloat16 elsewhere")
    device: str | None = option(None, doc="cpu, cuda, ..., with `kind: hf`; null: the GPU where there is one")
    batch_size: int = option(64, at_least=1, doc="completions drawn at once, with `kind: hf`")
    gpu_memory_utilization: float = option(0.9, above=0, at_most=1, doc="share of a GPU's memory, with `kind: vllm`")
    enforce_eager: bool = option(False, doc="no CUDA graphs, with `kind: vllm`: a faster start, slower sampling")
    max_model_len: int | None = option(None, at_least=2, doc="tokens of prompt and answer; null: what the model takes")
    urls: Any = option(None, doc="addresses of running servers, a list, with `kind: server`")
    served_as: str | None = option(None, doc="name of the model at the servers; null: the only one there")
    wait: float = option(0.0, at_least=0, doc="seconds in which servers may still be starting")
    deadline: float = option(600.0, above=0, doc="seconds that a server may take for a request")
    retries: int = option(3, at_least=0, doc="times that a request to a server is tried again")


def unused(spec: SamplerSpec) -> dict[str, str]:
    """Options that the kind does not read -> why."""
    return {
        name: f"it is read with `kind: {' or '.join(kinds)}`, not `{spec.kind}`"
        for name, kinds in _OF_KIND.items()
        if spec.kind not in kinds
    }
