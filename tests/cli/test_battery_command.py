"""`align test`: each check by name and time; a method with a fault fails, and says which check found it."""

from __future__ import annotations

import json

import pytest

from align.cli.main import main

SOUND = '''
from torch.nn.functional import logsigmoid
from align.methods.base import Method, method, option

@method("mine", paper="", view="pairs")
class Mine(Method):
    """A sound method."""
    beta: float = option(1.0, above=0, doc="scale")

    def loss(self, pairs):
        return -logsigmoid(self.beta * (pairs.chosen.sum_logp - pairs.rejected.sum_logp))

@method("lazy", paper="", view="pairs")
class Lazy(Mine):
    """Divides by the batch: not a value per unit."""

    def loss(self, pairs):
        values = super().loss(pairs)
        return values - values.mean()

@method("rises", paper="", view="pairs")
class Raises(Mine):
    def loss(self, pairs):
        raise RuntimeError("no loss here")

class Undeclared:
    pass
'''


@pytest.fixture
def methods(tmp_path, monkeypatch):
    (tmp_path / "battery_methods.py").write_text(SOUND)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "battery_methods"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["test", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_built_in_method_passes_with_model(capsys):
    code, out, _ = run(capsys, "dpo", "--json")
    report = json.loads(out)
    assert code == 0 and report["ok"] and report["method"] == "dpo"
    names = {check["name"] for check in report["checks"]}
    assert names >= {"finite differences", "padding", "extremes", "options", "golden step", "packing", "resume"}
    assert all(check["ok"] and not check["problem"] for check in report["checks"])
    assert all(check["seconds"] > 0 for check in report["checks"] if check["name"] != "options")


def test_quick_leaves_the_model_out_and_prints_a_line_a_check(capsys, methods):
    code, out, _ = run(capsys, f"{methods}:Mine", "--quick")
    lines = out.splitlines()
    assert code == 0
    assert sum("finite differences" in line for line in lines) == 2  # defaults, numbers moved
    assert all(line.startswith("ok  ") for line in lines[:-1])
    assert [line for line in lines if "options (beta)" in line] == ["ok   options (beta)"]
    assert not any("golden step" in line for line in lines)
    assert lines[-1].startswith(f"{methods}:Mine: all ") and lines[-1].endswith(" s")


def test_a_faulty_method_fails(capsys, methods):
    code, out, _ = run(capsys, f"{methods}:Lazy", "--quick")
    assert code == 1
    assert any(line.startswith("FAIL splitting (defaults)") for line in out.splitlines())
    assert "checks fail" in out.splitlines()[-1]
    code, out, _ = run(capsys, f"{methods}:Raises", "--quick", "--json")
    report = json.loads(out)
    assert code == 1 and not report["ok"]
    assert any("RuntimeError: no loss here" in check["problem"] for check in report["checks"])


def test_errors_of_the_user(capsys, methods):
    for name, said in (
        ("dop", "there is no method `dop`"),
        ("nowhere.at_all:Mine", "cannot import `nowhere.at_all`"),
        (f"{methods}:Min", "`Mine`"),
        (f"{methods}:Undeclared", "is not declared"),
    ):
        code, out, error = run(capsys, name, "--quick")
        assert code == 2 and said in error and out == "" and "Traceback" not in error


def test_without_a_method_it_explains_itself(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert "align test my_pkg.my_file:MyMethod" in out and "simpo" in out and "stopped and resumed" in out
