"""Things found by being there: an index of a package's decorated classes, made without importing them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align.core.clashes import METHOD_CLASHES, Clash
from align.core.errors import ConfigError, suggestion
from align.core.options import BOUNDS, public_name

REQUIRED = "(required)"
"""The default shown for an option that has none."""


@dataclass(frozen=True, slots=True)
class Explained:
    """An option as its declaration has it: the range in words (`> 0 and <= 1`), the type as it is written."""

    default: Any
    type: str
    range: str
    doc: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What the source of a registered class says of it.

    Attributes:
        id: the name used in recipes.
        module: where it is defined.
        class_name: its class there.
        options: public option name -> default (the source text where the default is not a literal).
        summary: the first line of its docstring. doc: all of it.
        explained: public option name -> what its declaration says.
        declared: the other keyword arguments of its decorator.
    """

    id: str
    module: str
    class_name: str
    paper: str = ""
    view: str = ""
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    declared: Mapping[str, Any] = field(default_factory=dict)
    doc: str = ""
    explained: Mapping[str, Explained] = field(default_factory=dict)


class Registry:
    """Classes of one kind: those of a package, found by their decorator `@kind("id", ...)`, and users' own.

    Args:
        kind: the decorator's name, for example `method`.
        package: the package whose files are searched, for example `align.methods`.
        clashes: names that mean something else elsewhere, in lower case.
    """

    def __init__(self, kind: str, package: str, clashes: Mapping[str, Clash] | None = None) -> None:
        self.kind, self.package = kind, package
        self._clashes = dict(clashes or {})

    def entries(self) -> dict[str, Entry]:
        """id -> entry, sorted by id. Reads source files only.

        Raises:
            ConfigError: two classes share an id, or a declaration is not written in literals.
        """
        return dict(self._index)

    def get(self, name: str, where: str = "") -> Any:
        """Import and return the class of an id, or of `my_pkg.my_file:MyClass`.

        Raises:
            ConfigError: there is no such id, module or class, or the class is not declared as of this kind.
        """
        if ":" in name:
            return self._users(name, where)
        if name not in self._index:
            raise self.unknown(name, where)
        entry = self._index[name]
        return getattr(importlib.import_module(entry.module), entry.class_name)

    def unknown(self, name: str, where: str = "") -> ConfigError:
        """The error for a name that is not registered, with the right name where the field uses this one otherwise."""
        clash = self._clashes.get(name.lower().replace("-", "_"))
        if name.lower() in self._index:
            mend = f"write `{name.lower()}`"
        elif clash and clash.ours:
            mend = f"write `{clash.ours}`" if clash.ours in self._index else f"`{clash.ours}` is not here yet"
        else:
            mend = "" if clash else suggestion(name, self._index)
        return ConfigError(
            f"there is no {self.kind} `{name}`",
            where=where,
            why=clash.sentence if clash else "",
            mend=mend or f"`align {self.kind}s` lists what there is",
        )

    @cached_property
    def _index(self) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for entry in self._scan():
            if entry.id in found:
                raise ConfigError(
                    f"two {self.kind}s are called `{entry.id}`",
                    where=entry.module,
                    why=f"the other is in {found[entry.id].module}",
                    mend="rename one of them",
                )
            found[entry.id] = entry
        return dict(sorted(found.items()))

    def _scan(self) -> Iterator[Entry]:
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            paths = [path for path in sorted(Path(folder).glob("*.py")) if path.stem != "__init__"]
            modules = {(name := f"{self.package}.{path.stem}"): _Module(path, name) for path in paths}
            for module in modules.values():
                yield from module.entries(self.kind, modules)

    def _users(self, name: str, where: str) -> Any:
        module_name, _, class_name = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever a user's file raises is theirs to see
            raise ConfigError(
                f"cannot import `{module_name}` for {self.kind} `{name}`",
                where=where,
                why=f"{type(error).__name__}: {error}",
                mend="run from the folder that holds it, or install it",
            ) from error
        cls = getattr(module, class_name, None)
        if not isinstance(cls, type):
            classes = [key for key, value in vars(module).items() if isinstance(value, type) and "id" in vars(value)]
            raise ConfigError(
                f"`{module_name}` has no class `{class_name}`", where=where, mend=suggestion(class_name, classes)
            )
        if not vars(cls).get("id"):
            raise ConfigError(f"`{name}` is not declared", where=where, mend=f'put @{self.kind}("...") above the class')
        return cls


class _Module:
    """One parsed file."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise ConfigError("is not Python", where=f"{path}:{error.lineno}", why=error.msg) from error
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.constants = {
            node.targets[0].id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        self.imports = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }

    def entries(self, kind: str, siblings: Mapping[str, _Module]) -> Iterator[Entry]:
        for node in self.classes.values():
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and _called(call) == kind:
                    yield self._entry(node, call, self.options(node, siblings))

    def options(self, node: ast.ClassDef, siblings: Mapping[str, _Module]) -> dict[str, Explained]:
        """Options of a class: those of its bases in the same package first, then its own."""
        found: dict[str, Explained] = {}
        for base in node.bases:
            name = base.id if isinstance(base, ast.Name) else ""
            if name in self.classes:
                found |= self.options(self.classes[name], siblings)
            elif name in self.imports:
                module, original = self.imports[name]
                other = siblings.get(module)
                if other and original in other.classes:
                    found |= other.options(other.classes[original], siblings)
        for line in node.body:
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and _called(line.value) == "option"
            ):
                found[public_name(line.target.id)] = self.explained(line.annotation, line.value)
        return found

    def explained(self, annotation: ast.expr, node: ast.AST | None) -> Explained:
        arguments = node.args if isinstance(node, ast.Call) else []
        words = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
        default = arguments[0] if arguments else words.get("default")
        bounds = [f"{sign} {self.literal(words[name])}" for name, sign in BOUNDS.items() if name in words]
        return Explained(
            default=REQUIRED if default is None else self.literal(default),
            type=ast.unparse(annotation),
            range=" and ".join(bounds),
            doc=str(self.literal(words["doc"])) if "doc" in words else "",
        )

    def literal(self, value: ast.expr) -> Any:
        """What an expression is, a constant of the file by its value; its source where it is more than that."""
        if isinstance(value, ast.Name):
            value = self.constants.get(value.id, value)
        try:
            return ast.literal_eval(value)
        except ValueError:
            return ast.unparse(value)

    def _entry(self, node: ast.ClassDef, call: ast.Call, options: dict[str, Explained]) -> Entry:
        where = f"{self.path}:{call.lineno}"
        try:
            (id_,) = (ast.literal_eval(argument) for argument in call.args)
            declared = {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
        except ValueError as error:
            raise ConfigError(
                f"the declaration of `{node.name}` is not one id and literals",
                where=where,
                why="the index is made without importing the file",
                mend="write the id, paper, view and needs out as literals",
            ) from error
        doc = (ast.get_docstring(node) or "").strip()
        return Entry(
            id=id_,
            module=self.name,
            class_name=node.name,
            paper=str(declared.pop("paper", "")),
            view=str(declared.pop("view", "")),
            needs=tuple(sorted(declared.pop("needs", ()))),
            options={name: one.default for name, one in options.items()},
            summary=doc.partition("\n")[0],
            declared=declared,
            doc=doc,
            explained=options,
        )


def _called(node: ast.AST | None) -> str:
    """The last name of what a call calls: `option` for `option(...)` and for `base.option(...)`."""
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


METHODS = Registry("method", "align.methods", METHOD_CLASHES)
"""The training methods. Reading its entries imports nothing; `get` imports one method's file, hence torch."""

WORLDS = Registry("world", "align.worlds")
"""The worlds of the demo and of comparisons."""

LOOPS = Registry("loop", "align.loops.presets")
"""The loops of rounds that a recipe can name."""
