"""What TRL's losses are here: for each setting of `DPOTrainer` our methods, their options, and a factor.

`docs/from_trl.md` states each of these in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from align.methods import METHODS, terms

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One of our methods, or one `term` of it, times `factor`. `state` is made from the rows."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    term: str = ""
    state: Callable[[Sequence[Row]], Mapping[str, Any]] | None = None

    def value(self, rows: Sequence[Row]) -> Tensor:
        """The loss of pairs as the method's view reads them, a scalar that keeps its gradient."""
        view = METHODS.get(self.method).view
        state = self.state(rows) if self.state else None
        found = terms(self.method, self.options, state=state, **{view: as_view(view, rows)})
        one = found[self.term] if self.term else None
        return self.factor * (found.total() if one is None else one.scale * one.values.mean())


@dataclass(frozen=True)
class Same:
    """TRL's settings, and the sum of ours that equals it."""

    name: str
    theirs: Mapping[str, Any]
    ours: tuple[Part, ...]

    def value(self, rows: Sequence[Row]) -> Tensor:
        return torch.stack([part.value(rows) for part in self.ours]).sum()


def as_view(view: str, rows: Sequence[Row]) -> list[Row]:
    """Pairs as a view reads them: a list of two scored 1 and 0, two labelled answers, the chosen answer, or pairs whose
    winner has a win rate of 1 and whose loser one of 0."""
    if view == "lists":
        return [{"completions": [row["chosen"], row["rejected"]], "scores": [1.0, 0.0]} for row in rows]
    if view == "singles":
        return [{**row[side], "label": side == "chosen"} for row in rows for side in ("chosen", "rejected")]
    if view == "demonstrations":
        return [row["chosen"] for row in rows]
    return [{side: {**row[side], "reward": float(side == "chosen")} for side in ("chosen", "rejected")} for row in rows]


def centred(beta: float) -> Callable[[Sequence[Row]], Mapping[str, float]]:
    """The state of `bco` with which the centre of these rows is 0: past rewards that are minus the present ones."""

    def state(rows: Sequence[Row]) -> Mapping[str, float]:
        sums = {
            f"{kind}_sum": -beta
            * sum(float((row[side]["logp"] - row[side]["ref_logp"]).sum().detach()) for row in rows)
            for kind, side in (("desirable", "chosen"), ("undesirable", "rejected"))
        }
        return {**sums, "desirable_count": len(rows), "undesirable_count": len(rows)}

    return state


def plain(loss: str, method: str, theirs: Mapping[str, Any], **options: Any) -> Same:
    """One `loss_type` that is one method."""
    return Same(loss, {"loss_types": [loss], **theirs}, (Part(method, options),))


B = {"beta": 0.3}
SMOOTH = {**B, "label_smoothing": 0.2}
WEIGHTED = {**B, "use_weighting": True}


def divergence(name: str, coefficient: float = 0.5) -> dict[str, Any]:
    return {**B, "f_divergence_type": name, "f_alpha_divergence_coef": coefficient}


LOSSES: tuple[Same, ...] = (
    plain("sigmoid", "dpo", B, **B),
    plain("hinge", "dpo_hinge", B, **B),
    plain("ipo", "ipo", B, tau=0.3, normalize="token"),
    plain("exo_pair", "exo_pref", SMOOTH, beta_pi=0.3, eps=0.2),
    plain("nca_pair", "nca", B, **B, alpha=0.01),
    plain("robust", "rdpo", SMOOTH, **B, eps=0.2),
    plain("aot", "aot", SMOOTH, **B, eps=0.2),
    plain("aot_unpaired", "aot_unpaired", SMOOTH, **B, eps=0.2),
    plain("apo_zero", "apo_zero", B, **B),
    plain("apo_down", "apo_down", B, **B),
    plain("discopop", "discopop", {**B, "discopop_tau": 0.4}, **B, tau=0.4),
    plain("sft", "sft", B),
    plain("sigmoid_norm", "dpo_norm", {"beta": 4.0}, beta=4.0),
    # The two terms of a pair are added; ours is a mean over completions, about a centre.
    Same("bco_pair", {**B, "loss_types": ["bco_pair"]}, (Part("bco", B, 2.0, state=centred(0.3)),)),
    # The squares of cal_dpo, without its logistic.
    Same("sppo_hard", {**B, "loss_types": ["sppo_hard"]}, (Part("cal_dpo", {**B, "c": 1.0}, term="calibration"),)),
)
"""One for each `loss_type`."""
SETTINGS: tuple[Same, ...] = (
    Same("label_smoothing with sigmoid", SMOOTH, (Part("dpo", B),)),
    Same("reverse_kl", divergence("reverse_kl"), (Part("f_dpo", {**B, "divergence": "reverse_kl"}),)),
    Same("forward_kl", divergence("forward_kl"), (Part("f_dpo", {**B, "divergence": "forward_kl"}),)),
    Same("js_divergence", divergence("js_divergence"), (Part("f_dpo", {**B, "divergence": "js"}),)),
    Same(
        "alpha_divergence",
        divergence("alpha_divergence", 0.7),
        (Part("f_dpo", {**B, "divergence": "alpha", "alpha": 1 - 0.7}),),
    ),
    Same("alpha_divergence of 1", divergence("alpha_divergence", 1.0), (Part("dpo", B),)),
    Same(
        "alpha_divergence of 0",
        divergence("alpha_divergence", 0.0),
        (Part("f_dpo", {**B, "divergence": "forward_kl"}),),
    ),
    Same("sppo_hard as sppo", {**B, "loss_types": ["sppo_hard"]}, (Part("sppo", {"eta": 1 / 0.3}, 2.0),)),
    Same("ld_alpha", {**B, "ld_alpha": 0.4}, (Part("ld_dpo", {**B, "alpha": 0.4}),)),
    Same("ld_alpha of 0", {**B, "ld_alpha": 0.0}, (Part("ld_dpo", {**B, "alpha": 0.0}),)),
    Same("ld_alpha of 1", {**B, "ld_alpha": 1.0}, (Part("dpo", B),)),
    Same("use_weighting", WEIGHTED, (Part("wpo", {**B, "clamp": None}),)),
    Same(
        "several losses",
        {**B, "loss_types": ["sigmoid", "apo_zero", "sft"], "loss_weights": [0.8, 0.5, 0.25]},
        (Part("dpo", B, 0.8), Part("apo_zero", B, 0.5), Part("sft", {}, 0.25)),
    ),
)
"""What changes a loss beside `loss_type`."""
