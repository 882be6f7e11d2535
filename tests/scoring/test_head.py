"""The head and the functionals against full logits in float64, with gradients by plain autograd."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from align.core.errors import ConfigError
from align.scoring import head as heads
from align.scoring.backends import prepare
from align.scoring.engine import score
from align.scoring.facts import LogitTransform
from align.scoring.head import Limits, Other, evaluate
from align.scoring.vocab import FUNCTIONALS
from align.testing.tiny import tiny_model
from tests.scoring.golden import random_trees

M, H, V = 37, 12, 50
KEEP = Limits(keep_bytes=2**30, chunk_tokens=16)
RECOMPUTE = Limits(keep_bytes=0, chunk_tokens=16)
ONE_CHUNK = Limits(keep_bytes=2**30, chunk_tokens=4096)


def book(name: str, z: Tensor, y: Tensor, q_logits: Tensor) -> Tensor:
    """The functional written out from its definition, on probabilities."""
    p, q = z.exp() / z.exp().sum(-1, keepdim=True), q_logits.exp() / q_logits.exp().sum(-1, keepdim=True)
    taken = torch.arange(len(y))
    return {
        "logp": lambda: p[taken, y].log(),
        "logit": lambda: z[taken, y],
        "logsumexp": lambda: z.exp().sum(-1).log(),
        "entropy": lambda: -(p * p.log()).sum(-1),
        "log_sum_sq": lambda: (p * p).sum(-1).log(),
        "log_max": lambda: p.max(-1).values.log(),
        "kl_policy_ref": lambda: (p * (p / q).log()).sum(-1),
        "cross_entropy": lambda: -(q * p.log()).sum(-1),
        "kl_ref_policy": lambda: (q * (q / p).log()).sum(-1),
    }[name]()


def setting(bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor, Other]:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    hidden = torch.randn(M, H, dtype=dtype, requires_grad=True)
    second = nn.Linear(H - 3, V, dtype=dtype).requires_grad_(False)
    other = Other(second, torch.randn(M, H - 3, dtype=dtype), LogitTransform(scale=0.7))
    return head, hidden, torch.randint(0, V, (M,)), other


def shaped(z: Tensor, transform: LogitTransform) -> Tensor:
    z = z * transform.scale
    return z if transform.cap is None else transform.cap * torch.tanh(z / transform.cap)


NEEDS = [*((name,) for name in FUNCTIONALS), ("entropy", "logp"), tuple(sorted(FUNCTIONALS))]
TRANSFORMS = [LogitTransform(), LogitTransform(scale=1.7, cap=1.5)]


@pytest.mark.parametrize("limits", [KEEP, RECOMPUTE, ONE_CHUNK], ids=["keep", "recompute", "one chunk"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
def test_functionals_and_their_gradients(needs: tuple[str, ...], transform: LogitTransform, limits: Limits) -> None:
    head, hidden, targets, other = setting(bias=True, dtype=torch.float64)
    upstream = torch.randn(len(needs), M, dtype=torch.float64)
    columns = evaluate(head, hidden, targets, needs, transform, other, limits)
    found = torch.autograd.grad(
        sum((columns[n] * u).sum() for n, u in zip(needs, upstream, strict=True)), [hidden, head.weight, head.bias]
    )

    logits = shaped(linear(hidden, head.weight, head.bias), transform)
    q = shaped(linear(other.hidden, other.head.weight, other.head.bias), other.transform)
    expected = [book(name, logits, targets, q) for name in needs]
    gradients = torch.autograd.grad(
        sum((e * u).sum() for e, u in zip(expected, upstream, strict=True)), [hidden, head.weight, head.bias]
    )
    for name, value in zip(needs, expected, strict=True):
        torch.testing.assert_close(columns[name], value, rtol=0, atol=1e-11)
    for gradient, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("limits", "bias"), list(itertools.product([KEEP, RECOMPUTE], [True, False])))
def test_a_frozen_weight_gets_no_gradient_and_costs_none(limits: Limits, bias: bool) -> None:
    head, hidden, targets, _ = setting(bias, torch.float32)
    with_weight = torch.autograd.grad(evaluate(head, hidden, targets, ["logp"], limits=limits)["logp"].sum(), hidden)[0]
    head.requires_grad_(False)
    evaluate(head, hidden, targets, ["logp"], limits=limits)["logp"].sum().backward()
    torch.testing.assert_close(hidden.grad, with_weight)
    assert head.weight.grad is None
    head.requires_grad_(True)
    evaluate(head, hidden.detach(), targets, ["logp"], limits=limits)["logp"].sum().backward()
    torch.testing.assert_close(
        head.weight.grad,
        torch.autograd.grad(-nn.functional.cross_entropy(head(hidden), targets, reduction="sum"), head.weight)[0],
    )


@pytest.mark.parametrize("limits", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
def test_a_second_backward_of_a_retained_graph_is_right(limits: Limits) -> None:
    head, hidden, targets, _ = setting(True, torch.float64)
    logp = evaluate(head, hidden, targets, ["logp"], limits=limits)["logp"]
    first = torch.autograd.grad(logp.sum(), [hidden, head.weight], retain_graph=True)
    again = torch.autograd.grad((2 * logp).sum(), [hidden, head.weight])
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(2 * one, two)


def test_under_autocast_sums_are_float32_and_near_the_truth() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(32, 5000), torch.randn(M, 32, requires_grad=True)
    targets = torch.randint(0, 5000, (M,))
    exact = evaluate(head, hidden, targets, ["logp", "entropy"])
    expected = torch.autograd.grad(exact["logp"].sum() + exact["entropy"].sum(), [hidden, head.weight])
    for limits in (KEEP, RECOMPUTE):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = evaluate(head, hidden, targets, ["logp", "entropy"], limits=limits)
        assert rounded["logp"].dtype == rounded["entropy"].dtype == torch.float32
        # 5000 terms summed in bfloat16 (8 bits) would stop growing at 256 times a term: an error of about 3 nats.
        torch.testing.assert_close(rounded["logp"], exact["logp"], rtol=0, atol=0.02)
        torch.testing.assert_close(rounded["entropy"], exact["entropy"], rtol=0, atol=0.02)
        found = torch.autograd.grad(rounded["logp"].sum() + rounded["entropy"].sum(), [hidden, head.weight])
        for gradient, wanted in zip(found, expected, strict=True):
            assert gradient.dtype == torch.float32
            assert float((gradient - wanted).norm() / wanted.norm()) < 0.02


class _Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return result


@pytest.mark.parametrize("needs", [("logp",), ("entropy", "kl_ref_policy", "logp")], ids="+".join)
def test_no_tensor_holds_the_logits_of_all_positions(needs: tuple[str, ...]) -> None:
    head, hidden, targets, other = setting(False, torch.float32)
    with _Largest() as largest:
        columns = evaluate(head, hidden, targets, needs, other=other, limits=RECOMPUTE)
        sum(column.sum() for column in columns.values()).backward()
    assert 16 * V <= largest.elements < M * V


def test_without_gradient_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets, _ = setting(False, torch.float32)
    calls = []
    monkeypatch.setattr(heads, "Call", lambda *a, **k: calls.append(_Call(*a, **k)) or calls[-1])
    with torch.no_grad():
        assert not evaluate(head, hidden, targets, ["logp"], limits=KEEP)["logp"].requires_grad
    assert calls[0].kept == []
    evaluate(head, hidden, targets, ["logp"], limits=KEEP)
    assert len(calls[1].kept) == 3


_Call = heads.Call


def test_the_head_is_called_as_a_module_so_that_its_hooks_run() -> None:
    """The weight is there only between the hooks, as under ZeRO-3 and FSDP."""
    head, hidden, targets, _ = setting(False, torch.float32)
    weight = head.weight.data
    expected = evaluate(head, hidden, targets, ["logp"])["logp"]
    head.register_forward_pre_hook(lambda module, args: setattr(module.weight, "data", weight))
    head.register_forward_hook(lambda module, args, out: setattr(module.weight, "data", torch.zeros_like(weight)))
    head.weight.data = torch.zeros_like(weight)
    torch.testing.assert_close(evaluate(head, hidden, targets, ["logp"])["logp"], expected)
    assert "forward" not in vars(head)


@pytest.mark.parametrize("limits", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
def test_a_head_shared_by_both_models_is_gathered_once(limits: Limits) -> None:
    """Hooks that gather a sharded weight do not expect a call of the module inside its own call, or in its backward."""
    head, hidden, targets, _ = setting(False, torch.float64)
    other = Other(head, torch.randn(M, H, dtype=torch.float64), LogitTransform())
    calls: list[str] = []
    head.register_forward_pre_hook(lambda *a: calls.append("gather"))
    column = evaluate(head, hidden, targets, ("kl_ref_policy",), other=other, limits=limits)["kl_ref_policy"]
    gradient = torch.autograd.grad(column.sum(), hidden)[0]
    assert calls == ["gather"]
    expected = book("kl_ref_policy", linear(hidden, head.weight), targets, linear(other.hidden, head.weight).detach())
    torch.testing.assert_close(column, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), hidden)[0])


@pytest.mark.parametrize("needs", [("logp",), ("entropy", "logp")], ids="+".join)
@pytest.mark.parametrize("limits", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
def test_an_adapter_on_the_head_takes_part(limits: Limits, needs: tuple[str, ...]) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    model = get_peft_model(tiny_model("llama", tie_word_embeddings=False), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    trees = random_trees(0)
    packed = prepare(model, "tree").pack(trees)
    found = score(model, packed, needs, limits=limits)
    merged = copy.deepcopy(model).merge_and_unload()
    wanted = score(merged, packed, needs)
    for name in needs:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5)
    found["logp"].sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "lm_head.lora" in n)


def test_adapter_off_as_the_other_model_gives_the_kl_to_the_base_model() -> None:
    base = tiny_model("llama", seed=1)
    frozen = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    packed = prepare(model, "tree").pack(random_trees(0))
    prepare(frozen, "tree")
    needs = ("kl_policy_ref", "kl_ref_policy")
    for limits in (KEEP, RECOMPUTE):
        off = score(model, packed, needs, other=model, other_context=model.disable_adapter, limits=limits)
        copied = score(model, packed, needs, other=frozen, limits=limits)
        for name in needs:
            torch.testing.assert_close(off[name], copied[name], rtol=0, atol=1e-6)
            assert float(off[name].detach().max()) > 1e-3
        gradients = [torch.autograd.grad(c["kl_ref_policy"].sum(), _lora(model)) for c in (off, copied)]
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def _lora(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_unknown_needs_and_a_missing_second_model_are_named() -> None:
    model = tiny_model("llama")
    packed = prepare(model, "tree").pack(random_trees(0))
    with pytest.raises(ConfigError, match="did you mean `entropy`"):
        score(model, packed, {"entropi"})
    with pytest.raises(ConfigError, match="needs a second model"):
        score(model, packed, {"kl_ref_policy"})
