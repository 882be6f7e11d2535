"""Requests to a server that speaks OpenAI's protocol: deadlines, retries, and errors by kind.

A plain `vllm serve` and a paid service take the same way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx

from align.core.errors import ConfigError, FeedbackError
from align.core.options import check_all, option
from align.feedback.base import Failed
from align.feedback.calling import run_async

_log = logging.getLogger(__name__)
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_REFUSED = {401: "it does not accept the key", 403: "it does not allow this", 404: "it knows no such path or model"}
_SHOWN = 200
"""Characters of a server's answer in an error."""
DOWN = 3
"""Requests in a row that failed with all their tries, after which each gets one try; three times as many, none."""

Api = Literal["chat", "completions"]


class EndpointError(FeedbackError):
    """A server that did not answer, or not with what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server is, and how patient we are with it."""

    url: str = option(doc="the base that paths are joined to, for example http://127.0.0.1:8000/v1")
    model: str = option(doc="the model's name there")
    api: Api = option("chat", doc="/chat/completions or /completions")
    key_env: str = option("", doc="environment variable that holds the key; the key is in no file and no message")
    deadline: float = option(60.0, above=0, doc="seconds of one try, from sending to the last byte")
    retries: int = option(4, at_least=0, doc="further tries of a request that may succeed later")
    backoff: float = option(0.5, at_least=0, doc="seconds before the second try; doubled each time")
    longest_wait: float = option(30.0, at_least=0, doc="most seconds between two tries, whatever the server asks for")
    concurrency: int = option(8, at_least=1, doc="requests at once")

    def __post_init__(self) -> None:
        check_all(self, "endpoint")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"`{self.url}` is no address of a server", mend="write http://HOST:PORT/v1")
        if parts.username or parts.password:
            raise ConfigError("the address of the server holds a password", mend="put it in a variable: `key_env`")
        if self.key_env and not os.environ.get(self.key_env):
            raise ConfigError(f"the environment variable `{self.key_env}` is not set", mend="set it, or drop `key_env`")

    @property
    def key(self) -> Mapping[str, Any]:
        """All that determines answers, as far as a client can know."""
        return {"url": self.url, "model": self.model, "api": self.api}

    def ask(
        self, bodies: Mapping[int, Mapping[str, Any]], heard: Callable[[int, dict[str, Any]], None]
    ) -> dict[int, Failed]:
        """Send every body; `heard(number, answer)` as answers come; why there is none, for the rest.

        Raises:
            ConfigError: the server refuses the very first answers (401, 403, 404): no row would fare better.
        """
        return run_async(_Round(self, heard).all(bodies)) if bodies else {}

    @property
    def headers(self) -> dict[str, str]:
        secret = os.environ.get(self.key_env, "") if self.key_env else ""
        return {"Authorization": f"Bearer {secret}"} if secret else {}

    def clean(self, text: str) -> str:
        """A text of the server without the key, should it echo it."""
        secret = os.environ.get(self.key_env, "") if self.key_env else ""
        return text.replace(secret, "***") if secret else text


class _Round:
    """One call of `ask`."""

    def __init__(self, endpoint: Endpoint, heard: Callable[[int, dict[str, Any]], None]) -> None:
        self.endpoint, self.heard = endpoint, heard
        self.in_a_row = 0
        self.succeeded = False
        self.failed: dict[int, Failed] = {}
        self.jitter = random.Random(0)

    async def all(self, bodies: Mapping[int, Mapping[str, Any]]) -> dict[int, Failed]:
        path = "/chat/completions" if self.endpoint.api == "chat" else "/completions"
        url = self.endpoint.url.rstrip("/") + path
        queue = iter(bodies.items())
        limits = httpx.Limits(max_connections=self.endpoint.concurrency)
        async with httpx.AsyncClient(
            headers=self.endpoint.headers, timeout=self.endpoint.deadline, limits=limits
        ) as client:

            async def work() -> None:
                for place, body in queue:
                    await self._one(client, url, place, body)

            workers = [asyncio.ensure_future(work()) for _ in range(min(self.endpoint.concurrency, len(bodies)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
        return self.failed

    async def _one(self, client: httpx.AsyncClient, url: str, place: int, body: Mapping[str, Any]) -> None:
        if self.in_a_row >= 3 * DOWN:
            self.failed[place] = Failed(f"not asked: the server failed {3 * DOWN} times in a row")
            return
        tries = 1 if self.in_a_row >= DOWN else self.endpoint.retries + 1
        problem = Failed("the server was not asked")
        for number in range(tries):
            answer, wait = await self._try(client, url, body)
            if isinstance(answer, dict):
                self.in_a_row, self.succeeded = 0, True
                self.heard(place, answer)
                return
            problem = answer
            if wait is None:
                # It answered: this request is at fault, not the server.
                self.failed[place] = problem
                return
            if number + 1 < tries:
                await asyncio.sleep(self._pause(number, wait))
        self.in_a_row += 1
        if self.in_a_row == 3 * DOWN:
            _log.warning("%s is given up: %s, %d times in a row", url, problem.reason, self.in_a_row)
        self.failed[place] = problem

    def _pause(self, number: int, asked: float) -> float:
        own = self.endpoint.backoff * 2.0**number * (1 + 0.25 * self.jitter.random())
        return min(max(own, asked), self.endpoint.longest_wait)

    async def _try(
        self, client: httpx.AsyncClient, url: str, body: Mapping[str, Any]
    ) -> tuple[dict[str, Any] | Failed, float | None]:
        """(the answer, or why not; seconds that the server asks to wait, None where trying again is no use)."""
        try:
            # httpx's own limit is one of silence: a server that drips would hold us for ever.
            answer = await asyncio.wait_for(client.post(url, json=body), self.endpoint.deadline)
        except (TimeoutError, httpx.TimeoutException):
            return Failed("the server did not answer before the deadline"), 0.0
        except httpx.HTTPError as error:
            _log.debug("%s: %s", url, error)
            return Failed(f"the server cannot be reached ({type(error).__name__})"), 0.0
        status = answer.status_code
        if status == 200:
            try:
                found = json.loads(answer.content)
            except ValueError:
                found = None
            return (found, None) if isinstance(found, dict) else (Failed("the server's answer is not JSON"), 0.0)
        told = self.endpoint.clean(answer.text.strip()[:_SHOWN])
        if status in _REFUSED and not self.succeeded:
            mend = "set `key_env`" if status == 401 else "check `url` and `model`"
            raise ConfigError(f"the server refuses: {_REFUSED[status]} ({status})", where=url, why=told, mend=mend)
        _log.warning("%s: %d %s", url, status, told)
        return Failed(f"the server answered {status}"), _wait(answer) if status in _AGAIN else None


def check_answer(answer: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Any]) -> Any:
    """`read(answer)`, or `Failed` where the answer has not the form that the protocol gives it."""
    try:
        return read(answer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return Failed("the server's answer has not the form of the protocol")


def choices(answer: Mapping[str, Any], api: Api) -> Sequence[str]:
    """The texts of an answer."""
    found = [one["message"]["content"] if api == "chat" else one["text"] for one in answer["choices"]]
    if not found or not all(isinstance(text, str) for text in found):
        raise ValueError
    return found


def _wait(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers.get("retry-after", 0)))
    except ValueError:  # it may be a date
        return 0.0
