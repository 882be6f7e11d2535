"""Names that mean several things in this field, or that TRL spells otherwise: what to say to who writes them.

Only names that are not ids of ours are looked up here, so an entry falls silent when a method takes the name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clash:
    """A sentence on what the name means, and the id that may be meant (it need not be registered yet)."""

    sentence: str
    ours: str = ""


def _trl(**names: str) -> dict[str, Clash]:
    return {theirs: Clash(f"TRL's `{theirs}` is `{ours}` in the book", ours) for theirs, ours in names.items()}


METHOD_CLASHES: dict[str, Clash] = {
    **_trl(
        sigmoid="dpo",
        hinge="dpo_hinge",
        robust="rdpo",
        exo_pair="exo",
        nca_pair="nca",
        aot_pair="aot",
        aot_unpaired="aot",
        chosen_nll="sft",
    ),
    "kto_pair": Clash("TRL's `kto_pair` was KTO on pairs; KTO reads unpaired labels, and a pair as two of them", "kto"),
    "bco_pair": Clash("TRL's `bco_pair` is BCO on pairs; BCO reads unpaired labels, and a pair as two of them", "bco"),
    "rpo_alpha": Clash("TRL's `rpo_alpha` is a weight: DPO plus an SFT term is a method of its own", "rpo"),
    "irpo": Clash("Iterative Reasoning PO (2404.19733) is DPO plus a length-normalised SFT term", "rpo"),
    "iterative_rpo": Clash("Iterative Reasoning PO (2404.19733) is DPO plus a length-normalised SFT term", "rpo"),
    "reward_aware_rpo": Clash("NVIDIA's reward-aware PO is not RPO, which is DPO plus SFT (2405.16436)"),
    "dr_rpo": Clash("DR-RPO is distributionally robust; RPO is DPO plus SFT (2405.16436)"),
    "dr_dpo": Clash("Dr. DPO is distributionally robust; DRO is direct reward optimisation (2405.19107), `dro_v`"),
    "dro": Clash(
        "DRO names two papers: direct reward optimisation with a value role, and robust DPO (Dr. DPO)", "dro_v"
    ),
    "apo": Clash("APO names three papers: anchored (2408.06266), accelerated and asymmetric PO", "apo_zero"),
    "implicit_po": Clash("implicit PO is not IPO, which is identity PO (2310.12036)"),
    "implicit_ipo": Clash("implicit PO is not IPO, which is identity PO (2310.12036)"),
    "orpo_occupancy": Clash("occupancy-regularised PO is not ORPO, which is odds-ratio PO (2403.07691)"),
    "hypo": Clash("HyPO is offline DPO plus an online KL; Hybrid-DPO (2602.11902) is another method of that name"),
    "xpo": Clash("XPO is exploratory PO; chi-PO is another method that is sometimes written so"),
    "cpo": Clash("CPO is contrastive PO; the ALMA repository's `cpo_trainer.py` computes another loss, ARPO"),
    "tpo": Clash("TPO names three papers"),
    "vpo": Clash("VPO is value-incentivised PO; vision papers use the same name"),
    "dapo": Clash("DAPO is a policy gradient on rollouts, an online method; it is no kind of DPO"),
    "spo": Clash("SPO names several methods of the Nash and rollout families; none is a variant of DPO"),
    "sppo": Clash("SPPO is self-play in rounds (2405.00675), not a loss on a fixed data set"),
    "grpo": Clash("GRPO is an online method; it needs rollouts"),
    "tdpo1": Clash("both versions of token-level DPO are one method", "tdpo"),
    "tdpo2": Clash("both versions of token-level DPO are one method", "tdpo"),
    "eta": Clash("`eta` is an option: RPO's weight of the SFT term, elsewhere 1/beta", "rpo"),
    "nll": Clash("the negative log-likelihood of demonstrations is SFT", "sft"),
    "reference_free": Clash("in DPO's original code this is a uniform reference ratio, not SimPO", "simpo"),
}
