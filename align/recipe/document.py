"""A YAML document as a tree that knows its lines: strict YAML 1.2 scalars, no tags, no merge keys, no doubled keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from align.core.errors import AlignError, ConfigError, raise_all


@dataclass(slots=True)
class Item:
    """A value of the document, and where it stands.

    `value` is a dict of items, a list of items, or a scalar. `text` is what was written, where that was a plain scalar.
    """

    value: Any
    where: str
    text: str | None = None

    def plain(self) -> Any:
        """The value with all items below replaced by theirs."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    """Scalars as in YAML 1.2's core schema: `1e-6` is a number, `no` and `2024-01-01` are text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_SCALARS = {
    "null": re.compile(r"^(~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^[-+]?[0-9]+$"),
    "float": re.compile(rf"^({_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
}
for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Item:
    """Parse a recipe file and lay overrides over it.

    Raises:
        ConfigError: the file cannot be read or is not such a document; several faults as an `ErrorList`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the recipe cannot be read",
            where=str(path),
            why=str(error),
            mend="give the path of a YAML file; `align recipes copy NAME FILE` makes one",
        ) from error
    root = parse(text, str(path))
    if root.value is None:
        root.value = {}
    if not isinstance(root.value, dict):
        raise ConfigError("a recipe is a mapping of sections", where=root.where, mend="begin with `model:`")
    raise_all(override(root, overrides))
    return root


def override(root: Item, words: Sequence[str]) -> list[AlignError]:
    """Lay `a.b=1`, `--a.b=1` or `--a.b`, `1` over a recipe, in place; return the faults."""
    errors: list[AlignError] = []
    for assignment in _assignments(words, errors):
        _apply(root, *assignment, errors)
    return errors


def parse(text: str, source: str, numbered: bool = True) -> Item:
    """Parse one document; `numbered` says whether `source` has lines to point at."""
    errors: list[AlignError] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and numbered else ""
        raise ConfigError(f"is not YAML: {error.problem}", where=source + line, why=error.context or "") from error
    except yaml.YAMLError as error:
        raise ConfigError("is not YAML", where=source, why=str(error)) from error
    if node is None:
        return Item(None, source, "")
    item = _Reader(source, numbered, errors).item(node)
    raise_all(errors)
    return item


class _Reader:
    """Turns composed nodes into items and collects what is not allowed."""

    def __init__(self, source: str, numbered: bool, errors: list[AlignError]) -> None:
        self.source, self.numbered, self.errors = source, numbered, errors
        self.above: list[yaml.Node] = []

    def item(self, node: yaml.Node) -> Item:
        where = self.where(node)
        if any(node is parent for parent in self.above):
            self.errors.append(ConfigError("an alias contains itself", where=where))
            return Item(None, where)
        self.above.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                self.expect(node, "map")
                return Item(dict(self.pairs(node)), where)
            if isinstance(node, yaml.SequenceNode):
                self.expect(node, "seq")
                return Item([self.item(child) for child in node.value], where)
            return self.scalar(node)
        finally:
            self.above.pop()

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, Item]]:
        lines: dict[str, str] = {}
        for key, value in node.value:
            where = self.where(key)
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                self.errors.append(ConfigError("a key is one word", where=where, mend="write the keys out"))
            elif key.value in lines:
                self.errors.append(
                    ConfigError(
                        f"`{key.value}` is there twice",
                        where=where,
                        why=f"first at {lines[key.value]}",
                        mend="keep one",
                    )
                )
            else:
                lines[key.value] = where
                item = self.item(value)
                item.where = where
                yield key.value, item

    def scalar(self, node: yaml.Node) -> Item:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind == "str" or kind not in _SCALARS:
            self.expect(node, "str")
            return Item(node.value, self.where(node))
        if kind == "null":
            return Item(None, self.where(node), node.value)
        if kind == "bool":
            return Item(node.value.lower() == "true", self.where(node), node.value)
        number = int if kind == "int" else float
        plain = node.value.lower().replace(".inf", "inf").replace(".nan", "nan")
        try:
            return Item(number(plain), self.where(node), node.value)
        except ValueError:  # a tag such as `!!int x`
            self.errors.append(ConfigError(f"`{node.value}` is no {kind}", where=self.where(node)))
            return Item(None, self.where(node))

    def expect(self, node: yaml.Node, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            self.errors.append(ConfigError(f"the tag `{node.tag}` is not allowed", where=self.where(node)))

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.numbered else self.source


def _assignments(words: Sequence[str], errors: list[AlignError]) -> Iterator[tuple[str, str]]:
    """Read `a.b=1`, `--a.b=1` and `--a.b 1` into (key, text)."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--") and rest:
            text, equals = rest.pop(0), "="
        if equals and key and all(key.split(".")):
            yield key, text
        else:
            errors.append(
                ConfigError(f"`{word}` is not an override", where="command line", mend="write key.option=value")
            )


def _apply(root: Item, key: str, text: str, errors: list[AlignError]) -> None:
    where = f"argument {key}={text}"
    try:
        value = parse(text, where, numbered=False)
    except ConfigError as error:
        errors.append(error)
        return
    *parents, last = key.split(".")
    item = root
    for name in parents:
        below = _below(item, name)
        if below is None:
            below = Item({}, where)
            if not _put(item, name, below, errors):
                return
        item = below
    _put(item, last, value, errors)


def _below(item: Item, name: str) -> Item | None:
    if isinstance(item.value, dict):
        found = item.value.get(name)
    elif isinstance(item.value, list) and name.isdecimal() and int(name) < len(item.value):
        found = item.value[int(name)]
    else:
        return None
    return found if found is not None and isinstance(found.value, (dict, list)) else None


def _put(item: Item, name: str, value: Item, errors: list[AlignError]) -> bool:
    if isinstance(item.value, dict):
        item.value[name] = value
        return True
    if isinstance(item.value, list) and name.isdecimal() and int(name) < len(item.value):
        item.value[int(name)] = value
        return True
    errors.append(
        ConfigError(
            f"a list of {len(item.value)} has no `{name}`", where=value.where, mend="give a number below, or the list"
        )
    )
    return False
