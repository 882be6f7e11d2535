"""`align recipes`: what ships, one of them as a start, and a TRL configuration turned into a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from align.core.errors import ConfigError

_EXAMPLES = """examples:
  align recipes list
  align recipes show mistral-7b/dpo-qlora --resolved
  align recipes copy llama-3-8b-instruct/simpo my.yaml
  align recipes import trl_dpo.yaml --processes 8 --output my.yaml
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Recipes with published numbers and their sources, and recipes out of TRL's configurations."
    parser.epilog = _EXAMPLES
    below = parser.add_subparsers(title="what to do", dest="action", metavar="ACTION", required=True)
    plain = argparse.RawDescriptionHelpFormatter
    listing = below.add_parser("list", help="name and summary of every recipe", formatter_class=plain)
    listing.add_argument("--json", action="store_true", help="print for machines")
    show = below.add_parser("show", help="print one, with its provenance", formatter_class=plain)
    show.add_argument("name", metavar="NAME", help="a name from `align recipes list`, or a file")
    show.add_argument(
        "--resolved", action="store_true", help="with its bases laid below it and every default filled in"
    )
    show.add_argument("--json", action="store_true", help="print for machines")
    copy = below.add_parser("copy", help="write one to a file of yours", formatter_class=plain)
    copy.add_argument("name", metavar="NAME", help="a name from `align recipes list`")
    copy.add_argument("file", metavar="FILE", type=Path, help="the file to write")
    copy.add_argument("--force", action="store_true", help="overwrite it")
    take = below.add_parser("import", help="turn a TRL YAML file into a recipe", formatter_class=plain)
    take.description = (
        "Reads the flat YAML that TRL's scripts take (DPOConfig, KTOConfig, SFTConfig, CPOConfig, ORPOConfig, with "
        "ModelConfig and ScriptArguments) and says of every key what became of it."
    )
    take.add_argument("file", metavar="FILE", type=Path, help="a TRL YAML file")
    take.add_argument(
        "--trainer",
        choices=("dpo", "kto", "sft", "cpo", "orpo", "bco", "grpo", "rloo", "online_dpo"),
        help="whose file; default: by its keys. The last three are refused with what to write instead",
    )
    take.add_argument("--processes", type=int, help="processes the file was launched with, for the global batch (1)")
    take.add_argument("--output", metavar="FILE", type=Path, help="write the recipe there, not to stdout")
    take.add_argument("--force", action="store_true", help="overwrite it")
    take.add_argument("--json", action="store_true", help="print recipe and notes for machines")


def run(options: argparse.Namespace) -> int:
    actions = {"list": _list, "show": _show, "copy": _copy, "import": _import}
    return actions[options.action](options)


def _list(options: argparse.Namespace) -> int:
    from align.cli.console import print_json
    from align.recipe import library

    found = library.shipped()
    if options.json:
        print_json([{"name": one.name, "title": one.title, "path": str(one.path)} for one in found])
        return 0
    width = max(len(one.name) for one in found) + 2
    for one in found:
        print(f"{one.name:<{width}}{one.title}")
    print("\nfor `accelerate launch --config_file`:")
    for path in library.launchers():
        print(f"  {path}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from align.cli.console import print_json
    from align.recipe import library

    path = Path(options.name)
    if not (path.suffix in (".yaml", ".yml") and path.is_file()):
        path = library.find(options.name).path
    text = _resolved(path) if options.resolved else path.read_text(encoding="utf-8")
    if options.json:
        print_json({"name": options.name, "path": str(path), "resolved": options.resolved, "text": text})
    else:
        print(text, end="")
    return 0


def _resolved(path: Path) -> str:
    from align.core.registry import METHODS
    from align.recipe import rules, schema

    recipe = schema.load(path)
    method = rules.build_method(METHODS.get(recipe.method.name), recipe.method.options)
    return rules.to_yaml(recipe, rules.Uses.of(method))


def _copy(options: argparse.Namespace) -> int:
    from align.recipe import library

    one = library.find(options.name)
    _write(options.file, one.text, options.force)
    print(f"{options.file}: {one.name}")
    return 0


def _write(file: Path, text: str, force: bool) -> None:
    from align.core.files import atomic_write

    if file.is_dir():
        raise ConfigError("is a folder", where=str(file), mend="name a file that ends in .yaml")
    if file.exists() and not force:
        raise ConfigError("the file is there already", where=str(file), mend="name another, or give --force")
    atomic_write(file, text)


def _import(options: argparse.Namespace) -> int:
    from align.cli.console import note, print_json
    from align.recipe.from_trl import convert

    made = convert(options.file, trainer=options.trainer, processes=options.processes)
    if options.output is not None:
        _write(options.output, made.text, options.force)
    if options.json:
        print_json(
            {
                "trainer": made.trainer,
                "output": None if options.output is None else str(options.output),
                "recipe": made.recipe,
                "keys": [vars_of(one) for one in made.notes],
            }
        )
        return 0
    for one in made.notes:
        note(str(one))
    if options.output is None:
        print(made.text, end="")
    else:
        print(f"{options.output}: a recipe for `{made.recipe['method']['name']}`; now: align check {options.output}")
    sys.stdout.flush()
    return 0


def vars_of(one: Any) -> dict[str, Any]:
    return {"key": one.key, "value": one.value, "line": one.line, "became": one.became, "says": one.says}
