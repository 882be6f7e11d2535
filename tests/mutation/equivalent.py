"""Mutants that compute the same numbers as the original wherever the method is defined: key -> why."""

from __future__ import annotations

_BY_REASON: dict[str, tuple[str, ...]] = {
    "the reward is squared": (
        "iqlearn_sft.IQLearnSFT._rewards flip_sign: return torch.where(known, wide(completions.logit) - "
        "self.gamma * after, 0.0) -> return -torch.where(known, wide(completions.logit) - self.gamma * "
        "after, 0.0)",
        "iqlearn_sft.IQLearnSFT._rewards swap_sides: wide(completions.logit) - self.gamma * after -> "
        "self.gamma * after - wide(completions.logit)",
    ),
    "the smaller of two does not depend on their order": (
        "ld_dpo.LDDPO.loss swap_sides: shared = torch.minimum(pairs.chosen.length, "
        "pairs.rejected.length) -> shared = torch.minimum(pairs.rejected.length, pairs.chosen.length)",
    ),
    "one more place than there are completions is read by none": (
        "lipo_lambda._discount_gap off_by_one: len(reward) -> len(reward) + 1",
        "lipo_lambda._discount_gap wrong_constant: 1 -> 2 #1",
    ),
    "it divides 0 by 0 only where a completion is tied with itself alone, and that branch is not taken": (
        "lipo_lambda._discount_gap drop_clamp: (tied * (tied - 1)).clamp(min=1) -> tied * (tied - 1)",
        "lipo_lambda._discount_gap wrong_constant: 1 -> 2 #5",
    ),
    "only its dtype and device are read": (
        "mapl.MAPL._contrasts sum_for_mean: pairs.delta -> pairs.chosen.mean_log_ratio - pairs.rejected.mean_log_ratio",
    ),
    "a pair without contrasts is masked out of the term": (
        "mapl.MAPL._contrasts drop_clamp: count.clamp(min=1) -> count",
    ),
    "both indices of a pair are completions of one list": (
        "lipo.LiPO.loss swap_sides: better -> worse #1",
        "lipo_lambda.LiPOLambda.loss swap_sides: better -> worse #3",
        "list_hinge.ListHinge.loss swap_sides: better -> worse #1",
    ),
    "the distance of two discounts is the same from either side": (
        "lipo_lambda.LiPOLambda.loss swap_sides: weight = gain * _discount_gap(reward.detach(), "
        "lists.group, better, worse) -> weight = gain * _discount_gap(reward.detach(), lists.group, "
        "worse, better)",
    ),
    "the view has both or neither": (
        "d2o.D2O._samples wrong_condition: view.samples is None or view.sample_of is None -> "
        "view.samples is None and view.sample_of is None",
        "hypo.HyPO._surrogate wrong_condition: samples is None or owner is None -> samples is None and owner is None",
        "mapl.MAPL._contrasts wrong_condition: pairs.contrasts is None or pairs.contrast_pair is None "
        "-> pairs.contrasts is None and pairs.contrast_pair is None",
        "spac.SPAC._pessimism wrong_condition: samples is None or owner is None -> samples is None and owner is None",
        "stages.of_samples wrong_condition: pairs.samples is None or pairs.sample_pair is None -> "
        "pairs.samples is None and pairs.sample_pair is None",
    ),
    "only the order of the values is asked, and an order has no gradient": (
        "lipo_lambda.LiPOLambda.loss drop_stop: reward.detach() -> reward",
    ),
    "both formulas hold on either side of the threshold; it only picks the more exact one": (
        "stages.log1mexp boundary: x > -math.log(2.0) -> x >= -math.log(2.0)",
        "stages.log1mexp wrong_constant: 2.0 -> 4.0",
        "stages.log1mexp wrong_reduction: math.log(2.0) -> 2.0",
    ),
    "the constant stands in the branch that is not taken, where any finite result will do": (
        "stages.log1mexp flip_sign: -math.log(2.0) -> math.log(2.0) #1",
        "stages.log1mexp wrong_constant: 2.0 -> 4.0 #1",
        "stages.log1mexp wrong_reduction: math.log(2.0) -> 2.0 #1",
    ),
    "far below 0 the branch that is not taken is finite by itself, and so is its gradient": (
        "stages.log1mexp drop_clamp: torch.where(near, x, half) -> x",
    ),
    "a softmax does not change when all its inputs are shifted, so the shift's gradient is zero": (
        "stages.log_softmax_by drop_stop: values.detach() -> values",
    ),
    "only the device of the mask is read": (
        "stages.kl_anchor off_by_one: view.completions.mask -> view.completions.mask.roll(1, -1)",
    ),
    "the residual is squared": (
        "dro_v.DROV.loss swap_sides: completions.reward - wide(completions.value)[:, 0] - self.tau * h "
        "-> self.tau * h - (completions.reward - wide(completions.value)[:, 0])",
    ),
    "the standardised margin is squared": (
        "beta_dpo.BetaDPO.loss swap_sides: delta - state['M0'] -> state['M0'] - delta",
    ),
    "only its dtype is read": (
        "beta_dpo.BetaDPO.loss sum_for_mean: pairs.delta -> pairs.chosen.mean_log_ratio - "
        "pairs.rejected.mean_log_ratio #1",
    ),
    "sign is -1 or 1": ("vpo.VPO.cautions boundary: self.sign > 0 -> self.sign >= 0",),
    "without others a sample is its own sum: 0 whatever divides it, and 0 / 0 is not taken": (
        "hypo.HyPO._surrogate boundary: others > 0 -> others >= 0",
        "hypo.HyPO._surrogate drop_clamp: others.clamp(min=1) -> others",
        "hypo.HyPO._surrogate drop_clamp: torch.where(others > 0, (total - log_ratio) / "
        "others.clamp(min=1), 0.0) -> (total - log_ratio) / others.clamp(min=1)",
    ),
    "a count does not depend on the order": (
        "f_dpo.FDPO.measure swap_sides: ratios = torch.cat([view.chosen.sum_log_ratio, "
        "view.rejected.sum_log_ratio]) -> ratios = torch.cat([view.rejected.sum_log_ratio, "
        "view.chosen.sum_log_ratio])",
    ),
    "which line a warning points to": ("_lists.unit_scores wrong_constant: 3 -> 6",),
    "a floor under a deviation that is 0 only where all margins are equal; any tiny one will do": (
        "beta_dpo. wrong_constant: 1e-12 -> 2e-12",
    ),
    "one more row of padding is read by none": (
        "elr.ELR._recall wrong_constant: 1 -> 2",
        "elr.ELR._recall wrong_constant: 1 -> 2 #2",
        "iqlearn_sft.IQLearnSFT._rewards wrong_constant: 1 -> 2 #2",
    ),
    "keys are not negative, so any negative number is found by none": ("elr.ELR._recall wrong_constant: 1 -> 2 #1",),
    "the last dimension of two is the second": ("iqlearn_sft.IQLearnSFT._rewards flip_sign: -1 -> 1",),
    "it guards products such as 0.29 * 100 against rounding down; any tiny one will do": (
        "beta_dpo.BetaDPO._kept wrong_constant: 1e-09 -> 2e-09",
    ),
}

EQUIVALENT: dict[str, str] = {key: reason for reason, keys in _BY_REASON.items() for key in keys}
