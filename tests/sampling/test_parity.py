"""The parity report on numbers worked out by hand, and with a real sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError
from align.sampling import Rollout, SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.parity import PlainForward, compare, compare_greedy, parity, refuse_or_say
from align.testing.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PREFIXES = [[1, 60, 70], [1, 80, 90, 100, 110, 120], [1, 61], [1, 99, 98, 97]]


def rollout(*ids):
    return Rollout(np.array(ids), np.zeros(len(ids), np.float32), "", False)


def test_numbers_are_means_over_tokens():
    sampler = [np.array([-1.0, -2.0], np.float32), np.array([-0.5], np.float32)]
    trainer = [np.array([-1.1, -1.8], np.float32), np.array([-0.5], np.float32)]
    report = compare(sampler, trainer)
    assert (report.rollouts, report.tokens) == (2, 3)
    assert report.mean == pytest.approx(0.1, abs=1e-6) and report.largest == pytest.approx(0.2, abs=1e-6)
    kl = (math.exp(-0.1) - 1 + 0.1 + math.exp(0.2) - 1 - 0.2) / 3
    assert report.kl == pytest.approx(kl, rel=1e-5)
    gap = abs(math.exp(-1.1) - math.exp(-1.0)) + abs(math.exp(-1.8) - math.exp(-2.0))
    assert report.probability == pytest.approx(gap / 3, rel=1e-5)
    assert report.ratio == pytest.approx((math.exp(0.1) + math.exp(0.2) + 1) / 3, rel=1e-5)
    assert (
        "probabilities differ by 0.0217 on average" in report.loud and "exp|log-prob difference| is 1.11" in report.loud
    )
    assert report.metrics()["parity/largest"] == report.largest and "parity/loud" not in report.metrics()
    assert compare(sampler, sampler).loud == "" and compare(sampler, sampler).kl == 0


def test_numbers_that_are_not_finite_are_loud():
    assert "do not agree" in compare([np.array([-1.0])], [np.array([np.nan])]).loud


def test_the_kl_is_that_of_the_sampler_against_the_trainer():
    """In expectation over the sampler's tokens, k3 is KL(sampler || trainer)."""
    rng = np.random.default_rng(0)
    sampler = np.log(rng.dirichlet(np.full(6, 5.0)))
    trainer = sampler + 0.5 * rng.standard_normal(6)
    trainer -= np.log(np.exp(trainer).sum())
    tokens = rng.choice(6, size=200_000, p=np.exp(sampler))
    exact = float((np.exp(sampler) * (sampler - trainer)).sum())
    assert compare([sampler[tokens]], [trainer[tokens]]).kl == pytest.approx(exact, rel=0.02)


def test_what_does_not_match_is_refused():
    with pytest.raises(ConfigError, match="other numbers of tokens"):
        compare([np.zeros(2)], [np.zeros(3)])
    with pytest.raises(ConfigError, match="no tokens"):
        compare([np.zeros(0)], [np.zeros(0)])


def test_greedy_ids_may_part_at_a_tie_and_nowhere_else():
    lead = np.array([1.0, 5e-5, 1.0])
    drawn = [rollout(3, 4, 5), rollout(3, 9, 8), rollout(7, 4, 5), rollout(3, 4, 9)]
    found = compare_greedy(drawn[:3], [(np.array([3, 4, 5]), lead)] * 3)
    assert (found.sequences, found.same, found.ties, found.different) == (3, 1, 1, 1)
    late = compare_greedy(drawn[3:], [(np.array([3, 4, 5]), np.array([1.0, 1.0, 1.0]))])
    assert (late.same, late.ties, late.different) == (0, 0, 1)
    many = [rollout(3)] * 98
    best = [(np.array([3]), np.array([1.0]))] * 98 + [(np.array([4]), np.array([1.0]))] * 2
    logp = [np.zeros(1)]
    assert compare(logp, logp, compare_greedy([*many, rollout(3), rollout(3)], best)).loud == ""
    best[0] = (np.array([4]), np.array([1.0]))
    assert "3 of 100 greedy" in compare(logp, logp, compare_greedy([*many, rollout(3), rollout(3)], best)).loud


def test_a_real_sampler_agrees_with_its_own_model_and_not_with_another():
    model = tiny_model("qwen3")
    sampler, forward = HFSampler(model, TOKENIZER), PlainForward(model)
    # The comparison leaves the cut out, or each log-prob would differ by the mass that is kept.
    params = SamplingParams(max_new_tokens=16, temperature=0.7, top_p=0.8, seed=5)
    report = parity(sampler, PREFIXES, params, forward.logp, forward.best, n=3)
    assert report.rollouts == 12 and report.largest < 1e-4 and report.loud == "" and report.greedy.different == 0
    other = PlainForward(tiny_model("qwen3", seed=1))
    wrong = parity(sampler, PREFIXES, params, other.logp, other.best, n=3)
    assert "greedy completions differ" in wrong.loud and wrong.kl > 0.1 and wrong.ratio > 1.05


def test_a_greedy_run_is_compared_at_temperature_one():
    model = tiny_model("qwen3")
    forward = PlainForward(model)
    report = parity(
        HFSampler(model, TOKENIZER), PREFIXES, SamplingParams(max_new_tokens=8, temperature=0), forward.logp
    )
    assert report.largest < 1e-4 and report.greedy is None


def test_cut_sampling_is_refused_where_a_ratio_would_carry_the_mass():
    assert refuse_or_say(SamplingParams(), True) == "" == refuse_or_say(SamplingParams(), False)
    with pytest.raises(ConfigError, match="and top_k 5 with a method whose loss divides"):
        refuse_or_say(SamplingParams(top_p=0.8, top_k=5), True)
    said = refuse_or_say(SamplingParams(top_p=0.8), False)
    assert said.startswith("sampling with top_p 0.8:") and "renormalised" in said


def test_the_mass_that_top_p_cuts_is_what_the_refusal_is_about():
    """The mean ratio of whole to truncated probabilities is the kept mass, not 1."""
    model = tiny_model("qwen3")
    params = SamplingParams(max_new_tokens=8, top_p=0.8, seed=5)
    groups = HFSampler(model, TOKENIZER).sample(PREFIXES, 50, params)
    flat = [one for group in groups for one in group]
    owners = [prefix for prefix, group in zip(PREFIXES, groups, strict=True) for _ in group]
    scored = PlainForward(model).logp(owners, flat, 1.0)
    ratio = np.concatenate([np.exp(a - b.logp) for a, b in zip(scored, flat, strict=True)])
    assert 0.79 < ratio.mean() < 0.86 and torch.is_grad_enabled()
