"""Loops that ask somebody which of the policy's own answers is better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from align.loops.preset import Preset, loop


@loop("iterative_dpo", paper="2405.07863")
class IterativeDPO(Preset):
    """A few large rounds of dpo on the best against the worst of K own samples.

    K = 8 at temperature 1, best against worst reward, ties dropped, two epochs; the new model samples next, and the
    optimiser starts afresh. What the loss compares with has no default: the published scripts take the policy that
    sampled (`previous`), which bounds nothing over rounds (KL to the initial model grows with each); a port of them
    keeps the initial model, as the theory has it. Against `previous` and intransitive preferences the iterates cycle.
    Source: arXiv 2405.07863 and its scripts.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 8, "temperature": 1.0, "top_p": 1.0}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "best_worst"}
    method: ClassVar[Mapping[str, Any]] = {"name": "dpo", "beta": 0.1}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 3, "take": "disjoint"}
    asks: ClassVar[Mapping[str, str]] = {
        "reference": "`previous` is what the published scripts do, `initial` bounds the distance from the first model"
    }


@loop("sppo", paper="2405.00675")
class SPPO(Preset):
    """Self-play preference optimisation: each answer's log-ratio is regressed to its win rate.

    Five samples at temperature 0.7 and top-p 0.9; P(y > pi_t) is the mean of its row of the matrix of wins, with itself
    counted as 1/2; the best and the worst are trained on, each with its own P, against the policy that sampled. With
    itself counted, P - 1/2 shrinks by (K - 1) / K: an effective eta of 0.8 of the one that is set, at K = 5, as in the
    published code. Source: arXiv 2405.00675 and its code.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 5, "temperature": 0.7, "top_p": 0.9}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "best_worst", "reward": "win_rate"}
    method: ClassVar[Mapping[str, Any]] = {"name": "sppo"}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 3, "take": "disjoint", "reference": "previous"}
    wants = "preference"


@loop("inpo", paper="2407.00617")
class INPO(Preset):
    """Iterative Nash policy optimisation: a square of the margin against the policy that sampled and the initial one.

    Eight samples; a knock-out tournament of eleven comparisons finds the two to train on, and the pair is kept where
    its winner wins once more. The reference stays the initial model; the policy that sampled is an anchor beside it,
    with weights tau / eta and 1 - tau / eta. Of the best and the worst, or with a judge that never wavers, the loop
    plays the game in which the likelier winner always wins: for preferences that go in circles draw two samples
    (`n: 2`) and the label (`pairs.label: sampled`). Source: arXiv 2407.00617.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 8, "temperature": 1.0, "top_p": 1.0}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "tournament"}
    method: ClassVar[Mapping[str, Any]] = {"name": "inpo"}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 3, "take": "disjoint", "reference": "initial"}
    wants = "preference"


@loop("dno_prct", paper="2404.03715")
class DNOPrct(Preset):
    """Direct Nash optimisation, practical form: clear pairs of a judge with points, and some of the rounds before.

    Five samples at temperature 0.7 and top-p 0.95, and the stored answer of a teacher where the rows have one. The
    judge gives 0 to 6 points; a chosen answer has at least 5, and 2 more than the rejected one, or 1 more where the
    policy wrote it. 30 % of the pairs of the round before and 15 % of those before that are trained on too. Source:
    arXiv 2404.03715.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 5, "temperature": 0.7, "top_p": 0.95, "data_answers": True}
    pairs: ClassVar[Mapping[str, Any]] = {
        "rule": "margin",
        "margin": 2.0,
        "own_margin": 1.0,
        "least_score": 5.0,
    }
    method: ClassVar[Mapping[str, Any]] = {"name": "dno_prct"}
    loop: ClassVar[Mapping[str, Any]] = {
        "rounds": 3,
        "take": "disjoint",
        "reference": "previous",
        "earlier": [0.3, 0.15],
    }


@loop("rebel", paper="2404.16767")
class REBEL(Preset):
    """Regression to relative rewards in rounds: two own answers, and the difference of their rewards as the target.

    Two samples at temperature 1, at which the policy's log-probs are those that it drew with; the reference is the
    policy that sampled, so nothing holds the rounds near the initial model unless the reward does. Two answers of equal
    reward are no pair here; the online method keeps them, with a target of 0. The published code passes four times
    over the pairs of a round (`train.num_train_epochs: 4`). Source: arXiv 2404.16767, Alg. 1.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 2, "temperature": 1.0, "top_p": 1.0}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "best_worst"}
    method: ClassVar[Mapping[str, Any]] = {"name": "rebel", "anchor": "reference"}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 3, "take": "disjoint", "reference": "previous"}


@loop("raft", paper="2304.06767")
class RAFT(Preset):
    """Reward-ranked fine-tuning: sft on the best of K own samples, and nothing pushed down.

    Eight samples at temperature 0.85, the best of each prompt, 20 rounds of 1024 prompts. No reference. Source:
    arXiv 2304.06767 and its code.
    """

    sample: ClassVar[Mapping[str, Any]] = {"n": 8, "temperature": 0.85}
    pairs: ClassVar[Mapping[str, Any]] = {"rule": "top"}
    method: ClassVar[Mapping[str, Any]] = {"name": "sft"}
    loop: ClassVar[Mapping[str, Any]] = {"rounds": 20, "take": "fresh"}
