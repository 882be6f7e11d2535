"""A real `vllm serve` for tests: started on a free port, waited for, and always ended."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

MIB = 1 << 20


@contextmanager
def served(model: Path, *arguments: str, start: float = 150.0, **environment: str) -> Iterator[str]:
    """The address of a server of a model folder; `arguments` are of `vllm serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).resolve()), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
    command += ["--kv-cache-memory-bytes", str(64 * MIB), "--max-num-seqs", "64", *arguments]
    settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}", start, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(process)


def _wait(process: subprocess.Popen, url: str, seconds: float, log) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    log.seek(0)
    raise RuntimeError(f"vllm serve did not start within {seconds:.0f} s:\n{log.read()[-4000:]}")


def _end(process: subprocess.Popen) -> None:
    """The server and its engine: they are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    process.wait(10)


def main() -> None:
    """`vllm serve`, whose command asks for the version of a distribution `vllm`, which for CPUs is `vllm-cpu`."""
    version = importlib.metadata.version

    def of(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{version('vllm-cpu')}+cpu"

    importlib.metadata.version = of
    from vllm.entrypoints.cli.main import main as command

    sys.exit(command())


if __name__ == "__main__":
    main()
