"""The index is made from source; getting a class imports it; a wrong name is answered with a right one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.core.clashes import METHOD_CLASHES, Clash
from align.core.errors import ConfigError
from align.core.options import declared
from align.core.registry import METHODS, REQUIRED, Explained, Registry

GADGET = '''
"""A gadget that cannot be imported, so reading it must not."""
import no_such_module
from align.core.options import option

SIZE = 3

@gadget("alpha", paper="1234.5678", view="pairs", needs={"b", "a"}, coupling="batch")
class Alpha(Base):
    """First line.

    Second line.
    """
    size: int = option(SIZE, at_least=1, doc="size")
    lambda_: float = option(default=0.1, doc="weight")
    name: str = option(doc="name")
    limit: float = option(math.inf, doc="limit")
    constant: int = 3

class Helper:
    """Not registered."""
'''
CHILD = '''
from gadgets.alpha import Alpha

@kinds.gadget("beta", view="lists")
class Beta(Alpha):
    """Child."""
    size: int = option(5, doc="size")
    extra: bool = option(True, doc="extra")
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "gadgets"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "alpha.py").write_text(GADGET)
    (folder / "beta.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "gadgets"]:
        del sys.modules[name]


def test_index_is_read_from_source(package: Path) -> None:
    entries = Registry("gadget", "gadgets").entries()
    assert list(entries) == ["alpha", "beta"]
    alpha, beta = entries.values()
    assert (alpha.module, alpha.class_name, alpha.paper, alpha.view) == ("gadgets.alpha", "Alpha", "1234.5678", "pairs")
    assert alpha.needs == ("a", "b")
    assert alpha.summary == "First line."
    assert alpha.declared == {"coupling": "batch"}
    assert alpha.options == {"size": 3, "lambda": 0.1, "name": REQUIRED, "limit": "math.inf"}
    assert beta.options == {**alpha.options, "size": 5, "extra": True}
    assert alpha.doc == "First line.\n\nSecond line."
    assert alpha.explained["size"] == Explained(3, "int", ">= 1", "size")
    assert beta.explained["size"] == Explained(5, "int", "", "size")
    assert beta.explained["lambda"] == Explained(0.1, "float", "", "weight")
    assert "gadgets.alpha" not in sys.modules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('@gadget("alpha")\nclass Other:\n    pass\n', "two gadgets are called `alpha`"),
        ('NAME = "x"\n@gadget("x" + NAME)\nclass Other:\n    pass\n', "not one id and literals"),
        ("@gadget()\nclass Other:\n    pass\n", "not one id and literals"),
        ("class Other(:\n", "is not Python"),
    ],
)
def test_bad_declarations_are_refused(package: Path, text: str, message: str) -> None:
    (package / "gamma.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Registry("gadget", "gadgets").entries()
    assert "gamma" in str(caught.value)


def test_a_new_file_is_all_it_takes(package: Path) -> None:
    (package / "gamma.py").write_text('@gadget("gamma")\nclass Gamma:\n    """Third."""\n')
    assert Registry("gadget", "gadgets").entries()["gamma"].summary == "Third."


def test_methods_are_indexed_without_torch(root: Path) -> None:
    code = (
        "import sys; from align.core.registry import METHODS; print(*METHODS.entries());"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    wanted = {"sft", "dpo", "ipo", "simpo", "orpo", "rpo", "kto", "bco", "lipo", "tdpo", "dro_v"}
    assert wanted <= set(done.stdout.split())


def test_index_and_classes_agree() -> None:
    for name, entry in METHODS.entries().items():
        cls = METHODS.get(name)
        assert (cls.id, cls.paper, cls.view, tuple(sorted(cls.needs))) == (name, entry.paper, entry.view, entry.needs)
        assert entry.summary
        options = {option: (limits.describe(), limits.doc) for option, _, limits, _ in declared(cls)}
        assert {option: (one.range, one.doc) for option, one in entry.explained.items()} == options
        assert dict(entry.options) == cls().describe()


def test_misspelt_names_get_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"recipe.yaml:3: there is no method `simp`[\s\S]*did you mean `simpo`"
    ) as caught:
        METHODS.get("simp", "recipe.yaml:3")
    assert caught.value.mend


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sigmoid", "write `dpo`"),
        ("kto_pair", "write `kto`"),
        ("bco_pair", "write `bco`"),
        ("DPO", "write `dpo`"),
        ("eta", "option"),
        ("robust", "rdpo"),
        ("irpo", "write `rpo`"),
        ("spo", "several"),
        ("apo", "anchored"),
    ],
)
def test_clashing_names_get_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        METHODS.get(name)


def test_no_clash_shadows_a_method() -> None:
    assert not set(METHOD_CLASHES) & set(METHODS.entries())
    assert all(name == name.lower() for name in METHOD_CLASHES)


def test_a_clash_names_only_what_is_there(package: Path) -> None:
    registry = Registry(
        "gadget", "gadgets", {"old": Clash("it was renamed", "alpha"), "far": Clash("it is far", "omega")}
    )
    assert registry.unknown("old").mend == "write `alpha`"
    assert registry.unknown("far").mend == "`omega` is not here yet"


MINE = """
from torch import Tensor
from align.methods.base import Method, method, option

@method("mine", view="pairs")
class Mine(Method):
    '''Mine.'''
    weight: float = option(1.0, doc="weight")

    def loss(self, pairs) -> Tensor:
        return pairs.delta

class Bare:
    pass

class Child(Mine):
    pass
"""


def test_a_class_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_methods.py").write_text(MINE)
    (tmp_path / "outside_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert METHODS.get("outside_methods:Mine").id == "mine"
    for name, message in {
        "outside_methods:Min": "did you mean `Mine`",
        "outside_methods:Bare": "is not declared",
        "outside_methods:Child": "is not declared",
        "outside_broken:X": "ZeroDivisionError",
        "outside_absent:X": "ModuleNotFoundError",
    }.items():
        with pytest.raises(ConfigError, match=message):
            METHODS.get(name)
