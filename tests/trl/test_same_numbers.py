"""The losses that TRL logs, and ours, step by step: 20 steps of AdamW in float32 on one tiny model.

What both sides share: rows, their order (TRL samples sequentially, ours does not shuffle), batch, learning rate
(constant, no warm-up), optimiser, clip norm 1, dropout off, no truncation, the end token appended once, log every step
(both report the mean over the batch). What has to be set on TRL's side: `bf16=False`, `gradient_checkpointing=False`
and `train_sampling_strategy="sequential"`, which are not its defaults.

Where the definitions agree
* `sigmoid` is `dpo`; `ipo` is `ipo` with `normalize="token"` and `tau` for TRL's `beta`.
* `kto`: TRL pairs prompt i with the completion before it inside the device's batch, ours with a row of another prompt
  drawn by seed and row id. In a batch of two rows with different prompts there is one mismatched pairing only, so both
  estimate the same z0, and the losses must be equal.
* `bco` does not agree: TRL 1.16's `bco_pair` has no running centre (the book, BCO, pitfalls), and adds the two terms of
  a pair where ours is a mean over completions. So ours is compared with the book's loss in a plain loop that shares
  nothing with the package, and TRL's with the same loop without the centre: the centre is all that differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from align.testing.tiny import random_pairs, save_tiny, tiny_model, tiny_tokenizer

pytest.importorskip("trl")

STEPS, BATCH = 20, 4
LEARNING_RATE = 5e-4
TOLERANCE = 1e-4

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def pairs() -> Rows:
    return random_pairs(STEPS * BATCH, seed=3)


@pytest.fixture(scope="module")
def singles(pairs: Rows) -> Rows:
    """Chosen and rejected of each pair, one after the other."""
    rows: Rows = []
    for row in pairs:
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        rows.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    return rows


@pytest.fixture(scope="module")
def alternating() -> Rows:
    """Two rows a batch: labels in turn, and prompts that differ within each batch."""
    rows: Rows = []
    for number, row in enumerate(random_pairs(2 * STEPS + 40, seed=5)):
        good = number % 2 == 0
        if rows and len(rows) % 2 and rows[-1]["prompt"] == row["prompt"]:
            continue
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return rows[: 2 * STEPS]


def shared(output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "max_length": 512,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def of_trl(kind: str, model: Any, rows: Rows, output: Path, batch: int, **options: Any) -> Any:
    """A trained `DPOTrainer`, or `KTOTrainer` for `kto`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    config, trainer = (KTOConfig, KTOTrainer) if kind == "kto" else (DPOConfig, DPOTrainer)
    arguments = config(
        loss_type=kind,
        per_device_train_batch_size=batch,
        gradient_checkpointing=False,
        bf16=False,
        train_sampling_strategy="sequential",
        **options,
        **shared(output),
    )
    done = trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
    )
    done.train()
    return done


def of_ours(method: Any, model: Any, rows: Rows, output: Path, batch: int) -> Any:
    from align.trainers import AlignConfig, PreferenceTrainer

    arguments = AlignConfig(global_batch_size=batch, shuffle=False, resume="never", **shared(output))
    done = PreferenceTrainer(
        model=model, method=method, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer()
    )
    done.train()
    return done


def same(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) == STEPS
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(mine - other) <= TOLERANCE, f"step {step}: {mine} against {other}"
    assert max(theirs) - min(theirs) > 20 * TOLERANCE, "a loss that does not move would prove nothing"


def test_sigmoid(folder: Path, pairs: Rows, tmp_path: Path) -> None:
    from align.methods.dpo import DPO

    theirs = of_trl("sigmoid", str(folder), pairs, tmp_path / "trl", BATCH, beta=0.2)
    ours = of_ours(DPO(beta=0.2), str(folder), pairs, tmp_path / "ours", BATCH)
    same(logged(ours), logged(theirs))
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        for mine, other in zip(logged(ours, name), logged(theirs, name), strict=True):
            assert mine == pytest.approx(other, abs=5e-3), name


def test_ipo(folder: Path, pairs: Rows, tmp_path: Path) -> None:
    from align.methods.ipo import IPO

    theirs = of_trl("ipo", str(folder), pairs, tmp_path / "trl", BATCH, beta=0.5)
    ours = of_ours(IPO(tau=0.5), str(folder), pairs, tmp_path / "ours", BATCH)
    same(logged(ours), logged(theirs))


def test_sigmoid_with_lora(folder: Path, pairs: Rows, tmp_path: Path) -> None:
    """The reference is the adapter switched off on our side, a second copy of the starting adapter on TRL's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from align.methods.dpo import DPO

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", lora_dropout=0.0))
    twin = copy.deepcopy(model)
    theirs = of_trl("sigmoid", model, pairs, tmp_path / "trl", BATCH, beta=0.2)
    ours = of_ours(DPO(beta=0.2), twin, pairs, tmp_path / "ours", BATCH)
    same(logged(ours), logged(theirs))


def test_kto(folder: Path, alternating: Rows, tmp_path: Path) -> None:
    from align.methods.kto import KTO

    options = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75}
    theirs = of_trl("kto", str(folder), alternating, tmp_path / "trl", 2, **options)
    ours = of_ours(KTO(**options), str(folder), alternating, tmp_path / "ours", 2)
    anchors = logged(theirs, "kl")
    assert min(anchors) == 0.0 and max(anchors) > 0.1, "the anchor must be both clamped and at work"
    same(logged(ours), logged(theirs))


def test_bco(folder: Path, pairs: Rows, singles: Rows, tmp_path: Path) -> None:
    from align.methods.bco import BCO

    beta = 0.2
    ours = logged(of_ours(BCO(beta=beta), str(folder), singles, tmp_path / "ours", 2 * BATCH))
    same(ours, plain_loop(pairs, Book(beta)))
    theirs = logged(of_trl("bco_pair", str(folder), pairs, tmp_path / "trl", BATCH, beta=beta))
    same([loss / 2 for loss in theirs], plain_loop(pairs, lambda good, bad: _pair_loss(beta * good, beta * bad)))
    assert abs(ours[0] - theirs[0] / 2) <= 1e-6, "log 2 for both at the reference, where the centre is 0"
    assert max(abs(mine - other / 2) for mine, other in zip(ours, theirs, strict=True)) > 10 * TOLERANCE


class Book:
    """BCO as the book has it: the centre is the mean of the two class means, over all steps up to this one."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.good: list[float] = []
        self.bad: list[float] = []

    def __call__(self, good: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        self.good += (self.beta * good).tolist()
        self.bad += (self.beta * bad).tolist()
        centre = (sum(self.good) / len(self.good) + sum(self.bad) / len(self.bad)) / 2
        return _pair_loss(self.beta * good - centre, self.beta * bad - centre)


def _pair_loss(good: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """Mean over all completions of both kinds."""
    return -(logsigmoid(good) + logsigmoid(-bad)).mean() / 2


def plain_loop(pairs: Rows, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[float]:
    """Training one sequence at a time. `loss` of the log-ratios of chosen and rejected, [BATCH] each, is a scalar."""
    policy, reference = tiny_model("qwen3"), tiny_model("qwen3")
    tokenizer = tiny_tokenizer()
    optimiser = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    found = []
    for step in range(STEPS):
        batch = pairs[step * BATCH : (step + 1) * BATCH]
        good, bad = (
            torch.stack([_log_ratio(policy, reference, tokenizer, row["prompt"], row[name]) for row in batch])
            for name in ("chosen", "rejected")
        )
        value = loss(good, bad)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        found.append(float(value.detach()))
    return found


def _log_ratio(policy: Any, reference: Any, tokenizer: Any, prompt: str, completion: str) -> torch.Tensor:
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([[*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]])

    def log_prob(model: Any) -> torch.Tensor:
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
        return log_softmax(logits, -1).gather(-1, ids[0, start:, None]).sum()

    with torch.no_grad():
        fixed = log_prob(reference)
    return log_prob(policy) - fixed
