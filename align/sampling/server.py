"""Sampling from one or several running `vllm serve`, over HTTP."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from align.core.errors import ConfigError, SamplerError
from align.core.options import check_all, option
from align.core.progress import Progress, silent
from align.sampling.base import Request, Rollout, SamplingParams
from align.sampling.completions import Decoder, Draw, as_ids, draws, end_ids_of
from align.sampling.http import Drawn, Retry, Server, completions, nonsense, post, served
from align.sampling.weights import adapter_obstacle, save_adapter, save_weights

_log = logging.getLogger(__name__)
Push = Literal["none", "adapter", "folder"]
_MOST = 32
"""Completions of one request: enough to share the prefix, few enough to spread over servers."""
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0


@dataclass(frozen=True, slots=True)
class Answered:
    """What a server drew for one request: (ids with the end token, log-probs) of each completion."""

    draws: list[Draw]
    completions: list[Drawn]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How servers are asked.

    Attributes:
        deadline: seconds for one answer. A server that hangs costs so many, and the request goes elsewhere.
        tries: times that a request is sent at most.
        concurrency: requests under way at one server.
        push: how `sync` brings weights: `adapter` (the server needs `--enable-lora` and
            VLLM_ALLOW_RUNTIME_LORA_UPDATING=True), `folder` (VLLM_SERVER_DEV_MODE=1), both through `folder`, which the
            servers must see under the same path; `none`: the server's weights are used.
        max_lora_rank: the server's `--max-lora-rank`.
        dtype: of weights written into `folder`.
    """

    deadline: float = option(600.0, above=0, doc="seconds for one answer")
    tries: int = option(4, at_least=1, doc="times that a request is sent at most")
    concurrency: int = option(64, at_least=1, doc="requests under way at one server")
    push: Push = "none"
    max_lora_rank: int = option(16, at_least=1, doc="the server's --max-lora-rank")
    folder: Path | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_all(self, "server")
        if self.push != "none" and self.folder is None:
            raise ConfigError("`push` needs a `folder`", mend="name one that the servers can read")


class ServerSampler:
    """Draws completions from servers that serve the same model.

    Requests go to the server with the fewest under way. One that fails (no connection, no answer in time, 429, 5xx, an
    answer that cannot be right) is asked anew, elsewhere where there is an elsewhere, until its tries are used up; then
    the whole call fails. A draw is a function of (seed, number of the prefix, number of the completion), so where a
    request lands does not matter; rounding does, as in `VLLMSampler`, whose draws these are.

    Use `open`.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        model: str,
        tokenizer: Any,
        end_ids: frozenset[int],
        positions: int | None,
        settings: ServerSettings,
    ) -> None:
        self.model, self.tokenizer, self.end_ids, self.positions = model, tokenizer, end_ids, positions
        self.settings = settings
        self.version = 0
        """Number of pushes so far."""
        self.capabilities = frozenset({"seeds"} | ({"adapter_push"} if settings.push == "adapter" else set()))
        self._servers = list(servers)
        self._served = model
        self._lock = threading.Lock()
        self._state: Literal["ready", "mixed", "closed"] = "ready"

    @classmethod
    def open(
        cls,
        urls: str | Sequence[str],
        tokenizer: Any,
        settings: ServerSettings | None = None,
        *,
        model: str | None = None,
        end_ids: Collection[int] = (),
        wait: float = 0.0,
        api_key: str | None = None,
    ) -> ServerSampler:
        """Connect, and see that every server serves the model and gives the log-probs that are wanted.

        Start a server by `vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm`.

        Args:
            urls: `http://host:port`, one or several.
            model: name under which it is served; None: the only one.
            end_ids: end tokens besides those of the tokenizer and, where the server names a folder that can be read
                from here, of the model.
            wait: seconds in which servers may still be starting.
            api_key: sent as a bearer token; None: `VLLM_API_KEY` of the environment, where it is set.

        Raises:
            SamplerError: a server that does not answer, serves something else or has other log-probs.
        """
        settings = settings or ServerSettings()
        names = [urls] if isinstance(urls, str) else list(urls)
        if not names:
            raise ConfigError("no server is named", mend="give at least one address, such as http://localhost:8000")
        key = api_key or os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        servers = [Server(url, headers, settings.concurrency + 2) for url in names]
        try:
            found = [served(server, model, wait) for server in servers]
            if len({name for name, _, _ in found}) > 1:
                raise SamplerError(
                    "the servers serve different models", why=", ".join(name for name, _, _ in found), mend="name one"
                )
            (name, root, _), *_ = found
            lengths = [length for _, _, length in found if length]
            ends = _end_ids(root, tokenizer)
            positions = min(lengths) if lengths else None
            made = cls(servers, name, tokenizer, ends | frozenset(end_ids), positions, settings)
            for server in servers:
                made._check_log_probs(server)
        except BaseException:
            for server in servers:
                server.client.close()
            raise
        return made

    def sample(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress = silent,
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`.

        Raises:
            ConfigError: an empty or too long prefix.
            SamplerError: a server refuses a request, or all tries of one have failed. It names the server and says
                what it answered.
        """
        if self._state != "ready":
            raise _not_ready(self._state)
        request = Request.of(prefixes, n, params, vocabulary=None, positions=self.positions)
        out: list[list[Rollout | None]] = [[None] * count for count in request.counts]
        decoder = Decoder(self.tokenizer, prefixes, self.end_ids)
        workers = min(self.settings.concurrency * len(self._servers), max(1, sum(request.counts)))
        stop = threading.Event()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="align-server")
        try:
            waiting = [pool.submit(self._ask, group, stop) for group in _requests(draws(request))]
            for done in as_completed(waiting):
                answered = done.result()
                rows = [(one.place[0], *drawn) for one, drawn in zip(answered.draws, answered.completions, strict=True)]
                for one, rollout in zip(answered.draws, decoder.rollouts(rows), strict=True):
                    number, sample = one.place
                    out[number][sample] = rollout
                progress(len(answered.draws))
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for a server that hangs
        return out  # type: ignore[return-value]

    def sync(self, policy: nn.Module) -> None:
        """Sample from these weights from now on; only one rank of a run may call it.

        Raises:
            SamplerError: the servers take no weights as `push` says, or one of them fails; no completion is then drawn
                until a push succeeds.
            ConfigError: `push` is `none`. ModelError: weights that cannot be pushed.
        """
        if self._state == "closed":
            raise _not_ready("closed")
        if self.settings.push == "none" or self.settings.folder is None:
            raise ConfigError(
                "this sampler pushes no weights into its servers", mend="set `push` to `adapter` or `folder`"
            )
        self._state = "mixed"
        version = self.version + 1
        # A server remembers adapters by name: that of another run must not be taken for ours.
        name = f"policy-{os.getpid()}-{id(self):x}-{version}"
        target = self.settings.folder.resolve() / name
        if self.settings.push == "adapter":
            obstacle = adapter_obstacle(policy, self.settings.max_lora_rank)
            if obstacle:
                raise SamplerError(
                    f"the policy cannot be pushed as an adapter: {obstacle}", mend="set `push` to `folder`"
                )
            save_adapter(policy, target)
            old, self._served = self._served, self._load_adapter(name, target)
            if old != self.model:
                self._unload_adapter(old)
        else:
            save_weights(policy, target, self.settings.dtype)
            self._reload(target)
        shutil.rmtree(target)
        self.version, self._state = version, "ready"

    def close(self) -> None:
        """Take our adapter back and close the connections; a second call does nothing."""
        if self._state == "closed":
            return
        if self._served != self.model:
            try:
                self._unload_adapter(self._served)
            except SamplerError as error:  # the server may have ended before us
                _log.info("an adapter was left behind: %s", error)
        self._state = "closed"
        for server in self._servers:
            server.client.close()

    def _ask(self, group: list[Draw], stop: threading.Event) -> Answered:
        """One request, sent until it is answered."""
        first = group[0]
        body = {
            "model": self._served,
            "prompt": [int(token) for token in first.prefix],
            "n": len(group),
            "max_tokens": first.params.max_new_tokens,
            "temperature": first.params.temperature,
            "top_p": first.params.top_p,
            "top_k": first.params.top_k,
            "seed": first.seed if first.params.temperature > 0 else None,
            "logprobs": 0,
            "stop_token_ids": sorted(self.end_ids),
            "ignore_eos": True,
            "return_token_ids": True,
            # The server's own defaults are left out.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        tried: set[str] = set()
        wait = _FIRST_WAIT
        for attempt in itertools.count(1):
            server = self._take(tried)
            error: SamplerError
            try:
                given = post(server, "/v1/completions", body, self.settings.deadline)
                drawn = completions(given, len(group), server.url)
                self._give_back(server, failed=False)
                return Answered(group, drawn)
            except Retry as retry:
                error = retry.error
                self._give_back(server, failed=True)
                tried.add(server.url)
            except BaseException:
                self._give_back(server, failed=True)
                raise
            if attempt >= self.settings.tries or stop.is_set():
                raise error
            _log.warning("asked again (%d of %d): %s", attempt + 1, self.settings.tries, str(error).replace("\n", ";"))
            if stop.wait(wait):
                raise error
            wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("unreachable")

    def _take(self, tried: set[str]) -> Server:
        """The server with the fewest requests under way, of those not tried yet where there are any."""
        with self._lock:
            fresh = [server for server in self._servers if server.url not in tried] or self._servers
            chosen = min(fresh, key=lambda server: (server.failures > 0, server.outstanding))
            chosen.outstanding += 1
            return chosen

    def _give_back(self, server: Server, failed: bool) -> None:
        with self._lock:
            server.outstanding -= 1
            server.failures = server.failures + 1 if failed else 0

    def _check_log_probs(self, server: Server) -> None:
        """Refuse a server whose log-probs are not those of the distribution it draws from."""
        for token in range(1, 9):
            plain, halved = (self._gap(server, token, temperature) for temperature in (1.0, 0.5))
            if plain > 0.01:
                if abs(halved - 2 * plain) > 0.1 * plain:
                    raise SamplerError(
                        "the server's log-probs are not those of the distribution it draws from",
                        where=server.url,
                        why="they do not change with the temperature",
                        mend="start it with --logprobs-mode processed_logprobs",
                    )
                return
        _log.warning("%s: its log-probs could not be checked, all tokens are equally likely", server.url)

    def _gap(self, server: Server, token: int, temperature: float) -> float:
        """Difference of the log-probs of the two likeliest tokens."""
        body = {
            "model": self.model,
            "prompt": [token],
            "max_tokens": 1,
            "temperature": temperature,
            "seed": 0,
            "logprobs": 2,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
            "top_k": 0,
            "top_p": 1.0,
        }
        try:
            given = post(server, "/v1/completions", body, self.settings.deadline)
            likeliest = sorted(given["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
            return float(likeliest[0] - likeliest[1])
        except Retry as retry:
            raise retry.error from retry
        except (KeyError, IndexError, TypeError) as error:
            raise nonsense(server.url, f"no log-probs: {error!r}") from error

    def _load_adapter(self, name: str, folder: Path) -> str:
        self._all("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, _NO_ADAPTERS)
        return name

    def _unload_adapter(self, name: str) -> None:
        self._all("/v1/unload_lora_adapter", {"lora_name": name}, _NO_ADAPTERS)

    def _reload(self, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._all("/collective_rpc", body, _NO_RELOAD)
        self._all("/reset_prefix_cache", None, _NO_RELOAD)

    def _all(self, path: str, body: Mapping[str, Any] | None, mend: str) -> None:
        """The same request to every server."""
        for server in self._servers:
            try:
                post(server, path, body, self.settings.deadline)
            except Retry as retry:
                raise retry.error from retry
            except SamplerError as error:
                missing = "404" in error.why
                raise SamplerError(
                    error.what, where=error.where, why=error.why, mend=mend if missing else ""
                ) from error


_NO_ADAPTERS = "start the server with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
_NO_RELOAD = "start the server with VLLM_SERVER_DEV_MODE=1"


def _end_ids(root: str, tokenizer: Any) -> frozenset[int]:
    if Path(root).is_dir():
        return end_ids_of(root, tokenizer)
    _log.info("%s cannot be read from here: the end tokens are those of the tokenizer and of `end_ids`", root)
    return as_ids(tokenizer.eos_token_id)


def _requests(all_draws: Iterator[Draw]) -> Iterator[list[Draw]]:
    """Draws of one prefix that go together; their seeds follow one another."""
    for _, own in itertools.groupby(all_draws, key=lambda draw: draw.place[0]):
        rows = list(own)
        for start in range(0, len(rows), _MOST):
            yield rows[start : start + _MOST]


def _not_ready(state: str) -> SamplerError:
    if state == "closed":
        return SamplerError("the sampler is closed", mend="open another")
    return SamplerError("a push failed, and servers may hold different weights", mend="call `sync(policy)` first")
