"""Seconds of `align check` on 60,000 pairs and a small model, and of `align --help` and `align methods`.

Every measurement is a process of its own, import included. The pairs are made-up words whose lengths are those of
UltraFeedback (prompts of about 150 tokens, answers of about 300), with a byte-level BPE trained on some of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.data import Row
from bench.machine import provenance
from bench.models import build

RESULTS = Path(__file__).resolve().parent / "results"
LIMITS = {"check": 25.0, "help": 0.7, "methods": 0.7}
_SYLLABLES = 60
_LEXICON = 8_000
_TRAINED_ON = 3_000


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-check-") as folder:
        work = Path(folder)
        model = prepare(work, options.rows)
        commands = {"check": ["check", "recipe.yaml"], "help": ["--help"], "methods": ["methods"]}
        measured = {name: [_seconds(words, work) for _ in range(options.rounds)] for name, words in commands.items()}
        size = (work / "pairs.jsonl").stat().st_size
    result = {
        "what": f"python -m align check, {options.rows} pairs, median of {options.rounds}",
        **provenance(),
        "load_average_after": os.getloadavg()[0],
        "model": model,
        "rows": options.rows,
        "megabytes": round(size / 1e6, 1),
        "seconds": {
            name: {"median": statistics.median(times), "all": times, "limit": LIMITS[name]}
            for name, times in measured.items()
        },
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in result["seconds"].items():
        print(f"{name}: {one['median']:.2f} s (limit {one['limit']} s)")


def prepare(work: Path, rows: int) -> dict[str, Any]:
    """Write model, pairs and recipe into `work`; return what the model is."""
    made = made_up(rows)
    model = build("7m", "hh", made[:_TRAINED_ON], work / "model")
    with open(work / "pairs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in made)
    recipe = {
        "model": {"name": "./model"},
        "method": {"name": "dpo", "beta": 0.1},
        "data": {"train": ["./pairs.jsonl"], "max_length": 2048},
        "train": {"output_dir": "run", "global_batch_size": 128},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return model


def made_up(rows: int, seed: int = 0) -> list[Row]:
    """Pairs of words of a made-up lexicon, the commoner the shorter, with sentences and paragraphs."""
    random = np.random.default_rng(seed)
    syllables = [a + b for a in "bcdfghlmnprstvw" for b in "aeiou"][:_SYLLABLES]
    parts = 1 + np.arange(_LEXICON) // 400 % 4
    lexicon = np.array(["".join(random.choice(syllables, count)) for count in parts], dtype=object)
    chances = 1 / np.arange(2, _LEXICON + 2)
    chances /= chances.sum()

    def text(words: int) -> str:
        drawn = lexicon[random.choice(_LEXICON, words, p=chances)]
        ends = random.random(words)
        return "".join(
            w + (". " if e < 0.06 else ".\n\n" if e < 0.065 else " ") for w, e in zip(drawn, ends, strict=True)
        )

    def length(mean: float, sigma: float, least: int, most: int) -> int:
        return int(np.clip(random.lognormal(np.log(mean) - sigma**2 / 2, sigma), least, most))

    return [
        {
            "prompt": f"{number} {text(length(115, 0.8, 6, 600))}",
            "chosen": " " + text(length(230, 0.5, 12, 900)),
            "rejected": " " + text(length(220, 0.5, 12, 900)),
        }
        for number in range(rows)
    ]


def _seconds(words: list[str], work: Path) -> float:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "align", *words], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1):
        raise SystemExit(f"align {' '.join(words)} failed:\n{done.stderr}")
    return round(seconds, 3)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "check-60k.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
