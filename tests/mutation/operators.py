"""Small faults of the kinds that losses have in practice, one at every place of a file where it can stand.

`Source.mutants` lists them; `Source.compile` makes the code of one. Texts are left alone: docstrings, annotations,
messages of errors, an option's `doc`. So are declarations that are names only (`id`, `paper`, `view`).
"""

from __future__ import annotations

import ast
import copy
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutation.faults import OPERATORS, Place

Way = tuple[tuple[str, int | None], ...]
"""From the root of a tree to a node: names of fields, with an index where the field is a list."""

NOT_METHODS = ("__init__", "base", "claim", "evaluate")
"""Files of `align/methods` that hold no method and no stage of one."""

_SKIPPED_KEYWORDS = {"doc", "id", "paper", "view", "why", "mend", "where"}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        module: the file's name without `.py`.
        place: the qualified name of the function it is in, or of the class (empty: the module) for a declaration.
        inside: whether it is in a function's body, which alone can be replaced by its code.
        operator: the kind of fault, a key of `OPERATORS`.
        before, after: source of the replaced expression or statement, and of what stands there instead.
        number: 1 for the second place of equal text in one function, and so on.
    """

    module: str
    place: str
    inside: bool
    operator: str
    line: int
    before: str
    after: str
    number: int
    _path: Way = field(repr=False)
    _new: ast.AST = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """What names the fault as long as its function stays as it is; no line numbers."""
        many = f" #{self.number}" if self.number else ""
        return f"{self.module}.{self.place} {self.operator}: {self.before} -> {self.after}{many}"


class Source:
    """A parsed file and its mutants."""

    def __init__(self, name: str, text: str, filename: str = "") -> None:
        self.name, self.filename = name, filename or f"<{name}>"
        self.tree = ast.parse(text)
        self.mutants = tuple(self._number())

    @classmethod
    def of(cls, path: Path) -> Source:
        return cls(path.stem, path.read_text(encoding="utf-8"), str(path))

    def compile(self, mutant: Mutant) -> types.CodeType:
        """The module's code with the fault in it."""
        tree = copy.deepcopy(self.tree)
        node: ast.AST = tree
        *way, (name, index) = mutant._path
        for step, place in way:
            child = getattr(node, step)
            node = child if place is None else child[place]
        if index is None:
            setattr(node, name, mutant._new)
        else:
            getattr(node, name)[index] = mutant._new
        return compile(ast.fix_missing_locations(tree), self.filename, "exec")

    def _number(self) -> Iterator[Mutant]:
        seen: Counter[tuple[str, ...]] = Counter()
        made: set[tuple[object, str]] = set()
        for place, path in _places(self.tree):
            before = _text(place.node)
            for operator, faults in OPERATORS.items():
                for new in faults(place):
                    after = _text(new)
                    if after == before or (path, after) in made:
                        continue
                    made.add((path, after))
                    text = (place.name, operator, before, after)
                    yield Mutant(
                        self.name,
                        place.name,
                        place.function,
                        operator,
                        place.line,
                        before,
                        after,
                        seen[text],
                        path,
                        new,
                    )
                    seen[text] += 1


def method_files(folder: Path) -> list[Path]:
    """The files of `align/methods` that hold methods or their stages."""
    return [path for path in sorted(folder.glob("*.py")) if path.stem not in NOT_METHODS]


def _places(tree: ast.Module) -> Iterator[tuple[Place, Way]]:
    options = {
        line.target.id
        for cls in tree.body
        if isinstance(cls, ast.ClassDef)
        for line in cls.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and ast.unparse(line.annotation) in ("float", "int")
    }

    def visit(
        node: ast.AST,
        above: tuple[ast.AST, ...],
        names: tuple[str, ...],
        inside: bool,
        path: Way,
    ) -> Iterator[tuple[Place, Way]]:
        if path and isinstance(node, ast.expr | ast.stmt):
            yield Place(node, above, ".".join(names), inside, frozenset(options)), path
        for name, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or _is_text(node, name, child):
                    continue
                own, within = names, inside
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and name == "body" and not inside:
                    own, within = (*names, node.name), isinstance(node, ast.FunctionDef)
                yield from visit(child, (*above, node), own, within, (*path, (name, index)))

    yield from visit(tree, (), (), False, ())


def _text(node: ast.AST) -> str:
    """A node's source on one line, without the sentences of options."""
    short = copy.copy(node)
    if isinstance(short, ast.Call):
        short.keywords = [word for word in short.keywords if word.arg not in _SKIPPED_KEYWORDS]
    return " ".join(ast.unparse(ast.fix_missing_locations(short)).split())


def _is_text(parent: ast.AST, name: str, child: ast.AST) -> bool:
    """Whether a child is prose, a type, an import or a name given by its position, and stays as it is."""
    if isinstance(child, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr):
        return True
    if name in ("annotation", "returns", "bases", "type_params") or isinstance(child, ast.expr_context):
        return True
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True
    if isinstance(child, ast.keyword) and child.arg in _SKIPPED_KEYWORDS:
        return True
    return isinstance(parent, ast.If) and "TYPE_CHECKING" in ast.unparse(parent.test)
