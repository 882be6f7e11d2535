"""Whether vLLM reads what `align merge` writes: greedy decoding, token for token.

    python -m bench.merge_vllm --vllm-python /path/to/an/environment/with/vllm/bin/python

For each case a tiny model gets a LoRA adapter that changes it, and `align merge` makes one folder of the two. Greedy
tokens are then decoded three times: transformers with base and adapter, transformers with the merged folder, and vLLM
with the merged folders, in a process of its own (vLLM pins other versions than we do). End tokens are not obeyed, so
that every completion has the same length. The result is written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import provenance

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = 40
CASES: dict[str, dict[str, Any]] = {
    "qwen3, DPO-trained LoRA": {"family": "qwen3", "train": True},
    "llama, DPO-trained LoRA": {"family": "llama", "train": True},
    "qwen3, random LoRA on all matrices": {"family": "qwen3", "lora": {"target_modules": "all-linear"}},
    "llama, random DoRA": {"family": "llama", "lora": {"target_modules": "all-linear", "use_dora": True}},
    "qwen3, tied embeddings, head of its own": {
        "family": "qwen3",
        "model": {"tie_word_embeddings": True},
        "lora": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    },
}
_SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.merge_vllm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vllm-python", default=sys.executable, help="python of an environment with vLLM")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--out", type=Path, default=RESULTS / "merge-vllm.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-vllm-") as folder:
        result = measure(Path(folder), options.vllm_python, options.prompts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for case in result["cases"]:
        print(f"{case['case']}: {case['same_tokens_vllm']} of {case['tokens']} tokens as vLLM has them")
    print(f"written: {options.out}")


def measure(work: Path, vllm_python: str, prompts: int, cases: dict[str, dict[str, Any]] | None = None) -> Any:
    """All cases, and where they were measured."""
    from align.testing.tiny import random_pairs, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    asked = [tokenizer(row["prompt"])["input_ids"] for row in random_pairs(prompts, seed=3)]
    chosen = cases or CASES
    merges = [_merge(case, work / str(number)) for number, case in enumerate(chosen.values())]
    ours = [_ours(work / str(number), adapter, asked) for number, (adapter, _) in enumerate(merges)]
    theirs = _vllm(vllm_python, work, [str(work / str(number) / "merged") for number in range(len(merges))], asked)
    measured = [
        {
            "case": name,
            "prompts": prompts,
            "tokens": prompts * TOKENS,
            "merge": {key: value for key, value in vars(report).items() if key not in ("output", "adapter", "base")},
            **facts,
            "same_tokens_vllm": prompts * TOKENS - _different(tokens, merged),
        }
        for name, (_, report), (facts, merged), tokens in zip(chosen, merges, ours, theirs["tokens"], strict=True)
    ]
    return {"benchmark": "merge_vllm", **provenance(), "vllm_process": theirs["versions"], "cases": measured}


def _merge(case: dict[str, Any], work: Path) -> tuple[Path, Any]:
    from align.testing.tiny import save_tiny
    from align.trainers.merge import merge_adapter

    base = save_tiny(work / "base", case["family"], **(_SHAPE | case.get("model", {})))
    adapter = _trained(base, work) if case.get("train") else _random(base, work, case["lora"])
    return adapter, merge_adapter(adapter, work / "merged")


def _ours(work: Path, adapter: Path, asked: list[list[int]]) -> tuple[dict[str, Any], list[list[int]]]:
    """What transformers says of base, base with adapter, and merged folder; the tokens of the last."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def plain(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32).eval()

    base, merged = plain("base"), plain("merged")
    alone = [greedy(base, ids)[0] for ids in asked]
    split = PeftModel.from_pretrained(base, str(adapter)).eval()
    wanted = [greedy(split, ids) for ids in asked]
    ours = [greedy(merged, ids)[0] for ids in asked]
    tokens = [ids for ids, _ in wanted]
    facts = {
        "tokens_changed_by_the_adapter": _different(alone, tokens),
        "smallest_gap_of_the_two_likeliest_logits": min(gap for _, gap in wanted),
        "same_tokens_transformers": len(asked) * TOKENS - _different(ours, tokens),
    }
    return facts, ours


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """The likeliest tokens one by one, end tokens not obeyed, and the smallest gap between first and second."""
    import torch

    row, past, drawn, gap = torch.tensor([prompt]), None, [], float("inf")
    with torch.inference_mode():
        for _ in range(TOKENS):
            out = model(row, past_key_values=past, use_cache=True)
            past = out.past_key_values
            best = out.logits[0, -1].float().topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            row = best.indices[:1][None]
            drawn.append(int(row))
    return drawn, gap


def _different(one: list[list[int]], other: list[list[int]]) -> int:
    return sum(a != b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def _trained(base: Path, work: Path) -> Path:
    from peft import LoraConfig

    from align.testing.tiny import random_pairs
    from align.trainers import AlignConfig, PreferenceTrainer

    args = AlignConfig(
        output_dir=str(work / "run"),
        global_batch_size=8,
        learning_rate=2e-2,
        max_steps=8,
        disable_tqdm=True,
        use_cpu=True,
    )
    peft = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    PreferenceTrainer(str(base), "dpo", args, random_pairs(64, seed=1), peft_config=peft).train()
    return work / "run" / "policy"


def _random(base: Path, work: Path, lora: dict[str, Any]) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from align.testing.tiny import tiny_tokenizer

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=8, **lora))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += (0.1 if "lora_" in name else 0.02) * torch.randn_like(parameter)
    model.save_pretrained(work / "adapter")
    tiny_tokenizer().save_pretrained(work / "adapter")
    return work / "adapter"


def _vllm(python: str, work: Path, models: list[str], asked: list[list[int]]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }
    (work / "asked.json").write_text(json.dumps({"models": models, "prompts": asked, "tokens": TOKENS}))
    command = [python, str(Path(__file__).with_name("vllm_side.py")), str(work / "asked.json"), str(work / "vllm.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise SystemExit(f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads((work / "vllm.json").read_text()))


if __name__ == "__main__":
    main()
