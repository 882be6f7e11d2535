"""A KL between a policy with its adapter and the same model without it: both use one head."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.scoring.backends import prepare
from align.scoring.engine import score
from align.scoring.layout import Tree
from align.testing.tiny import tiny_model


@pytest.mark.parametrize("name", ["kl_ref_policy", "kl_policy_ref"])
def test_a_model_and_itself_without_its_adapter(name: str) -> None:
    torch.manual_seed(0)
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    backend = prepare(policy)
    packed = backend.pack([Tree.of([5, 6, 7], [[8, 9, 10], [11, 12]])])
    found = score(policy, packed, {name}, other=policy, other_context=policy.disable_adapter)[name]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    ours = policy(input_ids=ids).logits[0].log_softmax(-1)
    with policy.disable_adapter():
        base = policy(input_ids=ids).logits[0].log_softmax(-1)
    first, second = (base, ours) if name == "kl_ref_policy" else (ours, base)
    wanted = (first.exp() * (first - second)).sum(-1)[2:5]
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-4)
    assert wanted.min() > 1e-3
    found.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
