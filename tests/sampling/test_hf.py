"""Rollouts against independent re-implementations: HF greedy, single-sequence forwards, exact distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from align.core.errors import ConfigError, ModelError
from align.sampling import SamplingParams
from align.sampling.hf import HFSampler
from align.scoring.backends import prepare
from align.scoring.engine import score
from align.scoring.layout import Tree
from align.testing.tiny import BOS_ID, EOS_ID, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PREFIXES = [[1, 60, 70], [1, 80, 90, 100, 110, 120], [1, 61], [1, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89]]


def sampler(family="llama", **keywords):
    return HFSampler(tiny_model(family), TOKENIZER, **keywords)


def plain(family):
    """The model with the attention that its authors wrote: `sdpa`, the default, drops gemma2's soft cap."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    return model


def same(one, other, tolerance=0.0):
    for first, second in zip(one, other, strict=True):
        for a, b in zip(first, second, strict=True):
            if a.ids.tolist() != b.ids.tolist() or a.text != b.text or a.finished != b.finished:
                return False
            if np.abs(a.logp - b.logp).max() > tolerance:
                return False
    return True


def alone(model, prefix, rollout, temperature=1.0, top_k=0, top_p=1.0):
    """Log-probs of a rollout by one plain forward of the single sequence, cut by a loop over tokens."""
    ids = torch.tensor([[*prefix, *rollout.ids.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].double() / temperature
    out = []
    for place, token in enumerate(rollout.ids):
        probs = logits[len(prefix) - 1 + place].softmax(-1).numpy()
        kept = np.argsort(-probs, kind="stable")[: top_k or len(probs)]
        mass, chosen = 0.0, []
        for candidate in kept:
            chosen.append(candidate)
            mass += probs[candidate] / probs[kept].sum()
            if mass >= top_p:
                break
        assert token in chosen
        out.append(np.log(probs[token] / probs[chosen].sum()))
    return np.array(out)


FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "mixtral", "mamba")


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_padded_batches_are_those_of_single_sequences(family):
    model = plain(family)
    rollouts = sampler(family).sample(PREFIXES, 2, SamplingParams(max_new_tokens=12, temperature=0.8, seed=3))
    for prefix, group in zip(PREFIXES, rollouts, strict=True):
        for rollout in group:
            assert np.abs(alone(model, prefix, rollout, 0.8) - rollout.logp).max() < 1e-4
            assert rollout.logp.dtype == np.float32 and rollout.ids.dtype == np.int64


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_is_hf_greedy(family):
    model = plain(family)
    rollouts = sampler(family).sample(PREFIXES, 1, SamplingParams(max_new_tokens=15, temperature=0))
    for prefix, (rollout,) in zip(PREFIXES, rollouts, strict=True):
        config = GenerationConfig(max_new_tokens=15, do_sample=False, eos_token_id=EOS_ID, pad_token_id=0)
        ids = torch.tensor([prefix])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert rollout.ids.tolist() == wanted[0, len(prefix) :].tolist()
        assert np.abs(alone(model, prefix, rollout) - rollout.logp).max() < 1e-4


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.7}])
def test_cut_distributions_are_renormalised_and_their_support_is_kept(settings):
    one = sampler()
    params = SamplingParams(max_new_tokens=10, temperature=0.7, seed=5, **settings)
    for prefix, group in zip(PREFIXES, one.sample(PREFIXES, 8, params), strict=True):
        for rollout in group:
            wanted = alone(one.model, prefix, rollout, 0.7, **settings)
            assert np.abs(wanted - rollout.logp).max() < 1e-4


def test_first_tokens_have_the_softmax_s_frequencies():
    one = sampler()
    draws = 4000
    temperature = 0.7
    rollouts = one.sample([PREFIXES[0]], draws, SamplingParams(max_new_tokens=1, temperature=temperature, seed=11))
    counts = np.bincount([int(rollout.ids[0]) for rollout in rollouts[0]], minlength=320)
    with torch.no_grad():
        logits = one.model(torch.tensor([PREFIXES[0]])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1).numpy() * draws
    often = expected >= 5
    observed, wanted = (
        np.append(counts[often], counts[~often].sum()),
        np.append(expected[often], expected[~often].sum()),
    )
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    unscaled = logits.softmax(-1).numpy() * draws  # the test sees a temperature that was forgotten
    unscaled = np.append(unscaled[often], unscaled[~often].sum())
    assert ((observed - unscaled) ** 2 / unscaled).sum() - freedom > 4 * (2 * freedom) ** 0.5


def test_the_same_call_gives_the_same_rollouts_and_batches_matter_by_rounding_alone():
    params = SamplingParams(max_new_tokens=20, seed=1)
    one = sampler()
    first = one.sample(PREFIXES, [3, 1, 0, 2], params)
    assert [len(group) for group in first] == [3, 1, 0, 2]
    assert same(first, one.sample(PREFIXES, [3, 1, 0, 2], params))
    assert same(first, sampler(batch_size=1).sample(PREFIXES, [3, 1, 0, 2], params), 1e-4)
    assert same(first, sampler(tokens_per_batch=64).sample(PREFIXES, [3, 1, 0, 2], params), 1e-4)
    assert same([first[0]], one.sample(PREFIXES[:1], 3, params), 1e-4)
    other = one.sample(PREFIXES, [3, 1, 0, 2], SamplingParams(max_new_tokens=20, seed=2))
    assert not same(first, other)
    assert len({tuple(rollout.ids) for rollout in first[0]}) == 3


def test_rows_that_go_on_after_others_ended_are_the_same_rows():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[EOS_ID] *= 3
    params = SamplingParams(max_new_tokens=60, seed=4)
    prefixes = [PREFIXES[row % 4] for row in range(48)]
    batches = []
    small = HFSampler(model, TOKENIZER, batch_size=8).sample(prefixes, 1, params)
    large = HFSampler(model, TOKENIZER, batch_size=32)
    run = large._generate
    large._generate = lambda batch, *rest: (batches.append([len(row.ids) for row in batch]), run(batch, *rest))
    assert same(small, large.sample(prefixes, 1, params), 1e-4)
    assert any(max(done) > 0 for done in batches), "no batch was stopped to go on without its ended rows"
    lengths = [len(group[0]) for group in small]
    assert min(lengths) < 10 and max(lengths) == 60


def test_end_tokens_of_tokenizer_model_and_caller_end_a_completion_once():
    model = tiny_model()
    model.generation_config.eos_token_id = [70, 71]
    with torch.no_grad():
        for token in (70, 71, 72):
            model.lm_head.weight[token] = model.lm_head.weight[EOS_ID]
    one = HFSampler(model, TOKENIZER, end_ids=[72])
    assert one.end_ids == {EOS_ID, 70, 71, 72}
    rollouts = [r for group in one.sample(PREFIXES, 40, SamplingParams(max_new_tokens=30)) for r in group]
    last = {int(rollout.ids[-1]) for rollout in rollouts if rollout.finished}
    assert last == {EOS_ID, 70, 71, 72}
    for rollout in rollouts:
        body = rollout.ids[:-1] if rollout.finished else rollout.ids
        assert not set(body.tolist()) & one.end_ids
        assert rollout.finished or len(rollout) == 30
        assert rollout.text == TOKENIZER.decode(body)


def test_nothing_of_the_model_or_the_random_state_is_changed():
    model = tiny_model("gemma2")
    model.generation_config.update(repetition_penalty=1.7, do_sample=True, top_k=3, temperature=0.1)
    settings = model.generation_config.to_dict()
    prepare(model, "tree")
    model.train()
    model.model.layers[0].eval()
    before, attention = torch.get_rng_state(), model.config._attn_implementation
    HFSampler(model, TOKENIZER).sample(PREFIXES, 1, SamplingParams(max_new_tokens=5))
    assert torch.equal(before, torch.get_rng_state())
    assert model.config._attn_implementation == attention == "align_tree"
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert model.generation_config.to_dict() == settings


def test_the_model_s_own_generation_defaults_are_left_out():
    own, loaded = tiny_model(), tiny_model()
    loaded.generation_config.update(repetition_penalty=1.7, do_sample=True, top_k=3, temperature=0.1, min_length=20)
    params = SamplingParams(max_new_tokens=15, seed=2)
    assert same(
        HFSampler(own, TOKENIZER).sample(PREFIXES, 2, params),
        HFSampler(loaded, TOKENIZER).sample(PREFIXES, 2, params),
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_a_prepared_model_samples_as_before_and_scores_its_rollouts_alike(family):
    model = tiny_model(family)
    params = SamplingParams(max_new_tokens=20, seed=6)
    wanted = HFSampler(model, TOKENIZER).sample(PREFIXES, 2, params)
    for name in ("tree", "sdpa", "padded"):
        backend = prepare(model, name)
        found = HFSampler(model, TOKENIZER).sample(PREFIXES, 2, params)
        assert same(wanted, found, 1e-5), name
        trees = [Tree.of(p, [r.ids.tolist() for r in group]) for p, group in zip(PREFIXES, found, strict=True)]
        with torch.no_grad():
            logp = score(model, backend.pack(trees))["logp"]
        flat = [rollout for group in found for rollout in group]
        for row, rollout in zip(logp, flat, strict=True):
            assert np.abs(row[: len(rollout)].numpy() - rollout.logp).max() < 1e-4


def test_an_adapter_counts_and_dropout_does_not():
    base = tiny_model()
    params = SamplingParams(max_new_tokens=12, seed=8)
    before = HFSampler(base, TOKENIZER).sample(PREFIXES, 2, params)
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    )
    model.train()
    one = HFSampler(model, TOKENIZER)
    after = one.sample(PREFIXES, 2, params)
    assert not same(before, after, 10)
    assert same(after, one.sample(PREFIXES, 2, params))
    with model.disable_adapter():
        assert same(before, one.sample(PREFIXES, 2, params), 1e-5)
    model.eval()
    for prefix, group in zip(PREFIXES, after, strict=True):
        assert np.abs(alone(model, prefix, group[0]) - group[0].logp).max() < 1e-4


def test_sync_follows_a_module_and_copies_weights():
    params = SamplingParams(max_new_tokens=8, seed=8)
    one, other = sampler(), tiny_model(seed=5)
    wanted = HFSampler(other, TOKENIZER).sample(PREFIXES, 1, params)
    one.sync(other.state_dict())
    assert same(wanted, one.sample(PREFIXES, 1, params))
    assert one.model is not other
    one.sync(tiny_model())
    assert not same(wanted, one.sample(PREFIXES, 1, params), 10)
    one.sync(other)
    assert same(wanted, one.sample(PREFIXES, 1, params))


def test_training_goes_on_after_sampling():
    model = tiny_model("mistral")
    HFSampler(model, TOKENIZER).sample(PREFIXES, 1, SamplingParams(max_new_tokens=20))
    ids = torch.tensor([PREFIXES[3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_tokenizer_without_padding_and_progress_in_completions():
    tokenizer = tiny_tokenizer()
    params = SamplingParams(max_new_tokens=10, seed=1)
    wanted = HFSampler(tiny_model(), tokenizer).sample(PREFIXES, 2, params)
    tokenizer.pad_token = None
    seen = []
    found = HFSampler(tiny_model(), tokenizer, batch_size=3).sample(PREFIXES, 2, params, seen.append)
    assert same(wanted, found, 1e-4)
    assert sum(seen) == 8 and len(seen) > 1


def test_out_of_memory_halves_the_batch():
    one = sampler()
    params = SamplingParams(max_new_tokens=6, seed=1)
    wanted = one.sample(PREFIXES, 4, params)
    run = one._generate

    def limited(batch, *rest):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("no room")
        run(batch, *rest)

    one._generate = limited
    assert same(wanted, one.sample(PREFIXES, 4, params), 1e-4)
    assert one.batch_size == 4


def test_each_prefix_has_parameters_of_its_own():
    one = sampler(batch_size=3)
    own = [
        SamplingParams(max_new_tokens=6, seed=3),
        SamplingParams(max_new_tokens=11, temperature=0),
        SamplingParams(max_new_tokens=9, temperature=0.6, top_k=7, seed=9),
        SamplingParams(max_new_tokens=4, seed=5),
    ]
    mixed = one.sample(PREFIXES, [2, 1, 3, 2], own)
    for number, params in enumerate(own):
        alone_again = one.sample(PREFIXES, [2, 1, 3, 2], params)  # the number of a prefix is part of its draw
        assert same([alone_again[number]], [mixed[number]], 1e-5)
    assert max(map(len, mixed[0])) == 6 and max(map(len, mixed[1])) == 11
    with pytest.raises(ConfigError, match="1 `params` for 4 prefixes"):
        one.sample(PREFIXES, 1, own[:1])


def test_errors_name_the_prefix():
    one = sampler()
    params = SamplingParams(max_new_tokens=4)
    for prefixes, n, says in (
        ([[1], []], 1, "prefix 1 is empty"),
        ([[1, 320]], 1, "outside the vocabulary of 320"),
        ([[1] * 510], 1, "514 tokens, and the model has 512 positions"),
        ([[1]], [1, 2], "2 counts for 1 prefixes"),
        ([[1]], -1, "-1 completions"),
    ):
        with pytest.raises(ConfigError, match=says):
            one.sample(prefixes, n, params)
    with pytest.raises(ConfigError, match="outside its range"):
        SamplingParams(temperature=-1)
    with torch.no_grad():
        one.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        one.sample([[1, 2]], 1, params)
    assert BOS_ID == 1
