"""Kills `align generate` at random moments, gives the command again, and compares what it ends with, byte for byte.

Run as a script: it imports torch once and forks, so a run costs its sampling and no start-up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

import align.sampling.job  # noqa: E402
from align.cli.main import main as align  # noqa: E402
from align.core.chunks import Chunks  # noqa: E402
from align.testing.tiny import random_pairs, save_tiny  # noqa: E402

PROMPTS, CHUNK = 40, 2


def child(words: list[str], log: Path) -> int:
    """Runs the command in a fork, which writes the number of each chunk it has sampled, before it is on disk."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        write = Chunks.write

        def noted(self: Chunks, chunk: int, rows: list) -> None:
            write(self, chunk, rows)
            with open(log, "a") as file:
                file.write(f"{chunk}\n")

        Chunks.write = noted  # type: ignore[method-assign]
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


def main(folder: Path, kills: int) -> None:
    rng = random.Random(0)
    model = save_tiny(folder / "model")
    source = folder / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in random_pairs(PROMPTS, seed=1)))

    def words(out: Path) -> list[str]:
        line = f"generate {model} --prompts {source} --output {out} --n 4 --max-new-tokens 40 --seed 3"
        return [*line.split(), "--chunk-size", str(CHUNK), "--batch-size", "8"]

    start = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child(words(folder / "whole.jsonl"), folder / "whole.log"), 0)[1]) == 0
    duration = time.monotonic() - start
    out, log = folder / "out.jsonl", folder / "out.log"
    work = folder / f".{out.name}.chunks"
    log.touch()
    count, kept = 0, []
    for _ in range(kills):
        before = {file: file.stat().st_mtime_ns for file in work.glob("0*.jsonl")}
        delay = rng.uniform(0, duration / (PROMPTS // CHUNK))
        count += killed(child(words(out), log), log, rng.randint(0, 2), delay)
        kept.append(not out.exists() and all(file.stat().st_mtime_ns == when for file, when in before.items()))
    code = os.waitstatus_to_exitcode(os.waitpid(child(words(out), log), 0)[1])
    done = [int(line) for line in log.read_text().splitlines()]
    report = {
        "kills": count,
        "code": code,
        "same": out.read_bytes() == (folder / "whole.jsonl").read_bytes(),
        "rows": len(out.read_text().splitlines()),
        "chunks": sorted(done),
        "kept": kept,
        "left": sorted(path.name for path in work.iterdir()),
        "errors": log.with_suffix(".err").read_text(),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
