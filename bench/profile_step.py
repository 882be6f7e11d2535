"""Where the time of one step goes: `python -m bench.profile_step --data hh --model 7m --batch 8`.

Every part is timed exclusively: what a part calls and is itself listed is not counted twice. Shares are of the whole
time from step to step, loading and logging included; `trainer` is what no part covers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import provenance
from bench.offline import MAX_LENGTH, RESULTS

WARM = 3

OURS = ("data", "planning and packing", "view and loss", "trainer")
"""What packing and the trainer cost beside the model's own work."""


class Stopwatch:
    """Exclusive seconds by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    def wrap(self, owner: Any, name: str, label: str, static: bool = False) -> None:
        """Replace `owner.name` by the same function under the clock."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self._enter(label)
            try:
                return inner(*arguments, **named)
            finally:
                self._leave()

        setattr(owner, name, staticmethod(timed) if static else timed)

    def _enter(self, label: str) -> None:
        now = time.perf_counter()
        self._charge(now)
        self._open.append((label, now))

    def _leave(self) -> None:
        now = time.perf_counter()
        self._charge(now)
        self._open.pop()
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def _charge(self, now: float) -> None:
        if self._open:
            label, since = self._open[-1]
            self.seconds[label] = self.seconds.get(label, 0.0) + now - since


def instrument(watch: Stopwatch) -> None:
    """Put the clock around the parts of a step."""
    import torch
    from accelerate import Accelerator

    from align.data.stream import GroupDataset
    from align.reference.columns import Cached, Frozen
    from align.scoring import engine as scoring
    from align.scoring.head import _Chunks
    from align.trainers.engine import Engine
    from align.trainers.roles import RoleModule

    watch.wrap(GroupDataset, "__getitems__", "data")
    watch.wrap(Engine, "share", "planning and packing")
    watch.wrap(Engine, "view", "view and loss")
    watch.wrap(RoleModule, "forward", "policy forward")
    watch.wrap(Frozen, "column", "reference forward")
    watch.wrap(Cached, "column", "reference cache")
    watch.wrap(scoring, "evaluate", "head forward")
    watch.wrap(_Chunks, "backward", "head backward", static=True)
    watch.wrap(Accelerator, "backward", "backward")
    watch.wrap(Accelerator, "clip_grad_norm_", "gradient clipping")
    watch.wrap(torch.optim.AdamW, "step", "optimiser")


def profile(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch
    from transformers import TrainerCallback

    from bench.sides import our_trainer

    torch.set_num_threads(options.threads)
    watch = Stopwatch()
    instrument(watch)

    class Span(TrainerCallback):
        """Seconds from the end of the last warm-up step to the end of the last step."""

        started = ended = 0.0

        def on_step_end(self, _args: Any, state: Any, _control: Any, **__: Any) -> None:
            self.ended = time.perf_counter()
            if state.global_step == WARM:
                self.started = self.ended
                watch.seconds.clear()

    span = Span()
    setting = {
        "backend": options.backend,
        "reference": options.reference,
        "cache": str(work / "cache"),
        "model": str(work / "model"),
        "rows": str(work / "rows.jsonl"),
        "output": str(work / "run"),
        "batch": options.batch,
        "steps": WARM + options.steps,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-6,
        "beta": 0.1,
    }
    trainer = our_trainer(setting, span)
    trainer.train()
    total = span.ended - span.started
    parts = {label: seconds for label, seconds in watch.seconds.items() if seconds > 0}
    parts["trainer"] = max(0.0, total - sum(parts.values()))
    shares = {label: seconds / total for label, seconds in sorted(parts.items(), key=lambda item: -item[1])}
    return {
        "seconds_per_step": total / options.steps,
        "share": shares,
        "share_of_forward": sum(shares.get(f"{name} forward", 0.0) for name in ("policy", "reference", "head")),
        "share_of_backward": sum(shares.get(name, 0.0) for name in ("backward", "head backward")),
        "share_of_head": sum(shares.get(f"head {name}", 0.0) for name in ("forward", "backward")),
        "share_of_optimiser": sum(shares.get(name, 0.0) for name in ("optimiser", "gradient clipping")),
        "share_of_our_overhead": sum(shares.get(name, 0.0) for name in OURS),
    }


def main() -> None:
    options = _options()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(options.threads), TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        count = (WARM + options.steps) * options.batch
        command = [sys.executable, "-m", "bench.prepare", options.data, options.model, str(work), str(count)]
        subprocess.run([*command, str(MAX_LENGTH)], check=True, cwd=Path(__file__).resolve().parent.parent)
        result = {
            "benchmark": "profile_step",
            "setting": {name: value for name, value in vars(options).items() if name != "out"},
            **json.loads((work / "facts.json").read_text()),
            **provenance(),
            **profile(options, work),
        }
    target = options.out or RESULTS / f"profile-{options.data}-{options.model}-b{options.batch}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps({name: value for name, value in result.items() if name.startswith(("share", "seconds"))}, indent=1)
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", choices=("hh", "ultrafeedback", "worst"), default="hh")
    parser.add_argument("--model", choices=("7m", "59m"), default="7m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--reference", choices=("frozen", "cached"), default="frozen")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
