"""What the site takes from the code when it is built, so that it cannot say otherwise. Nothing of it is committed.

A page holds a mark, alone on its line, where generated text goes: `<!-- options train -->`, `<!-- commands -->`,
`<!-- methods -->`, `<!-- view pairs -->`, `<!-- notation -->`, `<!-- recipe options -->`, `<!-- collect options -->`,
`<!-- loop options -->`, `<!-- loops -->`.
Each registered method has a page `methods/ID.md` made from its file.
"""

from __future__ import annotations

import argparse
import importlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from align.cli.main import COMMANDS
from align.core.registry import METHODS
from docs.hooks import loops, methods
from docs.hooks.text import code, escape, table

EACH_METHOD = "methods/*"
"""The line of the navigation that stands for all method pages."""
_MARK = re.compile(r"^<!-- (\w+)(?: (\w+))? -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = [f"methods/{name}.md" for name in METHODS.entries()]
    for entry in config.nav or []:
        for title, below in entry.items() if isinstance(entry, dict) else ():
            if isinstance(below, list) and EACH_METHOD in below:
                entry[title] = [page for page in below if page != EACH_METHOD] + pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in METHODS.entries():
        files.append(File.generated(config, f"methods/{name}.md", content=methods.page(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _MARK.sub(lambda mark: generated(mark[1], mark[2]), markdown)


def generated(kind: str, name: str | None) -> str:
    """The text of a mark.

    Raises:
        PluginError: nothing is generated under that name.
    """
    if kind == "options" and name in COMMANDS:
        return command_options(name)
    if kind == "commands" and name is None:
        return table(["command", ""], [[f"[`align {key}`]({key}.md)", says] for key, says in COMMANDS.items()])
    if kind == "methods" and name is None:
        return methods.compared()
    if kind == "notation" and name is None:
        return methods.notation()
    if kind == "recipe" and name == "options":
        return importlib.import_module("align.recipe.reference").markdown()
    if kind == "collect" and name == "options":
        return importlib.import_module("align.recipe.reference").collecting()
    if kind == "loop" and name == "options":
        return importlib.import_module("align.recipe.reference").looping()
    if kind == "loops" and name is None:
        return loops.table_of_presets()
    if kind == "view" and name in methods.VIEWS:
        return methods.of_view(name)
    raise PluginError(f"there is no mark `<!-- {kind}{f' {name}' if name else ''} -->`")


def command_options(name: str) -> str:
    """Usage and a table of arguments of a command, and of each command below it."""
    parser = argparse.ArgumentParser(prog=f"align {name}", formatter_class=_Wide)
    importlib.import_module(f"align.cli.{name}").configure(parser)
    return "\n\n".join(_parser_text(parser))


class _Wide(argparse.RawDescriptionHelpFormatter):
    """Usage lines that do not depend on the terminal of who builds."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=84)


def _parser_text(parser: argparse.ArgumentParser) -> list[str]:
    parser.formatter_class = _Wide
    parts = ["```text\n" + parser.format_usage().removeprefix("usage: ").strip() + "\n```"]
    rows, below = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below += list(action.choices.values())
        elif not isinstance(action, argparse._HelpAction) and action.help is not argparse.SUPPRESS:
            rows.append(_row(parser, action))
    if rows:
        parts.append(table(["argument", "default", "meaning"], rows))
    for each in below:
        parts += [f"### {each.prog}", *_parser_text(each)]
    return parts


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    metavar = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    shown = "|".join(map(str, action.choices)) if action.choices and not action.metavar else metavar
    shown = " ".join(shown) if isinstance(shown, tuple) else shown
    name = ", ".join(action.option_strings) + (f" {shown}" if action.nargs != 0 else "")
    name = name if action.option_strings else shown
    says = (action.help or "") % (vars(action) | {"prog": parser.prog})
    default = action.default
    empty = default is None or default is False or default in ("", argparse.SUPPRESS, [], ()) or "(default" in says
    return [code(name), "" if empty else code(str(default)), escape(says)]
