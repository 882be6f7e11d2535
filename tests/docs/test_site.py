"""The site builds without a warning, which a dead link or anchor is; what is generated says what the code says."""

from __future__ import annotations

import argparse
import html
import importlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the documentation tools are in the extra `docs`")

import markdown
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from align.cli.main import COMMANDS
from align.core.options import declared
from align.core.registry import METHODS
from docs.hooks.text import prose, table
from tests.docs.pages import DOCS, ROOT

OUTSIDE = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\s>]*", re.I)


def build_site(docs: Path, site: Path) -> None:
    build(load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(site)))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build_site(DOCS, folder)
    return folder


def text_of(page: Path) -> str:
    """A page as a reader sees it, spaces made one."""
    inside = re.search(r"<article.*?</article>", page.read_text(encoding="utf-8"), re.S)
    assert inside, page
    plain = re.sub(r"<[^>]+>", "", re.sub(r"<(?:td|th|p|br|li)\b[^>]*>", " ", inside[0]))
    return " ".join(html.unescape(plain).split())


def test_every_method_has_a_page_that_says_what_its_file_says(site):
    assert {page.stem for page in (site / "methods").glob("*.html")} == {"index", *METHODS.entries()}
    for name, entry in METHODS.entries().items():
        text = text_of(site / "methods" / f"{name}.html")
        cls = METHODS.get(name)
        for word in " ".join((cls.__doc__ or "").split()).replace("`", "").replace("Source: ", "").split(" "):
            assert word in text, f"{name}: `{word}` of the docstring is not on the page"
        for option, field, limits, _ in declared(cls):
            assert re.search(rf"{option} \S* ?{re.escape(str(field.default))}", text), f"{name}: option {option}"
            assert limits.doc.replace("`", "") in text
            assert limits.describe() in text
        assert f"arXiv {entry.paper}" in text if entry.paper else True


def arguments_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from arguments_of(below)
        elif "--help" not in action.option_strings:
            yield action


def test_every_command_has_its_options_on_its_page(site):
    for name in COMMANDS:
        parser = argparse.ArgumentParser(prog=f"align {name}")
        importlib.import_module(f"align.cli.{name}").configure(parser)
        text = text_of(site / "commands" / f"{name}.html")
        for action in arguments_of(parser):
            says = " ".join((action.help or "").replace("`", "").replace("%%", "%").split())
            assert says, f"`align {name}`: {action.option_strings or action.dest} has no help"
            assert says in text, f"{name}: {says}"
            assert all(flag in text for flag in action.option_strings)


def test_text_of_the_source_is_shown_and_not_interpreted():
    text = "log pi(y_t | x, y_<t) * beta * _h_ [P], `a_b` & <script>alert(1)</script>\n\n    m = a_w * b_l * c  # <t\n"
    shown = markdown.markdown(prose(text), extensions=["pymdownx.superfences"])
    assert "<script" not in shown and "<em>" not in shown
    plain = html.unescape(re.sub(r"<[^>]+>", "", shown))
    assert "log pi(y_t | x, y_<t) * beta * _h_ [P], a_b & <script>alert(1)</script>" in plain
    assert "m = a_w * b_l * c  # <t" in plain
    row = markdown.markdown(table(["x"], [["`a|b` and c"]]), extensions=["tables"])
    assert "<code>a|b</code> and c" in row


def test_nothing_is_fetched_from_outside(site):
    found = {
        (page.relative_to(site).as_posix(), hit)
        for page in site.rglob("*.html")
        for hit in OUTSIDE.findall(page.read_text(encoding="utf-8"))
    }
    assert not found
    styles = "".join(sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css"))
    assert not re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)", styles)


BROKEN = {
    "step.md": "[a page that is not there](nowhere.md)",
    "errors.md": "[a word that is not there](glossary.md#no-such-word)",
    "commands/train.md": "[a method that is not registered](../methods/no_such_method.md)",
    "unlisted.md": "# A page that the navigation does not name",
}


def test_dead_links_and_unlisted_pages_fail_the_build(tmp_path, caplog):
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs)
    for page, text in BROKEN.items():
        with (docs / page).open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    with caplog.at_level(logging.INFO), pytest.raises(Abort, match=f"{len(BROKEN)} warnings in strict mode"):
        build_site(docs, tmp_path / "site")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for what in ("nowhere.md", "no-such-word", "no_such_method.md", "unlisted.md"):
        assert any(what in line for line in said), said
