"""`align data`: the data doctor, for a recipe's streams or for a file, folder or hub id."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.errors import ConfigError

_DESCRIPTION = """Look at preference data: rows kept and rejected with reasons, duplicates, ties, refusals, lengths,
length bias, truncation, overlap of train with evaluation, and five rows with the tokens that are scored.

Reads all rows; tokens are counted on 10,000 of them, evenly spaced. The exit code is 1 where a limit is crossed.
"""
_EXAMPLES = """examples:
  align data my.yaml                                     the streams of a recipe, with its tokenizer
  align data my.yaml data.max_length=1024 --json         with an override; one JSON document
  align data pairs.jsonl                                 a file: lengths in words
  align data pairs.jsonl --model Qwen/Qwen3-0.6B --eval held_out.jsonl
  align data pairs.jsonl winner=response_j --html report.html
  align data pairs.jsonl --benchmark gsm8k_test.jsonl --max-benchmarks 0
  align data index huge.jsonl                            count the rows of a file above 1 GB once
Behind a path, KEY=VALUE are the options of a stream in a recipe (split, winner, columns, max_rows, ...).
"""
_VIEWS = ("pairs", "singles", "lists", "groups", "demonstrations", "prompts")
_RECIPES = (".yaml", ".yml")
_LIMITS = {
    "bad": "bad rows (default 0.01, or the recipe's max_bad_fraction)",
    "duplicates": "rows that repeat an earlier one (default 0.2)",
    "overlap": "evaluation prompts that are in train (default 0)",
    "truncated": "rows longer than max_length (default 0.05)",
    "refusals": "winning answers that refuse (default none)",
    "longer": "pairs whose winner is the longer answer (default none)",
    "benchmarks": "rows that name a benchmark, questions of a --benchmark in train (default none)",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("what", metavar="RECIPE_OR_PATH", help="a recipe (.yaml), a file, folder or hub id, or `index`")
    parser.add_argument("rest", metavar="KEY=VALUE", nargs=argparse.REMAINDER, help="options to replace")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, which may stand before or behind the path."""
    parser.add_argument("--view", choices=_VIEWS, help="what is made of the rows (default: by the method or the rows)")
    parser.add_argument("--model", help="folder or hub id whose tokenizer counts (a recipe has its own)")
    parser.add_argument("--words", action="store_true", help="count words; load no tokenizer")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer, with --model (default 2048)")
    parser.add_argument("--eval", metavar="PATH", help="evaluation rows, to compare prompts with")
    parser.add_argument("--benchmark", metavar="PATH", action="append", default=[], help="a benchmark's prompts")
    parser.add_argument("--rows", type=int, help="read at most so many rows of each stream, evenly spaced")
    add_output_options(parser)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What `align check` has too."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report as a page")
    for name, says in _LIMITS.items():
        help = f"{says}; `none`: no limit"
        parser.add_argument(f"--max-{name}", metavar="SHARE", type=limit, default=argparse.SUPPRESS, help=help)


def limit(text: str) -> float | None:
    """A share from 0 to 1, or None for `none`."""
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"`{text}` is no share between 0 and 1, nor `none`")
    return value


def run(options: argparse.Namespace) -> int:
    from align.cli.console import note, print_json

    if options.what == "index":
        return _index(options.rest)
    overrides = options_behind(options, add_options)
    by_recipe = options.what.endswith(_RECIPES)
    found, bad = _of_recipe(options, overrides) if by_recipe else _of_path(options, overrides)

    from align.data.doctor import crossed, judge

    judged = judge(found.report, limits_of(options, bad=bad))
    found.report["limits"] = judged
    if options.json:
        print_json(found.report)
    else:
        from align.cli.data_report import print_report

        print_report(found.report, judged)
    if options.html is not None:
        from align.report import data_page

        note(f"the page is {data_page(found.report, options.html, title=f'Data report: {options.what}')}")
    lines = crossed(judged)
    if not found.report["streams"]["train"]["rows"]["kept"]:
        lines.append("train: no row is kept")
    for line in lines:
        note(line)
    return 1 if lines else 0


def options_behind(options: argparse.Namespace, add: Any) -> list[str]:
    """Read options that stand behind the path into `options`; what is left are overrides."""
    behind = argparse.ArgumentParser(prog="align", add_help=False, allow_abbrev=False)
    add(behind)
    return behind.parse_known_args(options.rest, namespace=options)[1]


def limits_of(options: argparse.Namespace, **defaults: float | None) -> Any:
    """The `Limits` that the options give, over `defaults`."""
    from align.data.doctor import Limits

    given = {name: getattr(options, f"max_{name}") for name in _LIMITS if hasattr(options, f"max_{name}")}
    return Limits(**{**defaults, **given})


def watch(total: int, label: str, unit: str) -> Any:
    """Progress on stderr, for `examine`."""
    from align.cli.console import progress

    return progress(total, label, unit)


def _index(rest: Sequence[str]) -> int:
    from align.core.errors import DataError
    from align.data.jsonl import write_index

    if len(rest) != 1:
        raise ConfigError("`align data index` takes one file", where="command line", mend="align data index FILE.jsonl")
    path = Path(rest[0]).expanduser()
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), mend="check the path")
    if not path.name.endswith((".jsonl", ".ndjson", ".json")):
        raise DataError("only JSONL files are indexed", where=str(path), why="others know their number of rows")
    print(f"wrote {write_index(path)}")
    return 0


def _of_recipe(options: argparse.Namespace, overrides: Sequence[str]) -> tuple[Any, float]:
    """The examination of a recipe's streams, and its limit of bad rows."""
    from align.core.registry import METHODS
    from align.data.doctor import Plan, examine
    from align.recipe import rules
    from align.recipe.run import streams
    from align.recipe.schema import load

    _refuse(options, ("eval", "max_length"), "a recipe has its own: write `data.eval` or `data.max_length` as override")
    recipe = load(options.what, overrides)
    method = rules.build_method(METHODS.get(recipe.method.name), recipe.method.options)
    named = {"train": streams(recipe.data.train)}
    if recipe.data.eval:
        named["eval"] = streams(recipe.data.eval)
    tokenise = None if options.words else _recipe_tokeniser(recipe, method, options)
    plan = Plan(
        view=options.view or method.view,
        needs=method.requires(),
        pairs=recipe.data.pairs,
        limit=options.rows,
        tokenise=tokenise,
        benchmarks=options.benchmark,
    )
    return examine(named, plan, watch), recipe.data.max_bad_fraction


def _recipe_tokeniser(recipe: Any, method: Any, options: argparse.Namespace) -> Any:
    from align.cli.console import set_up_logging
    from align.data.tokenise import Tokeniser
    from align.recipe.run import model_path
    from align.trainers.loading import load_tokenizer

    set_up_logging(quiet=True)
    data = recipe.data
    return Tokeniser(
        load_tokenizer(options.model or model_path(recipe), recipe.model.trust_remote_code),
        options.view or method.view,
        data.max_length,
        score=data.score,
        truncation=data.truncation,
        chat_template=None if data.chat_template == "model" else data.chat_template,
        pairs=data.pairs,
        needs=method.requires(),
    )


def _of_path(options: argparse.Namespace, overrides: Sequence[str]) -> tuple[Any, float]:
    """The examination of a file, folder or hub id."""
    from align.data.doctor import Plan, examine, guessed_view
    from align.data.prepare import open_sources

    if options.model is None:
        _refuse(options, ("max_length",), "tokens are counted with `--model`")
    stream = {**_stream_options(overrides), "name": options.what}
    named: dict[str, list[Any]] = {"train": [stream]}
    if options.eval is not None:
        named["eval"] = [{**stream, "name": options.eval, "split": None}]
    view, tokenise = options.view, None
    if options.model is not None and not options.words:
        from align.cli.console import set_up_logging
        from align.data.tokenise import Tokeniser
        from align.trainers.loading import load_tokenizer

        set_up_logging(quiet=True)
        view = view or guessed_view(open_sources(named["train"]))
        tokenise = Tokeniser(load_tokenizer(options.model), view, options.max_length or 2048)
    plan = Plan(view=options.view, limit=options.rows, tokenise=tokenise, benchmarks=options.benchmark)
    return examine(named, plan, watch), 0.01


def _stream_options(overrides: Sequence[str]) -> dict[str, Any]:
    """`split=test winner=response_j` -> the options of a stream, checked as in a recipe."""
    from align.core.errors import AlignError, raise_all, suggestion
    from align.core.options import check_value, declared
    from align.recipe.document import parse
    from align.recipe.run import streams
    from align.recipe.sections import Stream

    known = {key: (limits, hint) for key, _, limits, hint in declared(Stream) if key not in ("name", "weight")}
    values: dict[str, Any] = {}
    errors: list[AlignError] = []
    for word in overrides:
        key, equals, text = word.removeprefix("--").partition("=")
        where = f"argument {word}"
        if not equals or key not in known:
            errors.append(ConfigError(f"a stream has no option `{key}`", where=where, mend=suggestion(key, known)))
            continue
        try:
            value = parse(text, where, numbered=False).plain()
            values[key] = check_value("a stream", key, value, known[key][0], known[key][1], where)
        except AlignError as error:
            errors.append(error)
    raise_all(errors)
    return dict(streams([Stream(name="", **values)])[0])


def _refuse(options: argparse.Namespace, names: Sequence[str], mend: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(f"`--{name.replace('_', '-')}` has no effect here", where="command line", mend=mend)
