"""What the site takes from the code when it is built, so that it cannot say otherwise. Nothing of it is committed.

A page holds a mark, alone on its line, where generated text goes: `<!-- options train -->`, `<!-- commands -->`,
`<!-- methods -->`, `<!-- view pairs -->`, `<!-- recipe options -->`. Each registered method has a page `methods/ID.md`
made from its file.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from align.cli.main import COMMANDS
from align.core.clashes import METHOD_CLASHES
from align.core.options import declared
from align.core.registry import METHODS

EACH_METHOD = "methods/*"
"""The line of the navigation that stands for all method pages."""
_MARK = re.compile(r"^<!-- (\w+)(?: (\w+))? -->$", re.MULTILINE)
_VIEWS = {
    "pairs": "a prompt, a chosen and a rejected answer",
    "singles": "a prompt, one answer, and a label or a reward",
    "lists": "a prompt and several answers with scores or ranks",
    "groups": "a prompt and several sampled answers with rewards",
    "demonstrations": "a prompt and the answer to imitate",
}
_NEEDS = {
    "ref_logp": "log-probabilities of the reference",
    "label": "a label per answer: desirable or not",
    "reward": "a scalar reward per answer",
    "scores": "a score or rank per answer",
    "value": "a value role, trained beside the policy",
    "mismatched": "another row's answer after the same prompt, made at each step",
    "kl_ref_policy": "KL(reference ‖ policy) over the vocabulary at each token",
    "baseline": "with `baseline: sft`: a demonstration per pair",
    "samples": "with `baseline: samples`: samples of a frozen policy per pair",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = [f"methods/{name}.md" for name in METHODS.entries()]
    for entry in config.nav or []:
        for title, below in entry.items() if isinstance(entry, dict) else ():
            if isinstance(below, list) and EACH_METHOD in below:
                entry[title] = [page for page in below if page != EACH_METHOD] + pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in METHODS.entries():
        files.append(File.generated(config, f"methods/{name}.md", content=method_page(name)))
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
        return method_table(METHODS.entries())
    if kind == "recipe" and name == "options":
        return importlib.import_module("align.recipe.reference").markdown()
    if kind == "view" and name in _VIEWS:
        return method_table({key: entry for key, entry in METHODS.entries().items() if entry.view == name})
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


def method_table(entries: dict[str, Any]) -> str:
    rows = [
        [f"[`{key}`](../methods/{key}.md)", entry.view, paper_link(entry.paper), escape(entry.summary)]
        for key, entry in entries.items()
    ]
    return table(["id", "reads", "paper", ""], rows)


def method_page(name: str) -> str:
    """The page of a method: what its file says, and how to ask for it."""
    from align.trainers.config import default_learning_rate

    cls = METHODS.get(name)
    module = importlib.import_module(cls.__module__)
    title = (module.__doc__ or name).strip().partition("\n")[0].rstrip(".")
    summary, _, body = docstring(cls).partition("\n")
    full, adapter = (f"{default_learning_rate(name, adapter):g}".replace("e-0", "e-") for adapter in (False, True))
    facts = [
        ["reads", f"[{cls.view}](../glossary.md#{cls.view}): {_VIEWS.get(cls.view, '')}".rstrip(": ")],
        *([["needs", "; ".join(_need(need) for need in sorted(cls.needs))]] if cls.needs else []),
        ["paper", paper_link(cls.paper) or "none"],
        ["a unit's loss depends on", _COUPLING[cls.coupling]],
        ["learning rate, if none is given", f"{full} for full fine-tuning, {adapter} for an adapter"],
        ["file", code(cls.__module__.replace(".", "/") + ".py")],
    ]
    said = "\n".join(f"* **{key}**: {value}" for key, value in facts)
    parts = [f"# {title} (`{name}`)", escape(summary), said, "## Loss", prose(body)]
    parts += ["## Options", options_table(cls), "## Use", use(name, cls)]
    clashes = [(theirs, clash) for theirs, clash in METHOD_CLASHES.items() if clash.ours == name]
    if clashes:
        rows = [[code(theirs), escape(clash.sentence)] for theirs, clash in clashes]
        parts += ["## Other names", table(["written elsewhere", "here"], rows)]
    return "\n\n".join(parts) + "\n"


_COUPLING = {
    "unit": "that unit alone",
    "batch": "the whole global batch: [two passes](../step.md#two-passes) where it takes several micro-batches",
}


def _need(name: str) -> str:
    return f"{code(name)} ({_NEEDS[name]})" if name in _NEEDS else code(name)


def options_table(cls: type) -> str:
    rows = []
    for name, field, limits, hint in declared(cls):
        choices = getattr(hint, "__args__", ()) if "Literal" in str(hint) else ()
        allowed = ", ".join(code(str(choice)) for choice in choices) or limits.describe().replace("<", "&lt;")
        rows.append([code(name), code(str(field.default)), allowed, escape(limits.doc)])
    return table(["option", "default", "allowed", "meaning"], rows)


def use(name: str, cls: type) -> str:
    """A recipe's section and the same in Python, with the first option at its default."""
    first = next(((key, field.default) for key, field, *_ in declared(cls) if isinstance(field.default, float)), None)
    option = f", {first[0]}: {first[1]:g}" if first else ""
    python = f"{first[0]}{'_' if first[0] == 'lambda' else ''}={first[1]:g}" if first else ""
    return (
        f"```yaml\nmethod: {{name: {name}{option}}}\n```\n\n"
        f"```python\nfrom {cls.__module__} import {cls.__name__}\n\nmethod = {cls.__name__}({python})\n```"
    )


def docstring(cls: type) -> str:
    """The class's own docstring, not its base's, without the indentation of the source."""
    return inspect.cleandoc(cls.__doc__ or "")


def prose(text: str) -> str:
    """A docstring as Markdown: indented paragraphs are formulas and stay as they are, others are escaped."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if paragraph.startswith("    "):
            lines = [line.removeprefix("    ") for line in paragraph.splitlines()]
            parts.append("```text\n" + "\n".join(lines) + "\n```")
        else:
            parts.append(escape(paragraph))
    return "\n\n".join(parts)


def escape(text: str) -> str:
    """Text as Markdown that shows it; what stands between backticks stays code."""
    pieces = text.split("`")
    for number in range(0, len(pieces), 2):
        plain = pieces[number].replace("&", "&amp;").replace("<", "&lt;")
        pieces[number] = re.sub(r"([*_\[\]#])", r"\\\1", plain).replace("|", "&#124;")
    return "`".join(pieces)


def code(text: str) -> str:
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def paper_link(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})" if re.fullmatch(r"\d{4}\.\d{4,5}", number) else number


def table(columns: list[str], rows: list[list[str]]) -> str:
    cells = [[" ".join(cell.split()) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, ["---"] * len(columns), *cells])
