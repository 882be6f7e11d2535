"""The order of the floors and the limits of size, checked on the source; each check is also shown an offence."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A package imports packages of a lower number, and itself. The root (`align.__version__`) is below all.
FLOORS = {
    "": -1,
    "core": 0,
    "compat": 1,
    "data": 2,
    "scoring": 3,
    "reference": 4,
    "methods": 5,
    "shaping": 5,
    "sampling": 5,
    "feedback": 6,
    "trainers": 7,
    "worlds": 8,
    "evaluate": 8,
    "decoding": 8,
    "loops": 9,
    "recipe": 10,
    "report": 10,
    "plan": 10,
    "testing": 10,
    "cli": 11,
    "__main__": 12,
}
NOT_BELOW = {"feedback": {"methods", "shaping"}}
METHODS_MAY_IMPORT = ("align.core", "align.methods", "align.scoring.views")
LIBRARIES = {"core": {"numpy"}, "methods": {"torch", "numpy"}}
MAX_LINES, MAX_FUNCTION, MAX_DEPTH = 500, 60, 3

Import = tuple[int, str, str]
"""Line, module, imported name (empty for `import module`)."""


def sources() -> list[tuple[str, ast.Module, str]]:
    """(dotted name, tree, text) of every file of the package."""
    found = []
    for path in sorted((ROOT / "align").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append((name, ast.parse(text), text))
    assert len(found) > 20
    return found


def imports(tree: ast.Module) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + (node.module or ""), alias.name


def floor(module: str) -> str:
    """The package of ours that a dotted name lies in; the empty text for the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def targets(module: str, name: str) -> str:
    """What `from module import name` reaches: `from align import core` reaches `align.core`."""
    return f"{module}.{name}" if module == "align" and name in FLOORS else module


def floor_offences(name: str, tree: ast.Module) -> Iterator[str]:
    here = floor(name)
    if here not in FLOORS:
        yield f"{name}: `{here}` has no floor"
        return
    for line, module, imported in imports(tree):
        if module.startswith("."):
            yield f"{name}:{line} imports relatively"
        if module.partition(".")[0] != "align":
            continue
        reached = targets(module, imported)
        there = floor(reached)
        if there not in FLOORS:
            yield f"{name}:{line} imports `{reached}`, which has no floor"
        elif there != here and (FLOORS[there] >= FLOORS[here] or there in NOT_BELOW.get(here, ())):
            yield f"{name}:{line} imports `{reached}`, which is not below `{here}`"
        elif here == "methods" and not reached.startswith(METHODS_MAY_IMPORT):
            yield f"{name}:{line} imports `{reached}`; methods import {', '.join(METHODS_MAY_IMPORT)}"


def library_offences(name: str, tree: ast.Module) -> Iterator[str]:
    allowed = LIBRARIES.get(floor(name))
    for line, module, _ in imports(tree):
        top = module.partition(".")[0]
        if allowed is not None and top not in {*allowed, "align", *sys.stdlib_module_names}:
            yield f"{name}:{line} imports `{module}`; `{floor(name)}` may import {', '.join(sorted(allowed))}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def privacy_offences(name: str, tree: ast.Module) -> Iterator[str]:
    """Private modules and names of libraries, outside `compat`, imported or reached through an imported module."""
    if floor(name) == "compat":
        return
    libraries = set()
    for line, module, imported in imports(tree):
        top = module.partition(".")[0]
        if top in {"", "align", *sys.stdlib_module_names}:
            continue
        if any(private(part) for part in [*module.split("."), imported]):
            yield f"{name}:{line} imports the private `{module} {imported}`"
        libraries |= {top} if not imported else {imported}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            start: ast.expr = node
            while isinstance(start, ast.Attribute):
                start = start.value
            if isinstance(start, ast.Name) and start.id in libraries:
                yield f"{name}:{node.lineno} reaches the private `{ast.unparse(node)}`"


def size_offences(name: str, tree: ast.Module, text: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > MAX_LINES:
        yield f"{name} has {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{name}:{node.lineno} `{node.name}` has {length} lines"


def class_depths(trees: list[ast.Module]) -> dict[str, int]:
    """Class name -> how many classes of ours stand in its longest chain, itself included."""
    bases = {
        node.name: [base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases]
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def depth(name: str, below: frozenset[str] = frozenset()) -> int:
        known = [base for base in bases[name] if base in bases and base not in below and base != name]
        return 1 + max((depth(base, below | {name}) for base in known), default=0)

    return {name: depth(name) for name in bases}


def test_floors() -> None:
    assert not [offence for name, tree, _ in sources() for offence in floor_offences(name, tree)]


def test_libraries() -> None:
    assert not [offence for name, tree, _ in sources() for offence in library_offences(name, tree)]


def test_private_names_of_libraries_stay_in_compat() -> None:
    assert not [offence for name, tree, _ in sources() for offence in privacy_offences(name, tree)]


def test_sizes() -> None:
    assert not [offence for name, tree, text in sources() for offence in size_offences(name, tree, text)]


def test_class_hierarchies() -> None:
    depths = class_depths([tree for _, tree, _ in sources()])
    assert not {name: depth for name, depth in depths.items() if depth > MAX_DEPTH}


def test_every_floor_of_the_document_is_here() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = next(line for line in text.splitlines() if line.startswith("`cli -> "))
    words = set(order.replace("`", " ").replace(",", " ").translate({123: 32, 125: 32}).split()) - {"->"}
    assert words == set(FLOORS) - {"", "__main__"}


@pytest.mark.parametrize(
    ("check", "name", "code"),
    [
        (floor_offences, "align.data.x", "from align.scoring.views import Pairs"),
        (floor_offences, "align.data.x", "import align.trainers.base"),
        (floor_offences, "align.data.x", "def f():\n    from align import methods"),
        (floor_offences, "align.data.x", "from . import groups"),
        (floor_offences, "align.recipe.x", "import align.testing.tiny"),
        (floor_offences, "align.feedback.x", "import align.methods.base"),
        (floor_offences, "align.methods.x", "from align.scoring.engine import score"),
        (floor_offences, "align.methods.x", "from align.data.groups import Group"),
        (floor_offences, "align.attic.x", ""),
        (floor_offences, "align.cli.x", "import align.attic"),
        (library_offences, "align.core.x", "import torch"),
        (library_offences, "align.methods.x", "from transformers import Trainer"),
        (privacy_offences, "align.data.x", "from datasets.utils import _hidden"),
        (privacy_offences, "align.data.x", "import torch._dynamo"),
        (privacy_offences, "align.data.x", "from trl._compat import y"),
        (privacy_offences, "align.data.x", "import torch\ntorch.nn._functions.x()"),
        (privacy_offences, "align.data.x", "from torch import nn\nnn.modules._y()"),
    ],
)
def test_the_checks_see_an_offence(check, name: str, code: str) -> None:  # type: ignore[no-untyped-def]
    assert list(check(name, ast.parse(code)))


@pytest.mark.parametrize(
    ("check", "name", "code"),
    [
        (
            floor_offences,
            "align.methods.x",
            "from align.scoring.views import Pairs\nfrom align.methods.base import Method",
        ),
        (floor_offences, "align.feedback.x", "import align.sampling.hf"),
        (floor_offences, "align.core.x", "import align\nfrom align import __version__"),
        (library_offences, "align.core.x", "import numpy as np\nimport os.path"),
        (privacy_offences, "align.compat.torch", "from torch import _C"),
        (privacy_offences, "align.data.x", "from torch import __version__\nself._x = os._exit"),
    ],
)
def test_the_checks_let_the_rest_pass(check, name: str, code: str) -> None:  # type: ignore[no-untyped-def]
    assert not list(check(name, ast.parse(code)))


def test_the_size_checks_see_an_offence() -> None:
    text = "def f():\n" + "    x = 1\n" * MAX_LINES
    assert len(list(size_offences("align.x", ast.parse(text), text))) == 2
    chain = "class A(X): pass\nclass B(A): pass\nclass C(B): pass\nclass D(m.C): pass"
    assert class_depths([ast.parse(chain)]) == {"A": 1, "B": 2, "C": 3, "D": 4}


def test_core_imports_no_torch_when_run() -> None:
    modules = [f"align.core.{path.stem}" for path in sorted((ROOT / "align" / "core").glob("*.py"))]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "print(*sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
