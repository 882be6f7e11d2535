"""`align demo` on several seeds, each in a process of its own from nothing: every method above the starting model?

python -m bench.demo --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.machine import provenance

RESULT = Path(__file__).parent / "results" / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    runs = [one(seed) for seed in options.seeds]
    above = all(method["difference"]["low"] > 0 for run in runs for method in run["methods"])
    text = json.dumps({**provenance(), "every_method_above_the_start": above, "runs": runs}, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")
    for run in runs:
        print(
            run["seed"],
            f"{run['seconds']:.0f} s",
            {m["method"]: round(m["difference"]["low"], 3) for m in run["methods"]},
        )
    print("every method above the starting model" if above else "NOT every method above the starting model")


def one(seed: int) -> dict[str, Any]:
    """The demo of a seed, nothing cached."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ALIGN_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "align", "demo", "--seed", str(seed), "--output", f"{folder}/demo", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        said = json.loads(done.stdout)
    for method in said["methods"]:
        method.pop("folder")
    return {"seed": seed, "seconds": said["seconds"], "pairs": said["pairs"], "methods": said["methods"]}


if __name__ == "__main__":
    main()
