"""TRL's `OnlineDPOTrainer` and ours, loss and gradient, on one saved batch of samples of one tiny model.

TRL's side is a real trainer's `training_step` whose generation is replaced by the saved tokens. Ours is the method on
log-probabilities of a twin of the policy, scored one sequence at a time by a plain forward.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.methods import terms
from align.testing.steps import whole_difference
from align.testing.tiny import save_tiny, tiny_tokenizer

pytest.importorskip("trl")

PROMPTS = ["Say it.", "Name a colour and a town.", "Why?", "Tell me more of it."]
REWARDS = [0.7, -0.2, 0.4, 0.4, 1.5, 0.1, 0.9, 0.4]
"""Of the first answers, then of the second: the first wins, the second wins twice, and the last prompt has a tie."""
TIED = 3


class Bench:
    """A trainer, saved samples (prompts padded on the left, answers on the right), and a twin of its policy."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        self.tokenizer = tiny_tokenizer()
        arguments = OnlineDPOConfig(
            output_dir=str(folder / "out"), bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False
        )
        self.trainer = OnlineDPOTrainer(
            model=str(save_tiny(folder / "model", "qwen3")),
            reward_funcs=lambda prompts, completions, **more: REWARDS,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
            processing_class=self.tokenizer,
        )
        drawn = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.trainer.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=drawn), alpha=0.05)
        self.twin = copy.deepcopy(self.trainer.model)
        self.reference = self.trainer.ref_model
        self.prompts = [self.tokenizer(text)["input_ids"] for text in PROMPTS]
        lengths = [5, 3, 7, 4, 6, 6, 2, 5]
        self.answers = [torch.randint(5, 300, (n,), generator=drawn).tolist() for n in lengths]
        self.trainer._generate = lambda model, prompts, images=None: (*self._padded(), None)

    def _padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prompts = self.prompts * 2
        left, right = max(map(len, prompts)), max(map(len, self.answers))
        filler = self.tokenizer.pad_token_id
        ids = torch.tensor([[filler] * (left - len(one)) + one for one in prompts])
        there = torch.tensor([[0] * (left - len(one)) + [1] * len(one) for one in prompts])
        answers = torch.tensor([one + [filler] * (right - len(one)) for one in self.answers])
        scored = torch.tensor([[1] * len(one) + [0] * (right - len(one)) for one in self.answers])
        return ids, there, answers, scored

    def theirs(self, beta: float, loss: str) -> tuple[float, dict[str, Tensor]]:
        self.trainer._beta, self.trainer.args.loss_type = beta, loss
        self.trainer.args.beta = beta
        self.trainer.model.zero_grad()
        value = float(self.trainer.training_step(self.trainer.model, {"prompt": PROMPTS}))
        assert self.trainer.beta == beta
        return value, {name: p.grad.clone() for name, p in self.trainer.model.named_parameters() if p.grad is not None}

    def rows(self, ties: str) -> list[dict[str, Any]]:
        """Pairs by reward; `first`: of a tie the first answer wins, `drop`: it is left out."""
        made = []
        for i, prompt in enumerate(self.prompts):
            first, second = i, i + len(PROMPTS)
            if REWARDS[first] == REWARDS[second] and ties == "drop":
                continue
            won, lost = (first, second) if REWARDS[first] >= REWARDS[second] else (second, first)
            made.append({"chosen": self._one(prompt, won), "rejected": self._one(prompt, lost)})
        return made

    def _one(self, prompt: Sequence[int], index: int) -> dict[str, Tensor]:
        ids = torch.tensor([[*prompt, *self.answers[index]]])
        at = slice(len(prompt) - 1, ids.shape[1] - 1)
        target = ids[0, len(prompt) :, None]
        policy = self.twin(input_ids=ids).logits[0, at].log_softmax(-1)
        with torch.no_grad():
            frozen = self.reference(input_ids=ids).logits[0, at].log_softmax(-1)
        return {"logp": policy.gather(1, target)[:, 0], "ref_logp": frozen.gather(1, target)[:, 0]}

    def ours(self, beta: float, loss: str, ties: str = "first") -> tuple[float, dict[str, Tensor]]:
        self.twin.zero_grad()
        total = terms("online_dpo", {"beta": beta, "loss": loss}, pairs=self.rows(ties)).total()
        total.backward()
        return float(total.detach()), {
            name: p.grad.clone() for name, p in self.twin.named_parameters() if p.grad is not None
        }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("online_dpo"))


@pytest.mark.parametrize(("loss", "beta"), [("sigmoid", 0.3), ("ipo", 0.4)])
def test_value_and_gradient(bench: Bench, loss: str, beta: float) -> None:
    theirs, wanted = bench.theirs(beta, loss)
    ours, found = bench.ours(beta, loss)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert whole_difference(found, wanted) <= 1e-4
    assert bench.ours(1.01 * beta, loss)[0] != pytest.approx(theirs, rel=1e-4)


def test_a_tie_is_trained_on_by_trl_and_left_out_here(bench: Bench) -> None:
    """TRL takes the first answer of a tie for the better one: its mean is ours over the others, and that pair."""
    theirs, _ = bench.theirs(0.3, "sigmoid")
    tied = terms("online_dpo", {"beta": 0.3}, pairs=bench.rows("first")[TIED:])
    dropped, _ = bench.ours(0.3, "sigmoid", ties="drop")
    count = len(PROMPTS)
    assert theirs == pytest.approx(((count - 1) * dropped + float(tied.total().detach())) / count, rel=1e-5)
    assert dropped != pytest.approx(theirs, rel=1e-3)
