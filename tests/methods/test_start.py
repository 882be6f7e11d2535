"""The first loss of every method: policy and reference are one tiny model, and the step logs a constant, or a formula.

The loss is that of a real packed step. A formula is written from the paper for the reference, where every log-ratio is
0, out of numbers that a plain forward of the same sequences gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from align.core.registry import METHODS
from align.data.groups import TokenCompletion, TokenGroup
from align.data.partners import add_mismatched
from align.methods.base import Method
from align.scoring.assemble import columns_needed
from align.testing.steps import engine_for, guide_of, packed_step, random_groups, role_module, with_contexts
from align.testing.tiny import tiny_model
from tests.methods.loops import sigmoid, softplus

LOG2 = math.log(2)


@dataclass
class Start:
    """The rows of a start, and what formulas read of them; completions by group, weights all 1."""

    method: Any
    groups: Sequence[TokenGroup]
    model: Any
    value: Any

    def logits(self, group: TokenGroup, one: TokenCompletion) -> torch.Tensor:
        """[T, V] of the completion's tokens, float64."""
        ids = torch.from_numpy(np.concatenate([group.prompt, one.ids]))[None]
        with torch.no_grad():
            return self.model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1].double()

    def logp(self, group: TokenGroup, one: TokenCompletion) -> list[float]:
        """Of the scored tokens."""
        each = self.logits(group, one).log_softmax(-1).gather(1, torch.from_numpy(one.ids)[:, None])[:, 0]
        return each[torch.from_numpy(one.mask)].tolist()

    def nll(self, group: TokenGroup, one: TokenCompletion) -> float:
        """Per token."""
        own = self.logp(group, one)
        return -math.fsum(own) / len(own)

    def over_pairs(self, loss: Callable[[TokenGroup, TokenCompletion, TokenCompletion], float]) -> float:
        return mean(loss(group, *group.completions[:2]) for group in self.groups)

    def over_lists(self, loss: Callable[[list[float]], float]) -> float:
        """Mean of a loss of the scores of each list, 1 for the best."""
        return mean(loss([float(one.reward or 0) for one in group.completions]) for group in self.groups)

    def tokens(self, side: int = 0) -> list[float]:
        """-log pi of every scored token of one completion a group."""
        return [-x for group in self.groups for x in self.logp(group, group.completions[side])]


def mean(numbers: Any) -> float:
    found = list(numbers)
    return math.fsum(found) / len(found)


def start_of(method: Method) -> tuple[float, Start]:
    """The loss of the first step, and what it was made of."""
    needed = columns_needed(method)
    model = tiny_model("qwen3", seed=1)
    groups = [unweighted(one) for one in random_groups(method.view, 8, seed=4, needs=method.requires())]
    groups = with_contexts(groups, method)
    wants = needed.reference or needed.live_reference
    reference = tiny_model("qwen3", seed=1).requires_grad_(False) if wants else None
    roles = role_module(model, method)
    engine = engine_for(method, roles, reference, 1 << 20)
    loss, _, _ = packed_step(engine, Accelerator(cpu=True), groups)
    if "mismatched" in needed.data:
        groups = add_mismatched(groups, 0)
    return loss, Start(method, groups, model, dict(roles.roles.items()).get("value"))


def unweighted(group: TokenGroup) -> TokenGroup:
    """The group at its start: all weights 1, and the policy that the update started from is the policy."""
    ones = tuple(
        replace(one, weight=1.0, columns={name: x for name, x in one.columns.items() if name != "old_logp"})
        for one in group.completions
    )
    return replace(group, completions=ones, preferences=tuple(replace(p, weight=1.0) for p in group.preferences))


def constant(value: float) -> Callable[[Start], float]:
    return lambda start: value


def softmax(numbers: Sequence[float], temperature: float = 1.0) -> list[float]:
    raised = [math.exp(x / temperature) for x in numbers]
    return [x / math.fsum(raised) for x in raised]


def ordered(scores: Sequence[float]) -> list[tuple[float, float]]:
    return [(a, b) for a in scores for b in scores if a > b]


def cpl(start: Start) -> float:
    """Reference-free: alpha (S_w - lambda S_l) of sums of log-probs."""
    return start.over_pairs(
        lambda group, w, low: softplus(
            -0.1 * (math.fsum(start.logp(group, w)) - 0.5 * math.fsum(start.logp(group, low)))
        )
    )


def cpo(start: Start) -> float:
    gaps = start.over_pairs(
        lambda group, w, low: softplus(-0.1 * (math.fsum(start.logp(group, w)) - math.fsum(start.logp(group, low))))
    )
    return gaps + mean(start.tokens())


def simpo(start: Start) -> float:
    return start.over_pairs(lambda group, w, low: softplus(-2.0 * (start.nll(group, low) - start.nll(group, w) - 0.5)))


def orpo(start: Start) -> float:
    def odds(nll: float) -> float:
        return -nll - math.log(1 - math.exp(-nll))

    return start.over_pairs(
        lambda group, w, low: (
            start.nll(group, w) + 0.1 * softplus(-(odds(start.nll(group, w)) - odds(start.nll(group, low))))
        )
    )


def slic(start: Start) -> float:
    def loss(group: TokenGroup, w: TokenCompletion, low: TokenCompletion) -> float:
        good, bad = (math.fsum(start.logp(group, one)) for one in (w, low))
        return max(0.0, 1 - good + bad) - 0.1 * good

    return start.over_pairs(loss)


def rpo(start: Start) -> float:
    """log 2 + eta beta times the chosen answer's NLL, a sum."""
    return LOG2 + 0.005 * 0.01 * start.over_pairs(lambda group, w, _: -math.fsum(start.logp(group, w)))


def r_dpo(start: Start) -> float:
    return start.over_pairs(lambda group, w, low: softplus(-0.01 * (int(w.mask.sum()) - int(low.mask.sum()))))


def wpo(start: Start) -> float:
    """log 2 times min(w_w w_l, 1), log w the mean of log pi - log sum pi^2."""

    def log_weight(group: TokenGroup, one: TokenCompletion) -> float:
        policy = start.logits(group, one).log_softmax(-1)
        peaks = policy.exp().square().sum(-1).log()[torch.from_numpy(one.mask)]
        return mean(a - b for a, b in zip(start.logp(group, one), peaks.tolist(), strict=True))

    return LOG2 * start.over_pairs(
        lambda group, w, low: min(1.0, math.exp(log_weight(group, w) + log_weight(group, low)))
    )


def t_reg(start: Start) -> float:
    """log 2 + alpha / 2 times -beta sum r_t log pi of both answers, r_t from the two other prompts."""

    def reg(group: TokenGroup, one: TokenCompletion) -> float:
        better, worse = (
            start.logp(replace(group, prompt=np.asarray(group.contexts[name])), one) for name in ("better", "worse")
        )
        own = start.logp(group, one)
        return -0.01 * math.fsum((sigmoid(b - w) - 0.5) * p for b, w, p in zip(better, worse, own, strict=True))

    return LOG2 + 0.25 * 0.5 * start.over_pairs(lambda group, w, low: reg(group, w) + reg(group, low))


def from_previous(start: Start) -> tuple[Start, Callable[[TokenGroup, TokenCompletion, TokenCompletion], float]]:
    """log pi / pi_prev of the chosen less that of the rejected answer; the previous iterate is another model."""
    other = replace(start, model=guide_of(start.model))

    def moved(group: TokenGroup, one: TokenCompletion) -> float:
        return math.fsum(start.logp(group, one)) - math.fsum(other.logp(group, one))

    return start, lambda group, w, low: moved(group, w) - moved(group, low)


def inpo(start: Start) -> float:
    """The log-ratio to the reference is 0, that to the previous iterate weighs 1 - tau / eta."""
    start, margin = from_previous(start)
    weight = 1 - 0.00167 / 0.005
    return start.over_pairs(lambda group, w, low: (weight * margin(group, w, low) - 100) ** 2)


def alpha_spin(start: Start) -> float:
    start, margin = from_previous(start)
    return start.over_pairs(lambda group, w, low: softplus(-0.1 * 0.5 * margin(group, w, low)))


def xpo(start: Start) -> float:
    """log 2 and alpha times the log-prob of the reference's answer, which is either side."""
    return LOG2 + 1e-5 * start.over_pairs(
        lambda group, w, low: math.fsum(start.logp(group, w if w.role == "reference" else low))
    )


def nash_md(start: Start) -> float:
    """(1/2 - P) log pi: nothing of the KL yet."""
    return mean(
        (0.5 - float(group.completions[0].reward or 0)) * math.fsum(start.logp(group, group.completions[0]))
        for group in start.groups
    )


def rebel(start: Start) -> float:
    """The square of the reward difference."""
    return mean(float(group.preferences[0].margin or 0) ** 2 for group in start.groups)


def sppo(start: Start) -> float:
    """Half the squares of eta (P - 1/2)."""
    return start.over_pairs(
        lambda group, w, low: 0.5 * sum((1000 * (float(one.reward or 0) - 0.5)) ** 2 for one in (w, low))
    )


def dno_prct(start: Start) -> float:
    return LOG2 + 0.005 * start.over_pairs(lambda group, w, low: start.nll(group, w))


def dro_v(start: Start) -> float:
    """Half the square of reward minus value: the value role has random weights, so it is not 0."""

    def value(group: TokenGroup) -> float:
        ids = torch.from_numpy(np.asarray(group.prompt))[None]
        with torch.no_grad():
            hidden = start.value.trunk(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            return float(start.value.head(hidden)[0])

    return mean(0.5 * (float(group.completions[0].reward or 0) - value(group)) ** 2 for group in start.groups)


def iqlearn(start: Start) -> float:
    """-log pi + lambda (q_t - v_{t+1})^2 of scored tokens, v after the end 0."""
    values = []
    for group in start.groups:
        one = group.completions[0]
        logits = start.logits(group, one)
        keep = torch.from_numpy(one.mask)
        q = logits.gather(1, torch.from_numpy(one.ids)[:, None])[:, 0][keep].tolist()
        v = [*logits.logsumexp(-1)[keep].tolist(), 0.0]
        values += [v[t] - q[t] + 0.1 * (q[t] - v[t + 1]) ** 2 for t in range(len(q))]
    return mean(values)


def brain(start: Start) -> float:
    """KL from the goodness' softmax to 1 / K."""
    return start.over_lists(lambda s: math.fsum(a * math.log(a * len(s)) for a in softmax(s)))


def exo_rw(start: Start) -> float:
    """KL from 1 / K to the rewards' softmax."""
    return start.over_lists(lambda s: mean(-math.log(len(s)) - math.log(p) for p in softmax(s, 0.5)))


def lipo_lambda(start: Start) -> float:
    """All tied: a pair's |1/D - 1/D'| is its mean over all pairs of places."""

    def loss(scores: list[float]) -> float:
        places = [1 / math.log(1 + t) for t in range(1, len(scores) + 1)]
        gap = mean(abs(a - b) for i, a in enumerate(places) for j, b in enumerate(places) if i != j)
        return math.fsum((2**a - 2**b) * gap * LOG2 for a, b in ordered(scores))

    return start.over_lists(loss)


def gained(start: Start) -> list[list[float]]:
    """The advantages of each completion's scored tokens: with the ratio at 1 and no KL, the loss is minus a mean."""
    answers = [one for group in start.groups for one in group.completions]
    return [one.columns["advantage"][one.mask].tolist() for one in answers]


def own_means(start: Start) -> float:
    return -mean(mean(tokens) for tokens in gained(start))


def token_mean(start: Start) -> float:
    return -mean(x for tokens in gained(start) for x in tokens)


START: dict[str, Callable[[Start], float]] = {
    **dict.fromkeys(("grpo", "gspo", "rloo"), own_means),
    **dict.fromkeys(("dapo", "reinforce_pp", "reinforce_pp_baseline"), token_mean),
    "dr_grpo": lambda start: -mean(math.fsum(tokens) / 1024 for tokens in gained(start)),
    **dict.fromkeys(
        (
            *("dpo", "cdpo", "rdpo", "f_dpo", "chi_po", "tgdpo", "tdpo", "ld_dpo", "d2o", "spin", "smpo", "soft_dpo"),
            *("robust_bt", "aot", "aot_unpaired", "beta_dpo", "dpo_norm", "dpop", "flex_dpo", "seppo", "regret_pref"),
            *("vpo", "demo_reg", "rrpo", "bco", "online_dpo", "dno"),
        ),
        constant(LOG2),
    ),
    "ipo": constant(1 / (4 * 0.1**2)),
    **dict.fromkeys(("dpo_hinge", "apo_zero", "apo_down"), constant(1.0)),
    "online_ipo": constant(1 / 4),
    "xpo": xpo,
    "nash_md": nash_md,
    "rebel": rebel,
    "sppo": sppo,
    "inpo": inpo,
    "dno_prct": dno_prct,
    "alpha_spin": alpha_spin,
    "kto": constant(0.5),
    "discopop": constant(0.5 * LOG2 + 0.5),
    "exo_pref": constant(-LOG2 - 0.5 * math.log(1e-3 * (1 - 1e-3))),
    "cal_dpo": constant(LOG2 + 2 * (1 / (2 * 0.01)) ** 2),
    "mapl": constant(3 * LOG2),
    "spac": constant(1.1 * LOG2),
    "sft_fdiv": constant(0.0),
    # The surrogate's coefficients are log-ratios: 0.
    "hypo": constant(LOG2),
    # The first visit's target is 0.3 (1/2, 1/2), whatever the pair.
    "elr": constant(LOG2 + 3 * math.log(1 - 0.3 * 0.5)),
    "pl_dpo": lambda start: start.over_lists(lambda s: math.log(math.factorial(len(s)))),
    "infonca": lambda start: start.over_lists(lambda s: math.log(len(s))),
    "nca": lambda start: start.over_lists(lambda s: LOG2 + LOG2),
    "list_softmax": lambda start: start.over_lists(lambda s: math.log(len(s)) * math.fsum(s)),
    "lipo": lambda start: start.over_lists(lambda s: LOG2 * len(ordered(s))),
    "list_hinge": lambda start: start.over_lists(lambda s: float(len(ordered(s)))),
    "lipo_lambda": lipo_lambda,
    "exo_rw": exo_rw,
    "brain": brain,
    "rpo": rpo,
    "r_dpo": r_dpo,
    "wpo": wpo,
    "t_reg": t_reg,
    "cpl": cpl,
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
    "slic": slic,
    "dro_v": dro_v,
    "sft": lambda start: mean(start.tokens()),
    "ps_kd": lambda start: mean(start.tokens()),
    "iqlearn_sft": iqlearn,
}
"""Every method, with its default options."""


def test_every_method_is_in_the_table() -> None:
    assert set(START) == set(METHODS.entries())


@pytest.mark.parametrize("name", sorted(START))
def test_the_first_loss(name: str) -> None:
    loss, start = start_of(METHODS.get(name)())
    assert loss == pytest.approx(START[name](start), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ipo", {"tau": 0.5, "normalize": "sum"}, 1.0),
        ("tdpo", {"variant": 1}, LOG2),
        *(("f_dpo", {"divergence": kind}, LOG2) for kind in ("reverse_kl", "forward_kl", "alpha", "chi2_kl")),
        *(("robust_bt", {"kind": kind}, LOG2) for kind in ("soft", "debias")),
        ("cpl", {"form": "kl", "lambda": 1.0}, LOG2),
        ("cpl", {"form": "kl"}, LOG2),
        ("spac", {"rho": 0.0}, LOG2),
        ("spac", {"kind": "linear"}, LOG2),
        ("kto", {"desirable_weight": 1.4, "undesirable_weight": 1.4}, 0.7),
        ("rpo", {"eta": 0.0}, LOG2),
        ("list_hinge", {"reduction": "mean"}, 1.0),
        ("lipo", {"reduction": "mean"}, LOG2),
        ("online_dpo", {"loss": "ipo", "beta": 0.5}, 1.0),
        ("online_dpo", {"loss": "hinge"}, 1.0),
        ("online_dpo", {"label": "prob"}, LOG2),
        ("online_ipo", {"tau": 0.5}, 1.0),
        ("xpo", {"alpha": 0.0}, LOG2),
        ("dno_prct", {"sft_weight": 0.0}, LOG2),
        ("alpha_spin", {"alpha": 1.0}, LOG2),
    ],
)
def test_the_first_loss_of_other_options(name: str, options: dict[str, Any], expected: float) -> None:
    from align.methods.evaluate import make_method

    loss, _ = start_of(make_method(name, options))
    assert loss == pytest.approx(expected, rel=1e-5)
