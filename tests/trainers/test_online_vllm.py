"""An online run whose samples real vLLM draws in its process, from weights pushed before every step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from align.compat import vllm as compat
from align.methods import METHODS
from align.sampling.spec import SamplerSpec
from align.testing.tiny import save_tiny, tiny_tokenizer
from align.trainers import OnlineConfig, OnlineTrainer
from tests.trainers.online_parts import Paid, log_of, rows

pytestmark = pytest.mark.skipif(not compat.installed(), reason="vLLM is not installed (extra `vllm`)")
SHAPE = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


class Watching(Paid):
    """Keeps, with each batch, the weights that the trainer had when it was sampled."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Any = None
        self.batches: list[tuple[dict[str, torch.Tensor], list[Any]]] = []

    def judge(self, groups: Any, seed: int, progress: Any = None) -> Any:
        weights = {name: value.clone() for name, value in self.trainer.model.policy.state_dict().items()}
        self.batches.append((weights, list(groups)))
        return super().judge(groups, seed)


def test_vllm_samples_from_the_weights_of_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(save_tiny(tmp_path / "model", "qwen3", **SHAPE))
    judge = Watching()
    args = OnlineConfig(
        output_dir=str(tmp_path / "run"),
        sampler=SamplerSpec(kind="vllm", enforce_eager=True, gpu_memory_utilization=0.1),
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        global_batch_size=8,
        max_steps=4,
        max_new_tokens=8,
        max_length=96,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    method = METHODS.get("grpo")(num_generations=3, beta=0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = OnlineTrainer(folder, method, args, rows(), processing_class=tiny_tokenizer(), feedback=judge)
        judge.trainer = run
        with caplog.at_level(logging.INFO):
            run.train()
    finally:
        torch.set_num_threads(threads)
    assert "4 of 4 equal" in caplog.text or "part at a tie, 0 differ" in caplog.text
    assert "sampler and trainer disagree" not in caplog.text
    assert len(judge.batches) == 4 and len([line for line in log_of(tmp_path / "run") if "loss" in line]) == 4
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    gaps = [largest_gap(plain, weights, groups) for weights, groups in judge.batches]
    assert max(gaps) < 1e-3, gaps
    # The weights of one step before do not explain the samples: each push arrived.
    stale = [
        largest_gap(plain, before, groups)
        for (before, _), (_, groups) in zip(judge.batches[:-1], judge.batches[1:], strict=True)
    ]
    assert min(stale) > 1e-2, stale


@torch.no_grad()
def largest_gap(model: Any, weights: dict[str, torch.Tensor], groups: list[Any]) -> float:
    """Of the sampler's log-probs to those of a plain forward with these weights."""
    model.load_state_dict(weights)
    found = []
    for group in groups:
        for answer in group.answers:
            whole = torch.tensor([[*group.prompt_ids.tolist(), *answer.ids.tolist()]])
            logp = model(input_ids=whole).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            own = logp.gather(-1, torch.as_tensor(answer.ids)[:, None])[:, 0].numpy()
            found.append(np.abs(own - answer.logp).max())
    return float(max(found))
