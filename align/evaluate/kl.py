"""The distance of a policy from its reference, estimated on the policy's own samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from align.core.errors import ConfigError
from align.evaluate.intervals import Estimate, mean_interval, ratio_interval


@dataclass(frozen=True)
class KL:
    """KL(policy || reference) in nats.

    Attributes:
        k1: mean over samples of the summed log-ratio; unbiased, may be negative.
        k3: mean over samples of the summed r - 1 - log r, r = reference / policy of each token; unbiased too, never
            negative, and of less variance while the two are near.
        k1_per_token, k3_per_token: the same sums divided by all tokens.
        tokens: tokens in all.
    """

    k1: Estimate
    k3: Estimate
    k1_per_token: Estimate
    k3_per_token: Estimate
    tokens: int


def kl_on_samples(
    logp_policy: Sequence[np.ndarray | Sequence[float]],
    logp_ref: Sequence[np.ndarray | Sequence[float]],
    clusters: Sequence[Hashable] | None = None,
) -> KL:
    """Estimates of the KL of whole completions, from log-probabilities of tokens that the policy sampled.

    Both estimators are of a token's KL given what stands before it (k1 and k3 of J. Schulman, Approximating KL
    divergence, 2020); by the chain rule their sums over a completion estimate the KL of completions. Unbiased only
    for samples of the policy itself: temperature 1, no top-p or top-k. Of cut completions it is the KL up to the cut.

    Args:
        logp_policy, logp_ref: per sample, [T] log-probabilities at temperature 1 of its tokens.
        clusters: per sample, its prompt.

    Raises:
        ConfigError: the two differ in samples, or in a sample's tokens.
    """
    if [len(row) for row in logp_policy] != [len(row) for row in logp_ref]:
        raise ConfigError("the log-probs of policy and reference are of different tokens")
    ratios = [np.asarray(p, float) - np.asarray(r, float) for p, r in zip(logp_policy, logp_ref, strict=True)]
    first = np.array([row.sum() for row in ratios])
    third = np.array([(np.expm1(-row) + row).sum() for row in ratios])
    return kl_of_sums(first, third, np.array([len(row) for row in ratios]), clusters)


def kl_of_sums(k1: np.ndarray, k3: np.ndarray, tokens: np.ndarray, clusters: Sequence[Hashable] | None = None) -> KL:
    """The same from each sample's sums, all [N]."""
    return KL(
        k1=mean_interval(k1, clusters),
        k3=mean_interval(k3, clusters),
        k1_per_token=ratio_interval(k1, tokens, clusters),
        k3_per_token=ratio_interval(k3, tokens, clusters),
        tokens=int(np.sum(tokens)),
    )
