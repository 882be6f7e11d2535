"""One running `vllm serve`: requests, and what can be wrong with their answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx

from align.core.errors import SamplerError

Drawn = tuple[list[int], list[float]]
"""Ids with the end token, and their log-probs."""


class Server:
    """One address, with the number of requests under way."""

    def __init__(self, url: str, headers: Mapping[str, str], connections: int) -> None:
        self.url = url.rstrip("/")
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self.client = httpx.Client(base_url=self.url, headers=dict(headers), limits=limits)
        self.outstanding = 0
        self.failures = 0


class Retry(Exception):
    """A failure that another try may not meet."""

    def __init__(self, error: SamplerError) -> None:
        super().__init__(str(error))
        self.error = error


def served(server: Server, model: str | None, wait: float) -> tuple[str, str, int | None]:
    """(name, folder or hub id, most tokens) of the model that a server serves."""
    ends = time.monotonic() + wait
    while True:
        try:
            answer = server.client.get("/v1/models", timeout=10.0)
            answer.raise_for_status()
            models = {one["id"]: one for one in answer.json()["data"]}
            break
        except httpx.HTTPStatusError as error:
            raise refused(server.url, "/v1/models", error.response) from error
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() >= ends:
                raise SamplerError(
                    "the server does not answer",
                    where=server.url,
                    why=str(error) or type(error).__name__,
                    mend="start it: vllm serve MODEL --logprobs-mode processed_logprobs",
                ) from error
            time.sleep(0.5)
    bases = [name for name, one in models.items() if not one.get("parent")]
    name = model if model is not None else (bases[0] if bases else "")
    if name not in models or (model is None and len(bases) != 1):
        raise SamplerError(
            f"it serves no model `{model}`" if model else "it serves several models",
            where=server.url,
            why="served: " + ", ".join(models),
            mend="name one of them",
        )
    return name, str(models[name].get("root") or name), models[name].get("max_model_len")


def post(server: Server, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
    """What a server answers, as JSON where it is JSON.

    Raises:
        Retry: it could not be reached, did not answer in time, is busy or failed. SamplerError: it refuses.
    """
    where = f"{server.url}{path}"
    try:
        answer = server.client.post(path, json=body, timeout=max(seconds, 0.1))
    except httpx.TimeoutException as error:
        late = SamplerError(f"no answer within {seconds:.0f} s", where=where, mend="raise `deadline`, or add servers")
        raise Retry(late) from error
    except httpx.HTTPError as error:
        gone = SamplerError("the server cannot be reached", where=where, why=str(error) or type(error).__name__)
        raise Retry(gone) from error
    if answer.status_code == 429 or answer.status_code >= 500:
        raise Retry(refused(server.url, path, answer))
    if answer.status_code >= 400:
        raise refused(server.url, path, answer)
    if "json" not in answer.headers.get("content-type", ""):
        return answer.text
    try:
        return answer.json()
    except ValueError as error:
        raise Retry(nonsense(where, f"not JSON: {answer.text[:200]!r}")) from error


def completions(given: Any, count: int, where: str) -> list[Drawn]:
    """The completions of an answer in the order of their numbers, each looked at."""
    try:
        choices = sorted(given["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(count)):
            raise Retry(nonsense(where, f"{len(choices)} completions, where {count} were asked for"))
        found = []
        for choice in choices:
            ids = [int(token) for token in choice["token_ids"]]
            logp = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            if choice["finish_reason"] not in ("stop", "length") or not ids or len(ids) != len(logp):
                why = f"{len(ids)} ids, {len(logp)} log-probs, ended with {choice['finish_reason']!r}"
                raise Retry(nonsense(where, why))
            found.append((ids, logp))
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise Retry(nonsense(where, f"{type(error).__name__}: {error}")) from error


def refused(url: str, path: str, answer: httpx.Response) -> SamplerError:
    text = " ".join(answer.text.split())[:500]
    return SamplerError("the server refuses", where=f"{url}{path}", why=f"{answer.status_code} {text}")


def nonsense(where: str, why: str) -> SamplerError:
    return SamplerError(
        "the server's answer is not one of vLLM's", where=where, why=why, mend="this sampler needs vLLM 0.31 or newer"
    )
