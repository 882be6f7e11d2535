"""Losses and sizes that other tools get wrong: their value, computed as they do, and ours on the same numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from align.methods import terms
from align.recipe.from_trl import convert
from align.scoring.head import Limits, evaluate


def shared_by_all(certain: float) -> tuple[Tensor, Tensor, Tensor]:
    """One number that moves every log-probability, as a weight does; average log-probs of two pairs, the first's chosen
    answer of log-prob `certain`."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([certain, -0.7], dtype=torch.float64) * weight
    rejected = torch.tensor([-1.1, -0.9], dtype=torch.float64) * weight
    return weight, chosen, rejected


def test_orpo_at_probability_one() -> None:
    """LLaMA-Factory takes log(1 - p) by `log1p(-exp(logp))`: at an average of 0 the batch's gradient is NaN."""
    weight, chosen, rejected = shared_by_all(0.0)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    theirs = (-chosen - 0.1 * logsigmoid(odds)).mean()
    (gradient,) = torch.autograd.grad(theirs, weight)
    assert math.isnan(float(gradient))

    def ours(certain: float) -> tuple[float, float]:
        weight, chosen, rejected = shared_by_all(certain)
        sides = zip(chosen, rejected, strict=True)
        pairs = [{"chosen": {"logp": a[None]}, "rejected": {"logp": b[None]}} for a, b in sides]
        loss = terms("orpo", {"lambda": 0.1}, pairs=pairs).total()
        return float(loss.detach()), float(torch.autograd.grad(loss, weight)[0])

    # At 0 the first pair's odds are held at one rounding below: its terms are 0, what is left is the second pair's.
    loss, slope = ours(0.0)

    def second(w: float) -> float:
        good, bad = -0.7 * w, -0.9 * w
        odds = good - bad - math.log(1 - math.exp(good)) + math.log(1 - math.exp(bad))
        return -good + 0.1 * math.log1p(math.exp(-odds))

    assert loss == pytest.approx(second(1.0) / 2, rel=1e-9)
    assert slope == pytest.approx((second(1 + 1e-6) - second(1 - 1e-6)) / 4e-6, rel=1e-6)
    # Near it both agree: the guard changes nothing else.
    weight, chosen, rejected = shared_by_all(-1e-3)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    theirs = (-chosen - 0.1 * logsigmoid(odds)).mean()
    (gradient,) = torch.autograd.grad(theirs, weight)
    assert ours(-1e-3) == (pytest.approx(float(theirs.detach())), pytest.approx(float(gradient)))


class _Largest(TorchDispatchMode):
    """The most elements that the result of an operation had."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            self.elements = max(self.elements, part.numel() if isinstance(part, Tensor) else 0)
        return result


@pytest.mark.parametrize("tokens", [64, 128])
def test_the_head_is_chunked_by_tokens(tokens: int) -> None:
    """Liger's fused preference losses take chunks of pairs: one pair has all its logits at once. Ours has a chunk's."""
    torch.manual_seed(0)
    vocabulary, width, chunk = 640, 8, 16
    head = nn.Linear(width, vocabulary, bias=False)
    hidden, targets = torch.randn(2 * tokens, width), torch.randint(0, vocabulary, (2 * tokens,))

    def by_pairs(states: Tensor) -> Tensor:
        """A chunk is at least one pair: chosen and rejected, all their tokens."""
        return linear(states, head.weight).log_softmax(-1).gather(1, targets[:, None]).sum()

    with _Largest() as theirs:
        wanted = torch.autograd.grad(by_pairs(hidden), head.weight)[0]
    with _Largest() as ours:
        column = evaluate(head, hidden, targets, ["logp"], limits=Limits(keep_bytes=0, chunk_tokens=chunk))["logp"]
        found = torch.autograd.grad(column.sum(), head.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert theirs.elements == 2 * tokens * vocabulary
    assert ours.elements == chunk * vocabulary  # whatever the length


def test_a_batch_of_64_is_64_on_any_number_of_processes(tmp_path: Path) -> None:
    """TRL's paper index gives `per_device_train_batch_size=64` for a batch of 64: on 8 GPUs that trains on 512."""
    path = tmp_path / "dpo.yaml"
    path.write_text("model_name_or_path: m/m\ndataset_name: a/b\nper_device_train_batch_size: 64\n")
    sizes = {}
    for processes in (1, 8):
        found = convert(path, "dpo", processes)
        sizes[processes] = found.recipe["train"]["global_batch_size"]
        (said,) = [note.says for note in found.notes if note.became == "train.global_batch_size"]
        assert f"64 a device x 1 accumulated x {processes} process" in said
    assert sizes == {1: 64, 8: 512}  # of a recipe it is the number of the batch itself, and no process enters it


def test_bco_is_not_dpos_formula() -> None:
    """TRL's paper index prints dpo's formula for BCO on pairs: log 2 at the reference where BCO has 2 log 2, and
    blind to both answers falling together."""
    beta = 0.3

    def rows(good: float, bad: float) -> list[dict[str, Any]]:
        sides = ((good, True), (bad, False))
        return [{"logp": [-3.0 + ratio], "ref_logp": [-3.0], "label": label} for ratio, label in sides]

    def printed(good: float, bad: float) -> float:
        return math.log1p(math.exp(-beta * (good - bad)))

    def ours(good: float, bad: float) -> float:
        """The two terms of a pair, with a centre that past batches hold at 0."""
        past = {"desirable_sum": -beta * good, "undesirable_sum": -beta * bad}
        state = {**past, "desirable_count": 1, "undesirable_count": 1}
        return 2 * float(terms("bco", {"beta": beta}, singles=rows(good, bad), state=state).total())

    assert ours(0, 0) == pytest.approx(2 * math.log(2)) != pytest.approx(printed(0, 0))
    assert printed(-4.0, -4.0) == pytest.approx(printed(0.0, 0.0))
    by_hand = math.log1p(math.exp(beta * 4)) + math.log1p(math.exp(-beta * 4))
    assert ours(-4.0, -4.0) == pytest.approx(by_hand) and by_hand > 2 * math.log(2)
    for good, bad in ((1.0, -2.0), (-3.0, 1.0), (2.0, 5.0)):
        assert ours(good, bad) > printed(good, bad)  # BCO bounds dpo's loss from above
