"""Real vLLM in this process, on the CPU: what it draws, what it says of it, and the weights it draws from."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from align.compat import vllm as compat
from align.core.errors import ConfigError, SamplerError
from align.sampling import SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.parity import PlainForward, compare_greedy, parity
from align.sampling.vllm import VLLMSampler
from align.testing.tiny import EOS_ID, random_pairs, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(not compat.installed(), reason="vLLM is not installed (extra `vllm`)")
TOKENIZER = tiny_tokenizer()
SHAPE = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PREFIXES = [[1, 60, 70], [1, 80, 90, 100, 110, 120], [1, 61], [1, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89]]
PROMPTS = [TOKENIZER(row["prompt"])["input_ids"][:12] for row in random_pairs(50, seed=3)]
MIB = 1 << 20


def model(seed=0):
    return tiny_model("qwen3", seed=seed, **SHAPE)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """One engine for all tests: each starts by pushing the weights it means."""
    folder = save_tiny(tmp_path_factory.mktemp("vllm") / "model", "qwen3", **SHAPE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads that wait for each other on a busy machine take fifty times as long
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state(), torch.set_num_threads
    opened = VLLMSampler.open(
        folder,
        dtype="float32",
        max_model_len=192,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        max_lora_rank=8,
        sleep_level=2,
        end_ids=[7],
        extra={"kv_cache_memory_bytes": 64 * MIB, "max_num_seqs": 128},
    )
    opened.random_state = before
    yield opened
    opened.close()
    with pytest.raises(SamplerError, match="closed"):
        opened.sample(PREFIXES, 1, SamplingParams())
    torch.set_num_threads(threads)


def test_starting_leaves_the_random_state_of_the_trainer_alone(sampler):
    own, numpy_state, state, threads = sampler.random_state
    assert random.getstate() == own and (np.random.get_state()[1] == numpy_state).all()
    assert torch.equal(torch.get_rng_state(), state) and torch.set_num_threads is threads
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def flat(groups):
    return [rollout for group in groups for rollout in group]


def ids_of(groups):
    return [rollout.ids.tolist() for rollout in flat(groups)]


def test_log_probs_are_those_of_the_distribution_drawn_from(sampler):
    policy = model()
    sampler.sync(policy)
    own = [
        SamplingParams(max_new_tokens=12, temperature=0.7, seed=3),
        SamplingParams(max_new_tokens=20, temperature=1.3, seed=3),
        SamplingParams(max_new_tokens=9, temperature=0),
        SamplingParams(max_new_tokens=15, temperature=0.8, top_k=6, top_p=0.8, seed=1),
    ]
    groups = sampler.sample(PREFIXES, [3, 4, 1, 6], own)
    assert [len(group) for group in groups] == [3, 4, 1, 6]
    forward = PlainForward(policy)
    for prefix, params, group in zip(PREFIXES, own, groups, strict=True):
        temperature = params.temperature or 1.0
        for rollout in group:
            assert len(rollout) <= params.max_new_tokens and rollout.logp.dtype == np.float32
            if not params.top_k:
                (wanted,) = forward.logp([prefix], [rollout], temperature)
            else:
                wanted = truncated(policy, prefix, rollout, params)
            assert np.abs(wanted - rollout.logp).max() < 1e-4
    ids, lead = forward.best(PREFIXES[2:3], groups[2])[0]
    assert compare_greedy(groups[2], [(ids, lead)]).different == 0


def truncated(policy, prefix, rollout, params):
    """Log-probs after temperature, top_k, then top_p, by a loop over the vocabulary."""
    with torch.no_grad():
        logits = policy(torch.tensor([[*prefix, *rollout.ids.tolist()]])).logits[0, len(prefix) - 1 : -1].double()
    out = []
    for row, token in zip((logits / params.temperature).numpy(), rollout.ids, strict=True):
        order = np.argsort(-row, kind="stable")[: params.top_k]
        weights = np.exp(row[order] - row[order].max())
        weights /= weights.sum()
        kept = int((np.cumsum(weights) - weights < params.top_p).sum())
        assert token in order[:kept]
        out.append(np.log(weights[list(order).index(token)] / weights[:kept].sum()))
    return np.array(out)


def test_a_draw_is_a_function_of_seed_prefix_and_sample(sampler):
    sampler.sync(model())
    params = SamplingParams(max_new_tokens=10, seed=4)
    first = sampler.sample(PREFIXES, 3, params)
    again = sampler.sample(PREFIXES, 3, params)
    beside = sampler.sample([*PREFIXES, *PROMPTS], [*[3] * 4, *[2] * len(PROMPTS)], params)
    ids = ids_of(first)
    assert ids == ids_of(again) and ids == ids_of(beside[:4])
    assert len({tuple(one) for one in ids}) == len(ids)
    other = sampler.sample(PREFIXES, 3, SamplingParams(max_new_tokens=10, seed=5))
    assert ids != ids_of(other)


def test_first_tokens_have_the_softmax_s_frequencies(sampler):
    policy = model()
    sampler.sync(policy)
    draws = 2000
    groups = sampler.sample([PREFIXES[0]], draws, SamplingParams(max_new_tokens=1, temperature=0.7, seed=11))
    counts = np.bincount([int(rollout.ids[0]) for rollout in groups[0]], minlength=320)
    with torch.no_grad():
        expected = (policy(torch.tensor([PREFIXES[0]])).logits[0, -1].double() / 0.7).softmax(-1).numpy() * draws
    common = expected >= 5
    rest = np.array([counts[~common].sum() - expected[~common].sum()])
    terms = np.append((counts - expected)[common] ** 2 / expected[common], rest**2 / expected[~common].sum())
    assert terms.sum() < len(terms) + 5 * np.sqrt(2 * len(terms))


def test_end_tokens_end_and_stay_in_the_ids_but_not_in_the_text(sampler):
    policy = model()
    with torch.no_grad():
        policy.lm_head.weight[EOS_ID] = policy.lm_head.weight[101] * 1.02
        policy.lm_head.weight[7] = policy.lm_head.weight[18] * 1.02
    sampler.sync(policy)
    params = SamplingParams(max_new_tokens=60, temperature=0.9, seed=2)
    rollouts = flat(sampler.sample(PREFIXES, 20, params))
    assert sampler.end_ids == {EOS_ID, 7}
    last = [int(rollout.ids[-1]) for rollout in rollouts if rollout.finished]
    assert {EOS_ID, 7} == set(last)
    for rollout in rollouts:
        ends = [token for token in rollout.ids.tolist() if token in (EOS_ID, 7)]
        assert len(ends) == rollout.finished and (rollout.finished or len(rollout) == 60)
        body = rollout.ids[: -1 if rollout.finished else None].tolist()
        assert rollout.text == TOKENIZER.decode(body, skip_special_tokens=False)


def test_ten_steps_are_followed_by_the_greedy_output_of_hugging_face(sampler):
    policy = model(seed=2)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    rows = [TOKENIZER(row["prompt"] + row["chosen"])["input_ids"][:40] for row in random_pairs(80, seed=9)]
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=[EOS_ID, 7], pad_token_id=0)
    seen, same, ties, changed = None, 0, 0, 0
    for step in range(10):
        for row in rows[8 * step : 8 * step + 8]:
            ids = torch.tensor([row])
            (policy(input_ids=ids, labels=ids).loss / 8).backward()
        optimiser.step()
        optimiser.zero_grad()
        sampler.sync(policy)
        drawn = [group[0] for group in sampler.sample(PROMPTS, 1, SamplingParams(max_new_tokens=24, temperature=0))]
        wanted = greedy(policy, config)
        best = PlainForward(policy).best(PROMPTS, drawn)
        for rollout, ids, (_, lead) in zip(drawn, wanted, best, strict=True):
            if rollout.ids.tolist() == ids:
                same += 1
                continue
            first = next(place for place, pair in enumerate(zip(rollout.ids, ids, strict=False)) if pair[0] != pair[1])
            assert lead[first] < 1e-4, (step, first, lead[first])
            ties += 1
        now = [rollout.ids.tolist() for rollout in drawn]
        changed += now != seen
        seen = now
    assert changed == 10  # each push changed what is drawn, or the comparison would show nothing
    assert same + ties == 500 and ties <= 10


def greedy(policy, config):
    """Hugging Face's own greedy ids of each prompt, cut after the end token; prompts of one length share a batch."""
    found = {}
    for length in {len(prompt) for prompt in PROMPTS}:
        rows = [number for number, prompt in enumerate(PROMPTS) if len(prompt) == length]
        ids = torch.tensor([PROMPTS[number] for number in rows])
        out = policy.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for number, row in zip(rows, out[:, length:].tolist(), strict=True):
            ends = [place for place, token in enumerate(row) if token in config.eos_token_id]
            found[number] = row[: ends[0] + 1] if ends else row
    return [found[number] for number in range(len(PROMPTS))]


def lora(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"} | settings
    return get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)).eval()


def test_an_adapter_is_pushed_alone_and_replaced_by_the_next(sampler):
    sampler.sync(model())
    params = SamplingParams(max_new_tokens=12, seed=8)
    bare = sampler.sample(PREFIXES, 2, params)
    reloads = []
    whole = sampler._engine.reload
    sampler._engine.reload = lambda weights: reloads.append(1) or whole(weights)
    try:
        for seed in (0, 1):
            policy = lora(seed)
            before = {name: value.clone() for name, value in policy.state_dict().items()}
            sampler.sync(policy)
            report = parity(sampler, PREFIXES, params, PlainForward(policy).logp, PlainForward(policy).best, n=2)
            assert report.largest < 1e-3 and not report.loud and report.greedy.different == 0
            assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert not reloads
        assert [r.ids.tolist() for r in flat(bare)] != [
            r.ids.tolist() for r in flat(sampler.sample(PREFIXES, 2, params))
        ]
        dora = lora(2, use_dora=True)  # vLLM has no DoRA: the merged weights are pushed
        sampler.sync(dora)
        assert reloads == [1]
        assert parity(sampler, PREFIXES, params, PlainForward(dora).logp).largest < 1e-3
        sampler.sync(model())
        assert [r.ids.tolist() for r in flat(bare)] == [
            r.ids.tolist() for r in flat(sampler.sample(PREFIXES, 2, params))
        ]
    finally:
        del sampler._engine.reload
    assert sampler.capabilities == {"seeds", "adapter_push"}


def test_parity_is_quiet_after_a_push_and_loud_without_one(sampler):
    policy = model()
    sampler.sync(policy)
    params = SamplingParams(max_new_tokens=16, temperature=0.9, seed=1, top_p=0.7)
    forward = PlainForward(policy)
    report = parity(sampler, PROMPTS[:16], params, forward.logp, forward.best, n=2)
    assert report.loud == "" and report.largest < 1e-4 and 0 <= report.kl < 1e-8 and report.greedy.sequences == 16
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    stale = parity(sampler, PROMPTS[:16], params, forward.logp, forward.best, n=2)
    assert "do not agree" in stale.loud and "greedy completions differ" in stale.loud and stale.kl > 0.01


def test_keys_and_values_of_old_weights_are_forgotten(sampler):
    """The engine keeps whole blocks of 128 tokens of a prefix, those of the weights that computed them."""
    long = [[1, *range(40, 190)]]
    for seed in (0, 1):
        policy = model(seed)
        sampler.sync(policy)
        params = SamplingParams(max_new_tokens=16, seed=3)
        first = sampler.sample(long, 2, params)
        assert parity(sampler, long, params, PlainForward(policy).logp, n=2).largest < 1e-4
        assert ids_of(first) == ids_of(sampler.sample(long, 2, params))


def test_sampling_hears_progress_and_refuses_what_cannot_be_drawn(sampler):
    sampler.sync(model())
    heard = []
    sampler.sample(PREFIXES, 5, SamplingParams(max_new_tokens=6), heard.append)
    assert sum(heard) == 20 and len(heard) > 1
    assert sampler.sample(PREFIXES, 0, SamplingParams(max_new_tokens=4)) == [[], [], [], []]
    for prefixes, says in (
        ([[1], []], "prefix 1 is empty"),
        ([[1, 320]], "vocabulary of 320"),
        ([[1] * 190], "194 tok"),
    ):
        with pytest.raises(ConfigError, match=says):
            sampler.sample(prefixes, 1, SamplingParams(max_new_tokens=4))
    with pytest.raises(ConfigError, match="`logprobs_mode` cannot be set"):
        VLLMSampler.open("anything", extra={"logprobs_mode": "raw_logprobs"})


def test_a_push_that_fails_bars_sampling_until_one_succeeds(sampler):
    policy = model()
    sampler.sync(policy)
    version = sampler.version
    for wrong, says in (
        (tiny_model("qwen3", **SHAPE | {"num_hidden_layers": 1}), "weights were not given"),
        (tiny_model("qwen3", **SHAPE | {"num_hidden_layers": 3}), "do not fit"),
        (tiny_model("qwen3", **SHAPE | {"intermediate_size": 32}), "do not fit"),
    ):
        with pytest.raises(SamplerError, match=says):
            sampler.sync(wrong)
        with pytest.raises(SamplerError, match="call `sync"):
            sampler.sample(PREFIXES, 1, SamplingParams())
    assert sampler.version == version
    sampler.sync(policy)
    params = SamplingParams(max_new_tokens=16)
    assert parity(sampler, PREFIXES, params, PlainForward(policy).logp).largest < 1e-4


def test_pausing_on_a_cpu_does_nothing_and_says_so(sampler, caplog):
    sampler.sync(model())
    with caplog.at_level("WARNING"):
        sampler.pause()
        sampler.pause()
    assert sum("cannot sleep on a CPU" in record.message for record in caplog.records) == 1
    assert sampler.state == "awake"
    sampler.sample(PREFIXES, 1, SamplingParams(max_new_tokens=2))


@pytest.mark.parametrize("level", [1, 2])
def test_the_order_of_sleep_push_and_waking(sampler, monkeypatch, level):
    """On a GPU; here the engine runs for real and only its sleep is recorded in place of done."""
    calls = []
    engine, reload = sampler._engine, sampler._engine.reload
    monkeypatch.setattr(compat.Engine, "on_cpu", False)
    monkeypatch.setattr(engine, "sleep", lambda level: calls.append(f"sleep {level}"), raising=False)
    monkeypatch.setattr(engine, "wake", lambda *tags: calls.append(" ".join(("wake", *tags))), raising=False)
    monkeypatch.setattr(engine, "reload", lambda weights: calls.append("reload") or reload(weights), raising=False)
    monkeypatch.setattr(sampler, "sleep_level", level)
    policy, params = model(), SamplingParams(max_new_tokens=2)
    with sampler.awake(policy):
        sampler.sample(PREFIXES, 1, params)
    assert calls == ["reload", f"sleep {level}"]
    if level == 1:
        sampler.sample(PREFIXES, 1, params)
        assert calls[2:] == ["wake"] and sampler.state == "awake"
        sampler.pause()
    else:
        with pytest.raises(SamplerError, match="thrown away by `pause`"):
            sampler.sample(PREFIXES, 1, params)
    calls.clear()
    sampler.sync(policy)
    assert calls == ["wake weights", "reload", "wake kv_cache"] and sampler.state == "awake"
    calls.clear()
    adapted = lora()
    sampler.sync(adapted)
    sampler.pause()
    sampler.sync(adapted)
    base = ["reload"] if level == 2 else []  # the base beneath the adapter is gone
    assert calls == [f"sleep {level}", "wake weights", *base, "wake kv_cache"]
    assert parity(sampler, PREFIXES, params, PlainForward(adapted).logp).largest < 1e-3


def test_it_draws_what_hugging_face_would_find_likely(sampler):
    """The same protocol: what one sampler gives, the other's model scores alike."""
    policy = model()
    sampler.sync(policy)
    params = SamplingParams(max_new_tokens=24, temperature=0)
    ours = HFSampler(policy, TOKENIZER, end_ids=[7]).sample(PREFIXES, 1, params)
    for one, other in zip(flat(ours), flat(sampler.sample(PREFIXES, 1, params)), strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.text == other.text and one.finished == other.finished
        assert np.abs(one.logp - other.logp).max() < 1e-4
