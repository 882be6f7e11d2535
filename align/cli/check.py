"""`align check`: everything of a run but training."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from align.cli.data import add_output_options, limits_of, options_behind, watch

_DESCRIPTION = """Look at all that a run needs, and train nothing: whether the recipe is valid and its output folder
usable, what is in the data, five rows with the tokens that are scored, one micro-batch of the first step through the
model and its reference, and what a step will be made of. Nothing is written into the output folder.

Reads up to 200,000 rows of a stream and counts the tokens of 5,000, evenly spaced (`align data` reads all).
The exit code is 1 where a limit is crossed, 2 where the run would stop.
"""
_EXAMPLES = """examples:
  align check my.yaml
  align check my.yaml train.global_batch_size=32 --train.seed 7
  align check my.yaml --json > check.json
  align check my.yaml --html check.html --max-truncated 0.1
  align check my.yaml --no-model                         recipe and data alone
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    parser.add_argument("rest", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="options to replace")
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-model", action="store_true", help="load the tokenizer only; score nothing")
    add_output_options(parser)


def run(options: argparse.Namespace) -> int:
    overrides = options_behind(options, _add_options)
    from align.recipe.schema import read

    recipe, given = read(options.recipe, overrides)

    from align.cli.console import note, print_json, set_up_logging
    from align.data.doctor import crossed, judge
    from align.recipe.advice import advise
    from align.recipe.check import check

    set_up_logging(quiet=True)
    checked = check(recipe, with_model=not options.no_model, watch=watch)
    judged = judge(checked.data, limits_of(options, bad=recipe.data.max_bad_fraction))
    checked.data["limits"] = judged
    advice = advise(recipe, given, checked.facts)
    lines = crossed(judged)
    document = {
        "recipe": options.recipe,
        "output_dir": recipe.train.output_dir,
        "data": checked.data,
        "run": checked.run,
        "model": checked.model,
        "warnings": [dataclasses.asdict(one) for one in advice],
        "crossed": lines,
    }
    if options.json:
        print_json(document)
    else:
        _print(document, judged)
    for one in advice:
        note(str(one))
    if options.html is not None:
        note(f"the page is {_page(document, options)}")
    for line in lines:
        note(line)
    if checked.failed is not None:
        raise checked.failed
    return 1 if lines else 0


def _print(document: dict[str, Any], judged: Sequence[dict[str, Any]]) -> None:
    from align.cli.data_report import print_named, print_report

    print_report(document["data"], judged)
    print_named("the run", _run_rows(document["run"]))
    if document["model"] is not None:
        print_named("the model", _model_rows(document["model"]))


def _run_rows(run: dict[str, Any]) -> list[list[str]]:
    options = ", ".join(f"{name} {value}" for name, value in run["options"].items())
    rows = [
        ["method", f"{run['method']}{', ' if options else ''}{options}"],
        ["learning rate", f"{run['learning_rate']:g}, {run['lr_scheduler_type']}, {run['warmup_steps']} steps warm-up"],
        ["steps", f"{run['steps']:,} ({run['epochs']:g} epochs of {run['steps_per_epoch']:,})"],
        ["units a step", f"{run['global_batch_size']:,} from {run['rows_per_step']:,} rows"],
    ]
    if "micro_batches_per_step" in run:
        micro = run["micro_batches_per_step"]
        each = f"at most {run['tokens_per_micro_batch']:,} tokens each, on {run['ranks']} rank(s)"
        rows += [
            ["micro-batches a step", f"{micro['mean']:.1f} (up to {micro['most']}), {each}"],
            ["tokens a step", f"{run['tokens_per_step']:,}; the longest row has {run['longest_row']:,}"],
            ["gain of sharing prompts", f"{run['sharing_gain']:.2f} times fewer tokens"],
        ]
    return rows


def _model_rows(model: dict[str, Any]) -> list[list[str]]:
    rows = [["model", f"{model['name']}, computing in {model['dtype']} on {model['device']}"]]
    for role, one in model["parameters"].items():
        share = one["trainable"] / one["all"] if one["all"] else 0.0
        rows.append([f"parameters, {role}", f"{one['trainable']:,} trained of {one['all']:,} ({share:.2%})"])
    rows.append(["attention back end", f"{model['backend']}: {model['backend_reason']}"])
    rows.append(["reference", model["reference"] or "none: the method reads none"])
    zero = model["step_zero"]
    if "sampled" in model:
        told = model["sampled"]
        size = f"{told['answers']} answers to {told['prompts']} prompts, {told['tokens']:.1f} tokens each"
        cut = f"{told['truncated']:.0%} cut" if told["truncated"] else "none cut"
        off = f"log-probs at most {told['largest_difference']:.2g} nats from the trainer's"
        return [*rows, ["sampling", f"{size}, {cut}; {off}"]]
    if zero is None:
        return [*rows, ["step zero", "no usable row"]]
    size = f"{zero['rows']} rows, {zero['answers']} answers, {zero['scored_tokens']:,} scored tokens"
    rows.append(["step zero", f"one micro-batch: {size}, {zero['nats_per_token']:.3f} nats a token"])
    rows.append(["loss at step zero", _loss(zero)])
    if "largest_difference" in zero:
        equal = "should be 0: the reference is the starting policy" if zero["expected_equal"] else "another model"
        rows.append(["policy against reference", f"at most {zero['largest_difference']:.3g} nats an answer ({equal})"])
    return rows


def _loss(zero: dict[str, Any]) -> str:
    text = f"{zero['loss']:.6g}"
    if "known_value" in zero:
        return f"{text}; known: {zero['known_formula']} = {zero['known_value']:.6g}"
    if "loss_if_equal" in zero:
        return f"{text}; {zero['loss_if_equal']:.6g} where policy and reference are equal"
    return text


def _page(document: dict[str, Any], options: argparse.Namespace) -> Any:
    from align.report import DataReport, Section, Table, Text, write_page

    parts: list[Any] = [Table("The run", ["", ""], _run_rows(document["run"]))]
    if document["model"] is not None:
        parts.append(Table("The model", ["", ""], _model_rows(document["model"])))
    warnings = [f"{one['what']} ({one['where']}). {one['why']}. {one['mend']}" for one in document["warnings"]]
    for title, lines in (("Above a limit", document["crossed"]), ("Warnings", warnings)):
        if lines:
            parts.append(Text(title, "\n\n".join(lines)))
    sections: list[Any] = [Section("Check", parts), DataReport(document["data"])]
    return write_page(options.html, f"Check of {options.recipe}", sections)
