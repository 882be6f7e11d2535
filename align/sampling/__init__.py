"""Prefixes -> completions."""

from align.sampling.base import Rollout, Sampler, SamplingParams

__all__ = ["Rollout", "Sampler", "SamplingParams"]
