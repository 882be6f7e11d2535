"""Trains one step on a small and on a large data set in forked processes and reports memory and rows parsed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import torch

torch.set_num_threads(1)

from transformers import TrainerCallback  # noqa: E402

from align.testing.tiny import random_pairs, save_tiny  # noqa: E402
from align.trainers import AlignConfig, PreferenceTrainer  # noqa: E402

BATCH = 16


class Measure(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.memory = psutil.Process().memory_info().rss


def run(model: Path, rows: Path, out: Path) -> None:
    measure = Measure()
    args = AlignConfig(
        output_dir=str(out),
        global_batch_size=BATCH,
        learning_rate=1e-4,
        max_steps=1,
        save_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = PreferenceTrainer(str(model), "simpo", args, str(rows), callbacks=[measure])
    trainer.train()
    manifest = json.loads((out / "checkpoint-1" / "manifest.json").read_text())
    report = {"memory": measure.memory, "data": manifest["info"]["data"], "steps": trainer.state.max_steps}
    (out / "report.json").write_text(json.dumps(report))


def main(folder: Path, sizes: list[int]) -> None:
    model = save_tiny(folder / "model")
    block = [json.dumps(row) for row in random_pairs(500, seed=4)]
    for size in sizes:
        path = folder / f"{size}.jsonl"
        with path.open("w") as file:
            for number in range(size):
                file.write(block[number % 500][:-1] + f', "id": {number}}}\n')
        pid = os.fork()
        if pid == 0:
            try:
                run(model, path, folder / str(size))
            except BaseException:  # noqa: BLE001 - a forked child must not return into its parent's code
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[2].split(",")])
