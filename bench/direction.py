"""Does each method move the metric that its file claims, in the claimed direction? Five paired seeds on a world.

python -m bench.direction --seeds 0 1 --out /tmp/direction      # one process a core; goes on where it was stopped
python -m bench.direction --collect /tmp/direction              # writes results/direction.json

A pair is a seed: starting model, prompts, answers and data of both sides are the same, and the other side is the
starting model or the model of another method, trained on the same file. The interval is of the mean difference over
seeds, by Student's t. `--only` takes methods or report names; recipes are tuned on a seed of its own, `--seeds 100`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.cli.demo_steps import Demo, kinds
from align.core.progress import silent
from align.evaluate.intervals import mean_interval
from align.methods import METHODS
from align.methods.claim import METRICS, START, Claim
from align.worlds import WORLDS
from bench.direction_measure import Held, measure, measured_on
from bench.direction_reports import REPORTS, Job, report
from bench.machine import provenance

RESULT = Path(__file__).parent / "results" / "direction.json"
TRIED = Path(__file__).parent / "direction_tried.json"
"""Method -> what was tried where its claim did not hold."""
SEEDS = (0, 1, 2, 3, 4)


def claiming() -> list[str]:
    """The methods that claim something: those that sample, or that rounds feed, are compared in `bench.rollouts`."""
    return [name for name in METHODS.entries() if METHODS.get(name).claim is not None]


def start_of(world: str) -> Job:
    return Job(world, START)


def jobs_of(method: str) -> tuple[Job, Job]:
    """The run of a claim, and what it is compared with."""
    claim = METHODS.get(method).claim
    if claim.against == START:
        return Job(claim.world, method), start_of(claim.world)
    return Job(claim.world, method), Job(claim.world, claim.against, data=_data(method, claim.against))


def _data(method: str, against: str) -> str:
    """Whose files the other side reads: a method's own where they are not the default."""
    return method if kinds(method) != kinds(against) else ""


class Seed:
    """All runs of a seed, each measured once and kept in a file of JSON lines."""

    def __init__(self, number: int, out: Path) -> None:
        self.number, self.out = number, out
        self.path = out / f"seed-{number}.jsonl"
        self.found: dict[str, dict[str, Any]] = read_found(self.path)
        self._worlds: dict[str, tuple[Any, Any, Held]] = {}

    def world(self, name: str) -> tuple[Any, Any, Held]:
        """(demo, what its methods start from, what is measured on)."""
        if name not in self._worlds:
            demo = Demo(WORLDS.get(name)(), self.out / f"{name}-{self.number}", self.number, 768, _no_bar, str)
            demo.folder.mkdir(parents=True, exist_ok=True)
            made = demo.make()
            self._worlds[name] = demo, made, measured_on(demo, made)
        return self._worlds[name]

    def run(self, job: Job, curve: str = "") -> dict[str, Any]:
        """The measures of a job; with `curve`, that metric at points of the training too."""
        found = self.found.get(job.key)
        if found is None or (curve and "curve" not in found):
            found = self._train(job, curve)
            self.found[job.key] = found
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": job.key, **found}) + "\n")
        return found

    def _train(self, job: Job, curve: str) -> dict[str, Any]:
        demo, made, held = self.world(job.world)
        if job.recipe == START:
            return {"metrics": measure(made.model, made.model, held)}
        name = job.key.replace(" ", ",").replace("/", "_").replace("=", "-") + (",curve" if curve else "")
        overrides = [*job.overrides, "data.eval=null", f"train.output_dir={demo.folder / name}"]
        overrides += ["train.save_steps=0.25", "train.save_total_limit=null"] if curve else ["train.save_steps=100000"]
        if job.data:
            files = [demo.file(made, kind, "train") for kind in kinds(job.data)]
            overrides.append(f"data.train=[{', '.join(map(str, files))}]")
        output, _ = demo.train(job.recipe, made, overrides, watch=lambda trainer: None)
        found: dict[str, Any] = {"metrics": measure(output / "policy", made.model, held)}
        if curve:
            found["curve"] = {"metric": curve, **_curve(output, made.model, held, curve)}
        return found


def _curve(output: Path, start: Path, held: Held, metric: str) -> dict[str, list[float]]:
    """A metric at the start, at the checkpoints and at the end."""
    folders = sorted(output.glob("checkpoint-*"), key=lambda one: int(one.name.partition("-")[2]))
    steps = [0, *(int(one.name.partition("-")[2]) for one in folders)]
    policies = [start, *(one / "policy" for one in folders)]
    return {"step": steps, "values": [measure(policy, start, held)[metric] for policy in policies]}


def _no_bar(total: int, label: str, unit: str) -> Any:
    return contextlib.nullcontext(silent)


def read_found(path: Path) -> dict[str, dict[str, Any]]:
    """key -> what a job gave; the last line of a key counts, a half-written one does not."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            found[entry.pop("key")] = entry
    return found


def wanted(only: Sequence[str]) -> tuple[list[str], list[str]]:
    """(methods, reports) to run: all, or those named."""
    methods = [name for name in claiming() if not only or name in only]
    reports = [name for name in REPORTS if not only or name in only]
    unknown = set(only) - set(methods) - set(reports)
    if unknown:
        raise SystemExit(f"no method or report: {', '.join(sorted(unknown))}")
    return methods, reports


def run(number: int, out: Path, only: Sequence[str]) -> None:
    """Everything that is missing of a seed."""
    seed = Seed(number, out)
    methods, reports = wanted(only)
    for method in methods:
        began = time.monotonic()
        ours, theirs = jobs_of(method)
        claim = METHODS.get(method).claim
        other = seed.run(theirs)["metrics"]
        mine = seed.run(ours, curve=claim.metric if number == SEEDS[0] else "")["metrics"]
        moved = ", ".join(f"{name} {other[name]:.3g} -> {mine[name]:.3g}" for name in METRICS)
        print(f"seed {number} {method} ({claim}) {time.monotonic() - began:.0f} s: {moved}", flush=True)
    for name in reports:
        for job in REPORTS[name].jobs:
            seed.run(job)
        print(f"seed {number} report {name}", flush=True)


def collect(out: Path) -> dict[str, Any]:
    """The result file: claims with intervals over seeds, and reports."""
    found = {number: read_found(out / f"seed-{number}.jsonl") for number in SEEDS}
    tried = json.loads(TRIED.read_text(encoding="utf-8")) if TRIED.exists() else {}
    methods = {name: _claimed(name, found, tried.get(name, "")) for name in claiming()}
    return {
        **provenance(),
        "seeds": list(SEEDS),
        "metrics": METRICS,
        "methods": {name: entry for name, entry in methods.items() if entry},
        "reports": {name: report(name, {n: list_of(found[n]) for n in SEEDS}) for name in REPORTS},
    }


def list_of(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {key: entry["metrics"] for key, entry in found.items()}


def _claimed(method: str, found: Mapping[int, Mapping[str, Any]], tried: str) -> dict[str, Any] | None:
    ours, theirs = jobs_of(method)
    claim: Claim = METHODS.get(method).claim
    if any(job.key not in runs for runs in found.values() for job in (ours, theirs)):
        return None
    runs = [
        {"seed": seed, "method": all_[ours.key]["metrics"], "against": all_[theirs.key]["metrics"]}
        for seed, all_ in found.items()
    ]
    estimate = mean_interval([run["method"][claim.metric] - run["against"][claim.metric] for run in runs])
    holds = claim.holds(estimate.low, estimate.high)
    return {
        "claim": {name: getattr(claim, name) for name in ("metric", "sign", "world", "against")},
        "recipe": f"demo/{method}",
        "runs": runs,
        "difference": {"value": estimate.value, "low": estimate.low, "high": estimate.high},
        "holds": holds,
        "tried": tried,
        "curve": found[SEEDS[0]][ours.key].get("curve"),
    }


def rounded(value: Any) -> Any:
    """Numbers to six digits: more than the runs decide, and a file that can be read."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result in a line a claim."""
    for name, entry in result["methods"].items():
        claim, value = Claim(**entry["claim"]), entry["difference"]
        mark = "holds" if entry["holds"] else "DOES NOT HOLD"
        yield f"{name:13} {claim}: {value['value']:+.3g} [{value['low']:+.3g}, {value['high']:+.3g}] {mark}"
    for name, entry in result["reports"].items():
        yield f"{name}: {json.dumps(entry)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=Path("/tmp/direction"))
    parser.add_argument("--only", nargs="+", default=[])
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
