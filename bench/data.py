"""The benchmarks' preference rows: HH as it comes, and two seeded generators.

Generated texts are words of a word-level tokenizer, one word one token, so that lengths are exact for every trainer.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Literal

import numpy as np

Kind = Literal["hh", "ultrafeedback", "worst"]
Row = dict[str, str]

HH_FILE = "hh_harmless_base_test.jsonl.gz"
_MARKER = "\n\nAssistant:"
_GENERATED_ROWS = 256


def word(number: int) -> str:
    return f"w{number}"


def rows(kind: Kind, vocabulary: int) -> list[Row]:
    """Rows `prompt`, `chosen`, `rejected` in a fixed order. `vocabulary` counts the words of generated rows."""
    if kind == "hh":
        return hh_rows()
    return ultrafeedback_like(vocabulary) if kind == "ultrafeedback" else worst_case(vocabulary)


def hh_path() -> Path | None:
    """The HH file in `$ALIGN_SHARED` or `../shared/data`, or None."""
    here = Path(__file__).resolve().parent.parent
    named = os.environ.get("ALIGN_SHARED")
    folders = [Path(named), Path(named) / "data"] if named else [here.parent / "shared" / "data"]
    return next((folder / HH_FILE for folder in folders if (folder / HH_FILE).is_file()), None)


def hh_rows() -> list[Row]:
    """HH harmless-base test: the prompt ends in the last `Assistant:` that both transcripts share.

    Rows whose transcripts differ before their last turn, and rows with equal or empty answers, are left out: neither
    trainer gets them.
    """
    path = hh_path()
    if path is None:
        raise SystemExit(f"{HH_FILE} is not at hand: put it in ../shared/data or name its folder in ALIGN_SHARED")
    found: list[Row] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt, chosen = _split(row["chosen"])
            other, rejected = _split(row["rejected"])
            if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
                found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def ultrafeedback_like(vocabulary: int, count: int = _GENERATED_ROWS, seed: int = 1) -> list[Row]:
    """Prompts of about 150 tokens and responses of about 300 (log-normal, sigma 0.8 and 0.5), 1,024 in all at most."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        prompt = int(np.clip(_log_normal(random, 150, 0.8), 8, 480))
        responses = [int(np.clip(_log_normal(random, 300, 0.5), 16, 1023 - prompt)) for _ in range(2)]
        found.append(_generated(random, vocabulary, prompt, responses[0], responses[1]))
    return found


def worst_case(vocabulary: int, count: int = _GENERATED_ROWS, seed: int = 2) -> list[Row]:
    """Nothing to share and nothing to pad: a prompt of one token, both responses of 300 with the end token."""
    random = np.random.default_rng(seed)
    return [_generated(random, vocabulary, 1, 299, 299) for _ in range(count)]


def write_jsonl(path: Path, found: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


def _split(transcript: str) -> tuple[str, str]:
    cut = transcript.rindex(_MARKER) + len(_MARKER)
    return transcript[:cut], transcript[cut:]


def _log_normal(random: np.random.Generator, mean: float, sigma: float) -> float:
    return float(random.lognormal(np.log(mean) - sigma**2 / 2, sigma))


def _generated(random: np.random.Generator, vocabulary: int, prompt: int, chosen: int, rejected: int) -> Row:
    words = [word(number) for number in random.integers(0, vocabulary, prompt + chosen + rejected)]
    return {
        "prompt": " ".join(words[:prompt]),
        "chosen": " " + " ".join(words[prompt : prompt + chosen]),
        "rejected": " " + " ".join(words[prompt + chosen :]),
    }
