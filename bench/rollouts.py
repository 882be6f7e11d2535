"""What papers say of methods that sample, on the worlds: five paired seeds, reported whichever way they fall.

python -m bench.rollouts --seeds 0 1 --out /tmp/rollouts      # one process a core; goes on where it was stopped
python -m bench.rollouts --collect /tmp/rollouts              # writes results/rollouts.json

A pair is a seed: starting model, prompts and judge of both sides are the same. Intervals are of the mean difference
over seeds, by Student's t. Settings were chosen on a seed of its own, `--seeds 100`. `--only` takes parts:
twist, style, cream.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.evaluate.intervals import mean_interval
from bench.direction import read_found, rounded
from bench.machine import provenance
from bench.rollouts_runs import PARTS, Seeded

RESULT = Path(__file__).parent / "results" / "rollouts.json"
SEEDS = (0, 1, 2, 3, 4)


def run(number: int, out: Path, only: Sequence[str]) -> None:
    """Everything that is missing of a seed."""
    path = out / f"seed-{number}.jsonl"
    for part, runs in PARTS.items():
        if only and part not in only:
            continue
        seeded = Seeded(number, out / f"{part}-{number}")
        for one in runs:
            if one.key in read_found(path):
                continue
            began = time.monotonic()
            found = one.measure(seeded)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": one.key, "seconds": time.monotonic() - began, **found}) + "\n")
            print(f"seed {number} {one.key} {time.monotonic() - began:.0f} s: {_short(found)}", flush=True)
        for folder in seeded.folder.glob("run-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _short(found: Mapping[str, Any]) -> str:
    last = {name: value[-1] if isinstance(value, list) else value for name, value in found.items()}
    return json.dumps(rounded(last))


def collect(out: Path) -> dict[str, Any]:
    """The result file: every curve, and the reports over seeds that have all their runs."""
    found = {number: read_found(out / f"seed-{number}.jsonl") for number in SEEDS}
    return {
        **provenance(),
        "seeds": list(SEEDS),
        "runs": {key: {str(n): runs[key] for n, runs in found.items() if key in runs} for key in _keys()},
        "reports": {name: one(found) for name, one in REPORTS.items()},
    }


def _keys() -> list[str]:
    return [one.key for runs in PARTS.values() for one in runs]


# -- reports ---------------------------------------------------------------------------------------------------------

Found = Mapping[int, Mapping[str, dict[str, Any]]]


def difference(says: str, ours: str, theirs: str, value: Callable[[dict[str, Any]], float]) -> Callable[[Found], Any]:
    """ours - theirs by seed, with an interval."""

    def made(found: Found) -> dict[str, Any]:
        pairs = {n: (runs[ours], runs[theirs]) for n, runs in found.items() if ours in runs and theirs in runs}
        by_seed = {str(n): (value(a), value(b)) for n, (a, b) in pairs.items()}
        gaps = [a - b for a, b in by_seed.values()]
        estimate = mean_interval(gaps)
        return {
            "says": says,
            "ours": ours,
            "theirs": theirs,
            "by_seed": by_seed,
            "difference": {"value": estimate.value, "low": estimate.low, "high": estimate.high},
        }

    return made


def end(name: str) -> Callable[[dict[str, Any]], float]:
    """The last value of a curve, averaged with the one before it: a policy's cycle is not its level."""
    return lambda run: float(np.mean(run[name][-2:]))


def at_kl(level: float) -> Callable[[dict[str, Any]], float]:
    """Gold reward where the curve's KL first reaches a level, by straight lines between its points."""

    def made(run: dict[str, Any]) -> float:
        kl, gold = run["kl"], run["gold"]
        for place in range(1, len(kl)):
            if kl[place] >= level:
                share = (level - kl[place - 1]) / (kl[place] - kl[place - 1])
                return float(gold[place - 1] + share * (gold[place] - gold[place - 1]))
        return float("nan")

    return made


def _reports() -> dict[str, Callable[[Found], Any]]:
    found: dict[str, Callable[[Found], Any]] = {}
    for ours in ("inpo", "nash_md", "online_ipo"):
        for theirs in ("online_dpo reward", "online_dpo hard", "online_dpo sampled"):
            found[f"gap: {ours} - {theirs}"] = difference(
                "at equal samples the duality gap is smaller (2407.00617, 2312.00886)",
                f"twist {ours}",
                f"twist {theirs}",
                end("gap"),
            )
    for level in (2.0, 3.0, 4.0):
        for ours in ("online_dpo", "grpo"):
            found[f"gold at KL {level:g}: {ours} - dpo"] = difference(
                "online training gives more reward at equal KL than offline dpo (2402.04792)",
                f"style {ours}",
                "style dpo",
                at_kl(level),
            )
    for name in ("consistency", "gold"):
        found[f"{name}: cream - self_rewarding"] = difference(
            "over three rounds rankings stay consistent and quality rises (2410.12735)",
            "cream cream",
            "cream self_rewarding",
            lambda run, name=name: float(run[name][-1]),  # type: ignore[misc]
        )
    return found


REPORTS = _reports()


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A line a report."""
    for name, entry in result["reports"].items():
        value = entry["difference"]
        interval = f"{value['value']:+.3g} [{value['low']:+.3g}, {value['high']:+.3g}]"
        yield f"{name}: {interval}, {len(entry['by_seed'])} seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("/tmp/rollouts"))
    parser.add_argument("--only", nargs="+", default=[], choices=list(PARTS))
    parser.add_argument("--collect", type=Path)
    options = parser.parse_args()
    if options.collect is None:
        options.out.mkdir(parents=True, exist_ok=True)
        for number in options.seeds:
            run(number, options.out, options.only)
        return
    result = rounded(collect(options.collect))
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
