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
        aot_pair="aot",
        chosen_nll="sft",
        chunked_nll="sft",
    ),
    "robust": Clash("TRL's `robust` is `rdpo`, and its `label_smoothing` is `eps`", "rdpo"),
    "sppo_hard": Clash(
        "TRL's `sppo_hard` is twice `sppo` where winners have a win rate of 1 and losers of 0 (`chosen_reward`, "
        "`rejected_reward`), with `eta` 1 / beta; the squares of `cal_dpo` with `c: 1`, without its logistic term",
        "sppo",
    ),
    "apo_zero_unpaired": Clash(
        "TRL's `apo_zero_unpaired` is `kto` with its anchor held at 0; `apo_zero` is that on pairs, the two terms added"
    ),
    "alphapo": Clash("AlphaPO raises probabilities to -alpha before SimPO's margin; alpha 0 is `simpo`", "simpo"),
    "dft": Clash("TRL's `dft` weighs a token's likelihood term by the token's own probability; `sft` does not"),
    "nca_pair": Clash(
        "TRL's `nca_pair` is `nca` on a pair, a list of two: set `alpha: 0.01` for its one-hot weights", "nca"
    ),
    "sigmoid_norm": Clash(
        "TRL's `sigmoid_norm` is `dpo_norm`, whose beta is 5 here and 0.1 unless set in TRL", "dpo_norm"
    ),
    "tr_dpo": Clash("TR-DPO is DPO with a moving reference: `reference: {kind: ema, decay: 0.6, every: 512}`", "dpo"),
    "label_smoothing": Clash("DPO with label smoothing is conservative DPO, its rate is `eps`", "cdpo"),
    "soft_label_dpo": Clash(
        "DPO with soft labels is a cross-entropy to them; `smpo` scales the margin instead", "soft_dpo"
    ),
    "drdpo": Clash(
        "robust DPO names two methods: unbiased under flips (2403.00409), and distributionally robust", "rdpo"
    ),
    "robust_dpo": Clash(
        "robust DPO names two methods: unbiased under flips (2403.00409), and distributionally robust", "rdpo"
    ),
    "length_normalized_dpo": Clash("length-normalised DPO has a beta of 5 to 10", "dpo_norm"),
    "exo_pair": Clash(
        "TRL's `exo_pair` is `exo_pref`: its `beta` (0.1) is `beta_pi` (0.5), its `label_smoothing` is `eps`",
        "exo_pref",
    ),
    "exo": Clash("EXO is two methods: `exo_pref` on pairs, `exo_rw` on scored lists", "exo_pref"),
    "dpo_rw": Clash("EXO's forward-KL baseline on scored lists is the loss of InfoNCA", "infonca"),
    **dict.fromkeys(
        (
            "reverse_kl",
            "forward_kl",
            "js_divergence",
            "alpha_divergence",
            "f_divergence_type",
            "f_alpha_divergence_coef",
        ),
        Clash(
            "a divergence is an option: `f_dpo` with `divergence`; TRL's `f_alpha_divergence_coef` is 1 - alpha",
            "f_dpo",
        ),
    ),
    "chipo": Clash("chi-PO, f-DPO under chi2 + KL with a clipped margin", "chi_po"),
    "listnet": Clash("ListNet's loss on lists is the softmax cross-entropy", "list_softmax"),
    "plackett_luce": Clash("the Plackett-Luce likelihood of a ranked list is DPO for lists", "pl_dpo"),
    "kto_pair": Clash("TRL's `kto_pair` was KTO on pairs; KTO reads unpaired labels, and a pair as two of them", "kto"),
    "bco_pair": Clash(
        "TRL's `bco_pair` adds the two terms of a pair and has no centre; BCO is a mean over labelled answers (half of "
        "that), and reads a pair as two of them",
        "bco",
    ),
    "rpo_alpha": Clash("TRL's former `rpo_alpha` is a weight: `eta` of `rpo` with `sft_reduction: token_mean`", "rpo"),
    "irpo": Clash("Iterative Reasoning PO (2404.19733) is DPO plus a length-normalised SFT term", "rpo"),
    "iterative_rpo": Clash("Iterative Reasoning PO (2404.19733) is DPO plus a length-normalised SFT term", "rpo"),
    "reward_aware_rpo": Clash("NVIDIA's reward-aware PO is not RPO, which is DPO plus SFT (2405.16436)"),
    "dr_rpo": Clash("DR-RPO is distributionally robust; RPO is DPO plus SFT (2405.16436)"),
    "dr_dpo": Clash("Dr. DPO is distributionally robust; DRO is direct reward optimisation (2405.19107), `dro_v`"),
    "dro": Clash(
        "DRO names two papers: direct reward optimisation with a value role, and robust DPO (Dr. DPO)", "dro_v"
    ),
    "apo": Clash("APO names three papers: anchored (2408.06266), accelerated and asymmetric PO", "apo_zero"),
    **dict.fromkeys(
        ("accelerated_po", "asymmetric_po"),
        Clash("APO here is anchored (2408.06266), neither accelerated nor asymmetric PO"),
    ),
    **dict.fromkeys(
        ("decentralized_po", "decentralised_po"), Clash("DPO here is Direct Preference Optimization (2305.18290)")
    ),
    "discovered_po": Clash("Discovered Preference Optimization is DiscoPOP (2406.08414)", "discopop"),
    "conservative_dpo": Clash("label smoothing of DPO, its rate is `eps`", "cdpo"),
    "identity_po": Clash("identity PO, whose beta is `tau`", "ipo"),
    "slic_hf": Clash("SLiC-HF, without a reference; TRL's `hinge` has one and is `dpo_hinge`", "slic"),
    "rso": Clash("RSO's loss is the hinge with a reference; its rejection sampling makes data", "dpo_hinge"),
    "smaug": Clash("Smaug is the model of DPO-Positive", "dpop"),
    "dpo_positive": Clash("DPO-Positive", "dpop"),
    "simpo_gamma": Clash("TRL's `simpo_gamma` is beta times `gamma_ratio`", "simpo"),
    "gamma_beta_ratio": Clash("the authors' `gamma_beta_ratio` is `gamma_ratio`", "simpo"),
    "cpo_alpha": Clash("TRL's `cpo_alpha` is `lambda` of `cpo`, and `sft_weight` of `simpo`", "cpo"),
    "discopop_tau": Clash("TRL's `discopop_tau` is `tau`", "discopop"),
    "token_view": Clash("the token rewards of a DPO policy (2404.12358) are a way to look at it, not a loss", "dpo"),
    "implicit_po": Clash("implicit PO is not IPO, which is identity PO (2310.12036)"),
    "implicit_ipo": Clash("implicit PO is not IPO, which is identity PO (2310.12036)"),
    "orpo_occupancy": Clash("occupancy-regularised PO is not ORPO, which is odds-ratio PO (2403.07691)"),
    "arpo": Clash("ARPO is what the ALMA repository's `cpo_trainer.py` computes today; it is not CPO (2401.08417)"),
    "flex": Clash("the paper 3D-properties (2406.07327) calls DPO with two betas Flex-DPO", "flex_dpo"),
    "3d_properties": Clash("the paper 3D-properties (2406.07327) calls DPO with two betas Flex-DPO", "flex_dpo"),
    "hybrid_dpo": Clash("Hybrid-DPO (2602.11902) is another method than HyPO, offline DPO plus an online KL"),
    "sera": Clash("SeRA chooses and adds pairs between rounds (`align.loops`); train on them with any method on pairs"),
    "rc_dpo": Clash("Rc-DPO is MAPL's contrast of two prompts, with the prompts' tokens scored", "mapl"),
    "tpo": Clash("TPO names three papers"),
    "spo": Clash("SPO names several methods of the Nash and rollout families; none is a variant of DPO"),
    **dict.fromkeys(
        ("oaif", "iterative_dpo"),
        Clash("online AI feedback is DPO on fresh answers of the policy; rounds of it are a loop", "online_dpo"),
    ),
    "ipo_md": Clash("IPO-MD is online IPO on answers of a mixture: `mix: 0.125`", "online_ipo"),
    "nash_md_pg": Clash("Nash-MD-PG is the step of Nash-MD that is taken on a language model", "nash_md"),
    "mixture_coef": Clash(
        "TRL's `mixture_coef` is the weight of the reference: `mix`, and its `beta` is `tau`", "nash_md"
    ),
    "dno_practical": Clash("DNO in practice, the contrastive one", "dno_prct"),
    "regularized_spin": Clash("SPIN with an anchor that holds the first model too", "alpha_spin"),
    "tdpo1": Clash("both versions of token-level DPO are one method", "tdpo"),
    "tdpo2": Clash("both versions of token-level DPO are one method", "tdpo"),
    "eta": Clash("`eta` is an option: RPO's weight of the SFT term, elsewhere 1/beta", "rpo"),
    "ld_alpha": Clash("TRL's `ld_alpha` is `alpha` of length-desensitised DPO", "ld_dpo"),
    "use_weighting": Clash(
        "TRL's `use_weighting` is weighted DPO; TRL does not cut the weight at 1, `clamp: null` is its form", "wpo"
    ),
    "treg": Clash("T-REG weighs tokens by two opposite prompts", "t_reg"),
    "length_desensitized_dpo": Clash("length-desensitised DPO weighs the longer answer's tail", "ld_dpo"),
    "iq_learn": Clash("IQ-Learn on the tokens of demonstrations", "iqlearn_sft"),
    "nll": Clash("the negative log-likelihood of demonstrations is SFT", "sft"),
    "reference_free": Clash("in DPO's original code this is a uniform reference ratio, not SimPO", "simpo"),
}
