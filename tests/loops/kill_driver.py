"""Kills `align sample` and `align judge` at random moments, gives the command again, and compares what they end with.

Run as a script: it imports torch once and forks, so a run costs its work and no start-up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

torch.set_num_threads(1)

import align.recipe.stages  # noqa: E402
from align.cli.main import main as align  # noqa: E402
from align.data.artefacts import Artefact  # noqa: E402
from align.testing.tiny import random_pairs, save_tiny  # noqa: E402

PROMPTS, CHUNK, N = 24, 2, 2
FOLDERS = {"sample": "samples", "judge": "judged"}
_JUDGE = """
import time

def slow(prompts, completions, asked, **columns):
    time.sleep(0.01)
    with open(asked[0], "a") as file:
        file.write(repr((prompts[0], completions[0])) + "\\n")
    return [float(len(completions[0]))]
"""


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


def stage(home: Path, command: str, kills: int, rng: random.Random) -> dict:
    """Kill and resume one command; what it came to."""
    recipe, folder = home / "recipe.yaml", FOLDERS[command]
    log = home / f"{command}.log"
    log.touch()

    def words(run: str) -> list[str]:
        return [command, str(recipe), f"output_dir={home / run}", f"feedback.0.cache={home / run / 'kept'}"]

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
        delay = rng.uniform(0, duration / (PROMPTS // CHUNK)) * (4 if number == 0 else 1)
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
    """Judgements that were made so far."""
    file = home / "asked.txt"
    return sum(Counter(file.read_text().splitlines()).values()) if file.exists() else 0


def main(home: Path, kills: int) -> None:
    rng = random.Random(0)
    save_tiny(home / "model")
    (home / "kill_judge.py").write_text(_JUDGE)
    sys.path.insert(0, str(home))
    rows = [row | {"asked": str(home / "asked.txt")} for row in random_pairs(PROMPTS, seed=1)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "recipe.yaml").write_text(
        f"model: {{name: {home / 'model'}}}\ndata: {{prompts: [{home / 'prompts.jsonl'}]}}\n"
        f"sampler: {{batch_size: 4}}\nsample: {{n: {N}, max_new_tokens: 32, chunk: {CHUNK}, seed: 3}}\n"
        "feedback: [{name: kill_judge:slow, batch: 1}]\noutput_dir: none\n"
    )
    report = {command: stage(home, command, kills, rng) for command in FOLDERS}
    (home / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
