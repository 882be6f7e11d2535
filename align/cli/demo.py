"""`align demo`: from nothing to aligned models in minutes, on a world whose reward is known."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from align.cli.console import duration, note, print_json, print_table, progress, set_up_logging
from align.core.errors import ConfigError, suggestion

_DESCRIPTION = """Train a small language model from nothing on the demonstrations of a small world, sample completions,
build preference pairs from the gold preference, align the model by several methods, and show what changed."""
_EXAMPLES = """examples:
  align demo
  align demo --seed 7 --methods dpo kto
  align demo --world flipped --methods dpo rdpo cdpo
  align demo --world noisy --output runs/noisy
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("--output", type=Path, help="folder to make; the default is the next free runs/demo-N")
    parser.add_argument("--seed", type=int, default=0, help="of model, data and training (0)")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="recipes of the demo: any method's id, or dpo-lora (dpo simpo kto dpo-lora)",
    )
    parser.add_argument(
        "--world",
        default="style",
        help="style (the default); noisy, flipped, length_biased: annotators who err; twist: preferences that go round",
    )
    parser.add_argument("--prompts", type=int, default=768, help="training prompts, a pair of answers each (768)")
    parser.add_argument("--json", action="store_true", help="print for machines")


def run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    set_up_logging(quiet=True)
    from align.cli import demo_page
    from align.cli.demo_steps import METHODS, Demo, names
    from align.worlds import WORLDS

    world = WORLDS.get(options.world)()
    for name in options.methods or ():
        if name not in names():
            raise ConfigError(f"the demo has no method `{name}`", mend=suggestion(name, names()))
    if options.prompts < 2:
        raise ConfigError(f"--prompts is {options.prompts}", mend="use 2 or more")
    folder = options.output or next_free(Path("runs"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`{folder}` is there already", mend="name a folder that is not, or leave --output out")
    demo = Demo(world, folder, options.seed, options.prompts, progress, note)
    made, outcomes = demo.run(tuple(options.methods or METHODS))
    rows = [demo_page.measures(outcome) for outcome in outcomes]
    page = demo_page.write(folder, made, outcomes, rows, demo.data_report(made))
    seconds = time.monotonic() - started
    if options.json:
        print_json({"methods": rows, "pairs": made.counts, "seconds": seconds, "page": str(page)})
        return 0
    print_table(demo_page.COLUMNS, [demo_page.cells(row) for row in rows])
    print(demo_page.verdict(rows).text)
    print(f"{duration(seconds)}; the models are in {folder}; the page with curves and answers: {page}")
    return 0


def next_free(parent: Path) -> Path:
    """The first of `demo-1`, `demo-2`, ... that does not exist."""
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"
