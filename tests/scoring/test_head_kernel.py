"""TRL's log-probability function behind our head: on a CPU it folds its tiles in torch, which is slow and exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from align.compat.trl import chunked_logp
from align.scoring import head
from align.scoring.facts import LogitTransform


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rule", [LogitTransform(), LogitTransform(0.7), LogitTransform(0.7, 3.0)])
def test_values_and_gradients_are_those_of_plain_logits(rule: LogitTransform, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40_000, bias=bias)  # more than one tile of the vocabulary
    hidden, targets = torch.randn(11, 24, requires_grad=True), torch.randint(0, 40_000, (11,))
    upstream, leaves = torch.rand(11), [hidden, *layer.parameters()]
    found = chunked_logp(hidden, layer.weight, layer.bias, targets, rule.cap, rule.scale)
    logits = layer(hidden) * rule.scale
    if rule.cap is not None:
        logits = torch.tanh(logits / rule.cap) * rule.cap
    wanted = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        assert float((one - other).norm() / other.norm()) <= 1e-5


def test_the_head_calls_it_with_its_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of a GPU, taken on a CPU; hooks of the head still run around it."""
    torch.manual_seed(0)
    layer, rule = nn.Linear(16, 50), LogitTransform(0.5, 2.0)
    hidden, targets = torch.randn(7, 16, requires_grad=True), torch.randint(0, 50, (7,))
    calls: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: calls.append(out[0]))
    expected = head.evaluate(layer, hidden, targets, ("logp",), rule)["logp"]
    monkeypatch.setattr(head, "_takes_kernel", lambda *a: True)
    found = head.evaluate(layer, hidden, targets, ("logp",), rule)["logp"]
    assert len(calls) == 2 and type(found.grad_fn).__name__ == "ChunkedLogProbFunctionBackward"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_the_kernel_cannot_do_stays_with_our_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, hidden = nn.Linear(4, 8), torch.zeros(2, 4)
    monkeypatch.setattr(head, "has_logp_kernel", lambda: True)
    assert not head._takes_kernel(layer, hidden, ("logp",)), "a CPU"
    card = torch.empty(2, 4, device="meta")
    monkeypatch.setattr(head, "_on_gpu", lambda hidden: True)
    assert head._takes_kernel(layer, card, ("logp",))
    assert not head._takes_kernel(layer, card, ("entropy", "logp"))
    assert not head._takes_kernel(layer, card.double(), ("logp",))
    layer.weight.ds_id = 1  # type: ignore[attr-defined]
    assert not head._takes_kernel(layer, card, ("logp",)), "a sharded head"
    monkeypatch.setattr(head, "has_logp_kernel", lambda: False)
    assert not head._takes_kernel(nn.Linear(4, 8), card, ("logp",))
