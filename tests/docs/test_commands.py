"""Commands on the pages, in README.md and in --help are ones that the parsers take; every command has a page."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import tempfile
from pathlib import Path

import pytest

from align.cli.data import options_behind
from align.cli.main import COMMANDS, parser
from align.core.errors import AlignError
from align.recipe import collect, library, schema
from tests.docs.pages import DOCS, ROOT, blocks

_ACCELERATE = re.compile(r"^accelerate launch (?:.* )?-m align ")


def commands_in(text: str) -> list[str]:
    """Lines of a shell block, continued lines joined, without prompts, comments and what follows a pipe or `&&`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for stop in ("|", ">", "2>"):
            words = words[: words.index(stop)] if stop in words else words
        if words:
            found.append(shlex.join(words))
    return found


def arguments_of(command: str) -> list[str] | None:
    """What `align` gets, of a line that runs it; None for a line that does not."""
    command = _ACCELERATE.sub("align ", command)
    for prefix in ("python -m align ", "align "):
        if command.startswith(prefix):
            return shlex.split(command.removeprefix(prefix))
    return None


def problem_with(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the parser says against a line, or nothing."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        return f"there is no command `{name}`"
    try:
        options = parser(name).parse_args([word for word in arguments if word != "--debug"])
    except SystemExit as stop:
        return "" if stop.code == 0 else capsys.readouterr().err
    try:
        return _problem_behind(name or "", options)
    except AlignError as error:
        return str(error)


def _problem_behind(name: str, options: argparse.Namespace) -> str:
    """What is wrong with words that the parser hands on: overrides, and options behind the path."""
    if name == "recipes" and options.action in ("show", "copy"):
        library.find(options.name)
    overrides = list(getattr(options, "overrides", ()))
    if hasattr(options, "rest"):
        module = importlib.import_module(f"align.cli.{name}")
        add = getattr(module, "add_options", None) or module._add_options
        overrides = options_behind(options, add)
    if name == "data":
        return "" if options.what == "index" or all("=" in word for word in overrides) else f"{overrides}"
    if name in collect.FOLDERS:
        return _problem_of_collecting(name, overrides)
    if overrides:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.yaml"
            (Path(folder) / "rows.jsonl").touch()
            recipe.write_text(
                f"model: {{name: some/model}}\nmethod: {{name: dpo}}\ndata: {{train: [{folder}/rows.jsonl]}}\n"
                "train: {output_dir: out}\n"
            )
            schema.load(recipe, overrides)
    return ""


def _problem_of_collecting(name: str, overrides: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            "model: {name: some/model}\ndata: {prompts: [rows.jsonl]}\nfeedback: [{name: my:reward}]\n"
            "pairs: {rule: best_worst}\noutput_dir: out\n"
        )
        collect.read(recipe, name, overrides)
    return ""


def test_every_command_line_on_the_pages_parses(capsys):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    problems, seen = [], 0
    for block in blocks("sh"):
        for line in commands_in(block.text):
            arguments = arguments_of(line)
            if arguments is None:
                words = shlex.split(line)
                assert words[0] in ("make", "accelerate", "python", "pip", "cat", "head"), (block.where, line)
                if words[0] == "make" and words[1] not in targets:
                    problems.append(f"{block.where}: no target {words[1]}")
                continue
            seen += 1
            problem = problem_with(arguments, capsys)
            if problem:
                problems.append(f"{block.where}: {line}: {problem}")
    assert not problems, "\n".join(problems)
    assert seen > 30


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_help_parse(name, capsys):
    below = argparse.ArgumentParser(prog=f"align {name}")
    importlib.import_module(f"align.cli.{name}").configure(below)
    assert below.epilog, f"`align {name} --help` shows no example"
    problems = {line: said for line in examples_in(below.epilog) if (said := problem_of(line, capsys))}
    assert examples_in(below.epilog), f"`align {name} --help` shows no example"
    assert not problems


def examples_in(epilog: str) -> list[str]:
    """Lines of a help text that run `align`; a remark stands behind two spaces."""
    joined = re.sub(r"\\\n\s*", "", epilog)
    lines = [re.split(r"\s{2,}", line.strip())[0] for line in joined.splitlines()]
    return [line for line in lines if re.match(r"(accelerate launch .*-m )?align ", line)]


def problem_of(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    (command,) = commands_in(line)
    return problem_with(arguments_of(command) or [], capsys)


def test_the_examples_of_the_top_help_parse(capsys):
    lines = examples_in(parser().epilog or "")
    assert len(lines) >= 4
    assert not {line: said for line in lines if (said := problem_of(line, capsys))}


def test_every_command_has_a_page_with_its_options():
    there = {path.stem for path in (DOCS / "commands").glob("*.md")} - {"index"}
    assert there == set(COMMANDS)
    for name in COMMANDS:
        text = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")
        assert f"<!-- options {name} -->" in text
        assert len(blocks("sh", f"commands/{name}.md")) >= 1, f"no example on the page of `{name}`"


def test_a_wrong_line_is_found(capsys):
    assert "no command" in problem_with(arguments_of("align trian my.yaml") or [], capsys)
    assert "unrecognized" in problem_with(arguments_of("align methods --jsn") or [], capsys)
    assert arguments_of("accelerate launch --num_processes 2 -m align train a.yaml --x 1") == [
        "train",
        "a.yaml",
        "--x",
        "1",
    ]
    assert commands_in("align data \\\n  x.jsonl | head  # a look\n# nothing\n") == ["align data x.jsonl"]
