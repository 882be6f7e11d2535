"""How many faults planted in the methods the fast tests catch: every mutant of `tests/mutation`, by method.

`python -m bench.mutation [--methods dpo ipo] [--output FILE]` prints the survivors and writes the counts with machine,
versions and commit. One process, a few minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import provenance
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.runner import Result, run, sources

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    options = _options()
    chosen = [(source, mutant) for source in sources(options.methods) for mutant in source.mutants]
    result = run(chosen, say=lambda line: print(line, file=sys.stderr, flush=True))
    document = summary(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    for name, one in document["files"].items():
        print(f"{name:20} {one['killed']:4} of {one['mutants']:4} caught, {one['equivalent']} equivalent")
        for line in one["survivors"]:
            print(f"    {line}")
    print(f"{document['caught']:.2%} of {document['mutants'] - document['equivalent']} caught")
    return 0


def summary(result: Result) -> dict[str, Any]:
    """What is written: totals, and each file's counts and survivors."""
    counted = len(result.mutants) - len(result.broken)
    return {
        "what": "mutants of align/methods caught by the fast tests of methods and the battery",
        **provenance(),
        "seconds": round(result.seconds, 1),
        "mutants": counted,
        "killed": len(result.killed),
        "equivalent": len(result.equivalent),
        "survived": len(result.survived),
        "caught": result.share(),
        "listed_as_equivalent_and_caught": [mutant.key for mutant in result.wrongly_listed],
        "failing_without_a_mutant": result.failing,
        "uncollected": result.uncollected,
        "files": result.by_module(),
        "reasons": {mutant.key: EQUIVALENT[mutant.key] for mutant in result.equivalent},
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=(), help="files of align/methods without .py; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS / "mutation.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
