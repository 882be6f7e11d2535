"""Loops without an outside judge: demonstrations against own answers, or answers that the policy ranks itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from align.loops.preset import Preset, loop


@loop("spin", paper="2401.01335")
class SPIN(Preset):
    """Self-play fine-tuning: the demonstration is chosen, the policy's own answer to the same prompt rejected.

    The same prompts each round, one sample at temperature 1; from the second round on the pairs of the round before
    are trained on too. The reference is the policy that sampled. Exact minimisation of a round diverges for a scale
    below 1/2, so rounds must be short. Source: arXiv 2401.01335 and its code.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 1, "temperature": 1.0}
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

    sample: ClassVar[Mapping[str, Any]] = {"n": 1, "temperature": 1.0}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "by_origin"}
    method: ClassVar[Mapping[str, Any]] = {"name": "alpha_spin"}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 4, "take": "same", "reference": "initial"}
    wants = "none"


@loop("self_rewarding", paper="2401.10020")
class SelfRewarding(Preset):
    """The policy judges its own answers, and dpo trains on the best against the worst.

    Four samples at temperature 0.7 and top-p 0.9; the policy of the round gives each 0 to 5 points, the mean of three
    samples of the judge; an answer without a readable score is missing, never the worst. A model too small to judge
    with points can rank by its implicit reward instead: `feedback: [{kind: implicit, ...}]`. Lengths drift upwards:
    watch them. The reference, the policy that sampled, is from memory of the paper. Source: arXiv 2401.10020.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 4, "temperature": 0.7, "top_p": 0.9}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "best_worst"}
    method: ClassVar[Mapping[str, Any]] = {"name": "dpo", "beta": 0.1}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 2, "take": "disjoint", "reference": "previous"}
    feedback: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"kind": "judge", "name": "self", "model": "policy", "samples": 3},
    )


@loop("cream", paper="2410.12735")
class CREAM(Preset):
    """Self-rewarding by the implicit reward, each label trusted as far as two iterates rank the answers alike.

    Five samples at temperature 0.8 and top-p 0.95; the implicit reward of the round's policy to the initial model
    ranks them; C = (Kendall's tau + 1) / 2 with the ranking of the iterate before it, tau-b where answers tie. In the
    first round, where the policy is the initial model and its implicit reward is 0 throughout, answers are ranked by
    log-likelihood per token, and nothing stands to compare with but the summed log-likelihood. The loss is dpo with
    the label C, the mean over the round; `loop` with `consistency: dyn` takes each prompt's own. Source:
    arXiv 2410.12735 and its code.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 5, "temperature": 0.8, "top_p": 0.95}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "best_worst"}
    method: ClassVar[Mapping[str, Any]] = {"name": "soft_dpo", "beta": 0.1}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 3, "take": "disjoint", "reference": "previous"}
    feedback: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    consistency: ClassVar[Literal["avg", "dyn"] | None] = "avg"
