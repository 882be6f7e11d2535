"""Kills `align sample` and `align judge` at random moments, gives the command again, and compares what they end with.

Run as a script: it imports torch once and forks, so a run costs its work and no start-up.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

torch.set_num_threads(1)

import align.recipe.stages  # noqa: E402
from align.cli.main import main as align  # noqa: E402
from align.data.artefacts import Artefact  # noqa: E402
from align.testing.tiny import random_pairs, save_tiny  # noqa: E402

CHUNK, N = 2, 2
FOLDERS = {"sample": "samples", "judge": "judged"}


class Judge(BaseHTTPRequestHandler):
    """A judge that takes a moment, gives points by the text it is shown, and writes down that it was asked."""

    asked: Path

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with open(self.asked, "a") as file:
            file.write(f"{zlib.crc32(text.encode())}\n")
        time.sleep(0.01)
        reply = {"role": "assistant", "content": f"So it is. Score: {zlib.crc32(text.encode()) % 6}"}
        answer = json.dumps({"choices": [{"index": 0, "message": reply, "finish_reason": "stop"}]}).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever asked was killed
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


def serve(asked: Path) -> tuple[int, int]:
    """(pid, port) of a judge in a process of its own."""
    Judge.asked = asked
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    pid = os.fork()
    if pid == 0:
        server.serve_forever()
    port = server.server_address[1]
    server.server_close()
    return pid, port


def child(words: list[str], log: Path) -> int:
    """Runs the command in a fork, which writes down each chunk that it has finished."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        write = Artefact.write

        def noted(self: Artefact, chunk: int, rows: list, account: dict | None = None) -> None:
            write(self, chunk, rows, account)
            with open(log, "a") as file:
                file.write(f"{chunk}\n")

        Artefact.write = noted  # type: ignore[method-assign]
        code = 1
        try:
            code = align(words)
        finally:
            os._exit(code)
    return pid


def killed(pid: int, log: Path, chunks: int, delay: float) -> bool:
    """Kill the child a moment after it has finished so many chunks; whether it was killed before it ended."""
    seen = len(log.read_text().splitlines())
    while len(log.read_text().splitlines()) < seen + chunks:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def chunks_for(kills: int) -> int:
    """So many that the work outlasts the kills: two chunks and a moment go by between two of them."""
    return 4 * kills + 4


def stage(home: Path, command: str, kills: int, rng: random.Random) -> dict:
    """Kill and resume one command; what it came to."""
    recipe, folder = home / "recipe.yaml", FOLDERS[command]
    log = home / f"{command}.log"
    log.touch()

    def words(run: str) -> list[str]:
        return [command, str(recipe), f"output_dir={home / run}"]

    start = time.monotonic()
    assert ended(child(words("whole"), home / f"{command}-whole.log")) == 0
    duration = time.monotonic() - start
    asked_whole = _asked(home)
    out, whole = home / "out" / folder, home / "whole" / folder
    count, kept = 0, []
    for number in range(kills):
        before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.glob("part-*.parquet")}
        # The first kill falls into the start, before there is anything.
        chunks = 0 if number == 0 else rng.randint(0, 2)
        delay = rng.uniform(0, duration / chunks_for(kills)) * (4 if number == 0 else 1)
        count += killed(child(words("out"), log), log, chunks, delay)
        kept.append(
            not (out / "manifest.json").exists()
            and all((file.stat().st_mtime_ns, file.read_bytes()) == was for file, was in before.items())
        )
    code = ended(child(words("out"), log))
    done = [int(line) for line in log.read_text().splitlines()]
    rows = list(Artefact.open(out, "").rows())
    return {
        "kills": count,
        "code": code,
        "kept": kept,
        "chunks": sorted(done),
        "files": sorted(file.name for file in out.iterdir()),
        "same": all(file.read_bytes() == (out / file.name).read_bytes() for file in whole.iterdir()),
        "rows": [row["row"] for row in rows],
        "answers": sum(len(row["answers"]) for row in rows),
        "asked": asked_whole,
        "asked_again": _asked(home) - 2 * asked_whole,
        "errors": log.with_suffix(".err").read_text()[-3000:],
    }


def _asked(home: Path) -> int:
    """Judgements that were asked for so far."""
    file = home / "asked.txt"
    return len(file.read_text().splitlines()) if file.exists() else 0


def main(home: Path, kills: int) -> None:
    rng = random.Random(0)
    save_tiny(home / "model")
    rows = random_pairs(CHUNK * chunks_for(kills), seed=1)
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge, port = serve(home / "asked.txt")
    (home / "recipe.yaml").write_text(
        f"model: {{name: {home / 'model'}}}\ndata: {{prompts: [{home / 'prompts.jsonl'}]}}\n"
        f"sampler: {{batch_size: 4}}\nsample: {{n: {N}, max_new_tokens: 32, chunk: {CHUNK}, seed: 3}}\n"
        f"feedback: [{{kind: judge, name: far, file: points, samples: 1, url: 'http://127.0.0.1:{port}/v1', model: x, "
        "concurrency: 1}]\noutput_dir: none\n"
    )
    try:
        report = {command: stage(home, command, kills, rng) for command in FOLDERS}
    finally:
        os.kill(judge, signal.SIGTERM)
        os.waitpid(judge, 0)
    (home / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
