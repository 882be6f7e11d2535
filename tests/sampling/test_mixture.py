"""The per-token geometric mixture against a plain float64 loop, and its two ends against the samplers of each model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.core.errors import ConfigError, ModelError
from align.sampling import SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.mixture import MixtureSampler
from align.testing.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PREFIXES = [[1, 60, 70], [1, 80, 90, 100, 110, 120], [1, 61], [1, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89]]


def same(one, other, tolerance=0.0):
    return all(
        a.ids.tolist() == b.ids.tolist() and a.text == b.text and np.abs(a.logp - b.logp).max() <= tolerance
        for first, second in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )


def mixed_logp(policy, reference, mix, prefix, rollout, temperature=1.0):
    """log pi_mix of each token, one forward a token, in float64."""
    out, row = [], list(prefix)
    for token in rollout.ids.tolist():
        with torch.no_grad():
            one, other = (
                model(torch.tensor([row]), use_cache=False).logits[0, -1].double() for model in (policy, reference)
            )
        weights = torch.exp((1 - mix) * one.log_softmax(0) + mix * other.log_softmax(0)) ** (1 / temperature)
        out.append(float(torch.log(weights[token] / weights.sum())))
        row.append(token)
    return np.array(out)


@pytest.mark.parametrize(
    ("family", "mix", "temperature"), [("qwen3", 0.25, 1.0), ("mistral", 0.5, 0.7), ("gpt2", 0.8, 1)]
)
def test_log_probs_are_those_of_a_plain_loop(family, mix, temperature):
    policy, reference = tiny_model(family, seed=1), tiny_model(family, seed=2)
    sampler = MixtureSampler(policy, reference, TOKENIZER, mix)
    groups = sampler.sample(PREFIXES, 2, SamplingParams(max_new_tokens=12, temperature=temperature, seed=3))
    for prefix, group in zip(PREFIXES, groups, strict=True):
        for rollout in group:
            wanted = mixed_logp(policy, reference, mix, prefix, rollout, temperature)
            assert np.abs(wanted - rollout.logp).max() < 1e-4


def test_its_ends_draw_as_policy_and_reference_do():
    policy, reference = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    params = SamplingParams(max_new_tokens=15, seed=6)
    sampler = MixtureSampler(policy, reference, TOKENIZER, 0.0)
    assert same(sampler.sample(PREFIXES, 3, params), HFSampler(policy, TOKENIZER).sample(PREFIXES, 3, params))
    sampler.mix = 1.0
    found, wanted = sampler.sample(PREFIXES, 3, params), HFSampler(reference, TOKENIZER).sample(PREFIXES, 3, params)
    assert same(found, wanted, 1e-6)
    sampler.mix = 0.5
    assert not same(found, sampler.sample(PREFIXES, 3, params), 10)
    assert sampler.capabilities == {"seeds", "mixture"}


def test_batches_that_are_begun_anew_change_nothing():
    """Rows that end early leave the batch, and the rest goes on with longer prefixes and new caches."""
    policy, reference = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2)
    with torch.no_grad():
        for model in (policy, reference):
            model.lm_head.weight[2] *= 3
    params = SamplingParams(max_new_tokens=40, seed=6)
    whole = MixtureSampler(policy, reference, TOKENIZER, 0.4).sample(PREFIXES, 12, params)
    small = MixtureSampler(policy, reference, TOKENIZER, 0.4, batch_size=5).sample(PREFIXES, 12, params)
    assert same(whole, small, 1e-4)
    lengths = [len(rollout) for group in whole for rollout in group]
    assert min(lengths) < 20 and max(lengths) == 40
    longest = max((rollout for rollout in whole[3]), key=len)
    assert np.abs(mixed_logp(policy, reference, 0.4, PREFIXES[3], longest) - longest.logp).max() < 1e-4


def test_a_policy_with_its_adapter_off_is_its_own_reference():
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}
    policy = get_peft_model(tiny_model("qwen3"), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    params = SamplingParams(max_new_tokens=10, seed=6)
    for mix in (0.3, 1.0):
        shared = MixtureSampler(policy, None, TOKENIZER, mix).sample(PREFIXES, 2, params)
        apart = MixtureSampler(policy, tiny_model("qwen3"), TOKENIZER, mix).sample(PREFIXES, 2, params)
        assert same(shared, apart, 1e-4)
    bare = HFSampler(tiny_model("qwen3"), TOKENIZER).sample(PREFIXES, 2, params)
    assert same(shared, bare, 1e-4)
    assert not same(HFSampler(policy, TOKENIZER).sample(PREFIXES, 2, params), bare, 10)  # the adapter is on again


def test_both_models_are_left_as_they_were():
    policy, reference = tiny_model("qwen3", seed=1).train(), tiny_model("qwen3", seed=2).train()
    reference.generation_config.repetition_penalty = 1.5
    before = reference.generation_config.to_dict()
    MixtureSampler(policy, reference, TOKENIZER, 0.5).sample(PREFIXES, 1, SamplingParams(max_new_tokens=3))
    assert policy.training and reference.training and reference.generation_config.to_dict() == before


def test_what_cannot_be_mixed_is_refused():
    policy = tiny_model("qwen3")
    with pytest.raises(ConfigError, match="the policy has no adapter"):
        MixtureSampler(policy, None, TOKENIZER, 0.5)
    with pytest.raises(ConfigError, match="`mix` is 1"):
        MixtureSampler(policy, policy, TOKENIZER, 1.5)
    with pytest.raises(ModelError, match="vocabulary is 320, the reference's 256"):
        MixtureSampler(policy, tiny_model("qwen3", vocab=256), TOKENIZER, 0.5)
    with pytest.raises(ModelError, match="no cache of keys and values"):
        mamba = tiny_model("mamba")
        MixtureSampler(policy, mamba, TOKENIZER, 0.5).sample(PREFIXES, 1, SamplingParams(max_new_tokens=3))
