"""Loops without an outside judge: demonstrations against own answers, or answers that the policy ranks itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from align.loops.preset import Preset, loop


@loop("spin", paper="2401.01335")
class SPIN(Preset):
    """Self-play fine-tuning: the demonstration is chosen, the policy's own answer to the same prompt rejected.

    The same prompts each round, one sample at temperature 1; from the second round on the pairs of the round before
    are trained on too. The reference is the policy that sampled. Exact minimisation of a round diverges for a scale
    below 1/2, so rounds must be short. Source: arXiv 2401.01335 and its code.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 1, "temperature": 1.0, "data_answers": True}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "by_origin"}
    method: ClassVar[Mapping[str, Any]] = {"name": "spin"}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 4, "take": "same", "reference": "previous", "earlier": [1.0]}
    wants = "none"


@loop("alpha_spin", paper="2404.04291")
class AlphaSPIN(Preset):
    """SPIN with a share alpha of the initial model in the anchor of the loss, beside the policy that sampled.

    The same prompts each round; no pairs of earlier rounds. The fixed point leans to the initial model by design.
    Source: arXiv 2404.04291.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 1, "temperature": 1.0, "data_answers": True}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "by_origin"}
    method: ClassVar[Mapping[str, Any]] = {"name": "alpha_spin"}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 4, "take": "same", "reference": "initial"}
    wants = "none"


@loop("self_rewarding", paper="2401.10020")
class SelfRewarding(Preset):
    """The policy judges its own answers, and dpo trains on the best against the worst.

    Four samples at temperature 0.7 and top-p 0.9; the policy of the round gives each 0 to 5 points, the mean of three
    replies of the judge; an answer without a readable score is missing, never the worst. A model too small to judge
    with points can rank by its implicit reward instead: `feedback: {kind: implicit, model: policy, reference: base}`,
    with `loop.base`. Lengths drift upwards: watch them. That the reference is the policy that sampled is from memory of
    the paper. Source: arXiv 2401.10020.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 4, "temperature": 0.7, "top_p": 0.9}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "best_worst"}
    method: ClassVar[Mapping[str, Any]] = {"name": "dpo", "beta": 0.1}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 2, "take": "disjoint", "reference": "previous"}
    feedback: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"kind": "judge", "name": "self", "file": "points", "samples": 3},
    )


@loop("cream", paper="2410.12735")
class CREAM(Preset):
    """Self-rewarding by the implicit reward, each label trusted as far as two iterates rank the answers alike.

    Five samples at temperature 0.8 and top-p 0.95; the log-ratio of the round's policy to `loop.base` ranks them. C is
    (Kendall's tau + 1) / 2 of that ranking and the one of the iterate before it, tau-b where answers tie; in the first
    round, which has no iterate before it, of the initial model's log-likelihood per token. The loss is dpo with C as
    the probability of its label: the mean over the round (`consistency: avg`) or each prompt's own (`dyn`); at C = 1/2
    it pulls the margin to 0. `base` has no default, for the log-ratio of the initial model to itself is 0 everywhere
    and ranks nothing. Source: arXiv 2410.12735 and its code.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 5, "temperature": 0.8, "top_p": 0.95}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "best_worst"}
    method: ClassVar[Mapping[str, Any]] = {"name": "soft_dpo", "beta": 0.1}
    loop: ClassVar[Mapping[str, Any]] = {
        "rounds": 3,
        "take": "disjoint",
        "reference": "previous",
        "consistency": "avg",
    }
    feedback: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"kind": "implicit", "name": "policy", "model": "policy", "reference": "base"},
        {"kind": "implicit", "name": "before", "model": "before", "reference": "base", "weight": 0.0},
    )
    asks: ClassVar[Mapping[str, str]] = {
        "base": "the model that the initial one was trained from; to itself every implicit reward is 0"
    }
