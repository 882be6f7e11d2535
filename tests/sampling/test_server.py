"""A real `vllm serve`: the same draws as in process, weights pushed into it, and servers that fail."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from align.compat.vllm import installed
from align.core.errors import ConfigError, SamplerError
from align.sampling import SamplingParams
from align.sampling.parity import PlainForward, parity
from align.sampling.server import ServerSampler, ServerSettings
from align.sampling.vllm import VLLMSampler
from align.testing.tiny import EOS_ID, save_tiny, tiny_model, tiny_tokenizer
from tests.sampling.serving import served

pytestmark = pytest.mark.skipif(not installed(), reason="vLLM is not installed (extra `vllm`)")
TOKENIZER = tiny_tokenizer()
SHAPE = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PREFIXES = [[1, 60, 70], [1, 80, 90, 100, 110, 120], [1, 61], [1, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89]]
QUICK = {"deadline": 20.0, "tries": 3}


def model(seed=0):
    return tiny_model("qwen3", seed=seed, **SHAPE)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("served") / "model", "qwen3", **SHAPE)
    arguments = ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--max-model-len", "192"]
    arguments += ["--enable-lora", "--max-lora-rank", "8"]
    with served(folder, *arguments, VLLM_SERVER_DEV_MODE="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as url:
        yield url


@pytest.fixture
def opened(address, tmp_path):
    """Samplers of the server, closed after the test."""
    made = []

    def open_sampler(urls=address, end_ids=(), **settings):
        for name in ("push",):
            if settings.get(name, "none") != "none":
                settings.setdefault("folder", tmp_path)
        made.append(ServerSampler.open(urls, TOKENIZER, ServerSettings(**QUICK | settings), end_ids=end_ids))
        return made[-1]

    yield open_sampler
    for sampler in made:
        sampler.close()


def flat(groups):
    return [rollout for group in groups for rollout in group]


def ids_of(groups):
    return [rollout.ids.tolist() for rollout in flat(groups)]


class Proxy:
    """Stands before a real server and does what `fault` says with requests for completions."""

    def __init__(self, behind):
        self.behind, self.fault, self.passed, self.failed = behind, None, 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments): ...

            def do_GET(self):
                self.give(httpx.get(outer.behind + self.path, timeout=20))

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                fault = outer.fault if self.path == "/v1/completions" else None
                if fault is None:
                    outer.passed += 1
                    self.give(httpx.post(outer.behind + self.path, content=body, timeout=20, headers=JSON))
                    return
                outer.failed += 1
                if fault == "hang":
                    outer.released.wait(30)
                elif fault == "error":
                    self.send_error(503, "overloaded")
                elif fault == "drop":
                    self.connection.close()
                elif fault == "raw":  # the log-probs that vLLM gives without --logprobs-mode processed_logprobs
                    body = json.dumps(json.loads(body) | {"temperature": 1.0}).encode()
                    self.give(httpx.post(outer.behind + self.path, content=body, timeout=20, headers=JSON))
                else:
                    answer = httpx.post(outer.behind + self.path, content=body, timeout=20, headers=JSON).json()
                    for choice in answer["choices"]:
                        choice |= NONSENSE[fault]
                    self.give_text(200, json.dumps(answer).encode())

            def give(self, answer):
                self.give_text(answer.status_code, answer.content)

            def give_text(self, status, content):
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


JSON = {"content-type": "application/json"}
NONSENSE = {
    "short": {"token_ids": [5]},
    "none": {"token_ids": None},
    "aborted": {"finish_reason": "abort"},
}


@contextmanager
def proxied(behind):
    proxy = Proxy(behind)
    thread = threading.Thread(target=proxy.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.released.set()
        proxy.server.shutdown()
        proxy.server.server_close()


def test_log_probs_lengths_and_ends_are_those_of_the_request(opened):
    policy, forward = model(), PlainForward(model())
    sampler = opened(end_ids=[7])
    assert sampler.end_ids == {EOS_ID, 7} and sampler.positions == 192 and sampler.capabilities == {"seeds"}
    own = [
        SamplingParams(max_new_tokens=12, temperature=0.7, seed=3),
        SamplingParams(max_new_tokens=40, temperature=1.5, seed=3),
        SamplingParams(max_new_tokens=9, temperature=0),
        SamplingParams(max_new_tokens=5, seed=1),
    ]
    heard = []
    groups = sampler.sample(PREFIXES, [3, 40, 1, 0], own, heard.append)
    assert [len(group) for group in groups] == [3, 40, 1, 0] and sum(heard) == 44
    for prefix, params, group in zip(PREFIXES, own, groups, strict=True):
        for rollout in group:
            (wanted,) = forward.logp([prefix], [rollout], params.temperature or 1.0)
            assert np.abs(wanted - rollout.logp).max() < 1e-4
            assert rollout.finished == (rollout.ids[-1] in (EOS_ID, 7))
            assert rollout.finished or len(rollout) == params.max_new_tokens
            body = rollout.ids[: -1 if rollout.finished else None].tolist()
            assert rollout.text == TOKENIZER.decode(body, skip_special_tokens=False)
    assert len({tuple(ids) for ids in ids_of(groups[1:2])}) == 40  # each completion has a seed of its own
    assert any(rollout.finished for rollout in groups[1]) and policy is not None


def test_the_same_call_draws_the_same_wherever_it_lands(opened, address):
    params = SamplingParams(max_new_tokens=10, seed=4)
    one = opened()
    wanted = one.sample(PREFIXES, 40, params)
    assert ids_of(wanted) == ids_of(one.sample(PREFIXES, 40, params))
    with proxied(address) as first, proxied(address) as second:
        several = opened([first.url, second.url], concurrency=2)
        passed = first.passed, second.passed
        assert ids_of(wanted) == ids_of(several.sample(PREFIXES, 40, params))
        assert first.passed - passed[0] >= 2 and second.passed - passed[1] >= 2


def test_an_engine_in_process_draws_what_a_server_draws(opened, address):
    name = httpx.get(f"{address}/v1/models").json()["data"][0]["root"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    extra = {"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 64}
    settings = {"dtype": "float32", "max_model_len": 192, "enforce_eager": True, "gpu_memory_utilization": 0.1}
    inside = VLLMSampler.open(name, TOKENIZER, extra=extra, **settings)
    params = [SamplingParams(max_new_tokens=10, seed=4), *[SamplingParams(max_new_tokens=10, temperature=0.6)] * 3]
    try:
        assert ids_of(inside.sample(PREFIXES, [40, 2, 2, 2], params)) == ids_of(
            opened().sample(PREFIXES, [40, 2, 2, 2], params)
        )
    finally:
        inside.close()
        torch.set_num_threads(threads)


def test_log_probs_of_another_distribution_are_refused(address):
    with proxied(address) as bad:
        bad.fault = "raw"
        with pytest.raises(SamplerError, match="start it with --logprobs-mode processed_logprobs"):
            ServerSampler.open(bad.url, TOKENIZER)


def test_an_adapter_is_pushed_and_the_last_one_is_what_is_sampled(opened, address):
    sampler = opened(push="adapter", max_lora_rank=8)
    params = SamplingParams(max_new_tokens=12, seed=8)
    bare = sampler.sample(PREFIXES, 2, params)
    for seed in (0, 1):
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
        policy = get_peft_model(model(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        sampler.sync(policy)
        report = parity(sampler, PREFIXES, params, PlainForward(policy).logp, PlainForward(policy).best, n=2)
        assert report.largest < 1e-3 and not report.loud and report.greedy.different == 0
    assert ids_of(bare) != ids_of(sampler.sample(PREFIXES, 2, params))
    names = [one["id"] for one in httpx.get(f"{address}/v1/models").json()["data"]]
    assert len([name for name in names if name.startswith("policy-")]) == 1
    with pytest.raises(SamplerError, match="pushed as an adapter: it has no adapter"):
        sampler.sync(model())
    with pytest.raises(SamplerError, match="push failed"):
        sampler.sample(PREFIXES, 1, params)
    sampler.close()
    assert len(httpx.get(f"{address}/v1/models").json()["data"]) == 1
    with pytest.raises(SamplerError, match="closed"):
        sampler.sample(PREFIXES, 1, params)


def test_whole_weights_are_pushed_through_a_folder(opened, tmp_path):
    sampler = opened(push="folder", dtype=torch.float32)
    params = SamplingParams(max_new_tokens=16, seed=8)
    for seed in (3, 0):
        policy = model(seed)
        sampler.sync(policy)
        report = parity(sampler, PREFIXES, params, PlainForward(policy).logp, PlainForward(policy).best, n=2)
        assert report.largest < 1e-4 and report.greedy.different == 0
    assert sampler.version == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["error", "drop", "short", "none", "aborted"])
def test_a_server_that_fails_costs_nothing_beside_one_that_works(opened, address, fault, caplog):
    params = SamplingParams(max_new_tokens=6, seed=4)
    wanted = ids_of(opened().sample(PREFIXES, 2, params))
    with proxied(address) as bad:
        sampler = opened([bad.url, address])
        bad.fault = fault
        with caplog.at_level("WARNING"):
            assert ids_of(sampler.sample(PREFIXES, 2, params)) == wanted
        assert bad.failed > 0 and sum("asked again" in record.message for record in caplog.records) == bad.failed


def test_a_server_that_hangs_is_given_up_at_the_deadline(opened, address):
    params = SamplingParams(max_new_tokens=6, seed=4)
    with proxied(address) as bad:
        sampler = opened([bad.url, address], deadline=3.0)
        bad.fault = "hang"
        started = time.monotonic()
        assert len(ids_of(sampler.sample(PREFIXES, 2, params))) == 8
        assert 2.5 < time.monotonic() - started < 15 and bad.failed > 0


@pytest.mark.parametrize("fault", ["error", "hang", "short"])
def test_where_all_tries_fail_the_error_names_the_server_and_its_answer(opened, address, fault):
    says = {"error": "503", "hang": "no answer within 1 s", "short": "1 ids, 6 log-probs"}[fault]
    with proxied(address) as bad:
        sampler = opened(bad.url, deadline=1.0, tries=2)
        bad.fault = fault
        with pytest.raises(SamplerError, match=says) as caught:
            sampler.sample(PREFIXES[:1], 1, SamplingParams(max_new_tokens=6))
        assert bad.url in str(caught.value) and bad.failed == 2


def test_what_cannot_be_served_is_refused(opened, address, tmp_path):
    with pytest.raises(SamplerError, match="does not answer"):
        ServerSampler.open("http://127.0.0.1:9", TOKENIZER)
    with pytest.raises(SamplerError, match="serves no model `other`"):
        ServerSampler.open(address, TOKENIZER, model="other")
    with pytest.raises(ConfigError, match="needs a `folder`"):
        ServerSettings(push="folder")
    sampler = opened()
    with pytest.raises(ConfigError, match="pushes no weights"):
        sampler.sync(model())
    with pytest.raises(SamplerError, match="out of vocabulary"):
        sampler.sample([[1, 900]], 1, SamplingParams(max_new_tokens=4))
    with pytest.raises(ConfigError, match="least that vLLM takes"):
        sampler.sample(PREFIXES, 1, SamplingParams(max_new_tokens=4, temperature=0.001))
    with pytest.raises(ConfigError, match="194 tokens"):
        sampler.sample([[1] * 190], 1, SamplingParams(max_new_tokens=4))
