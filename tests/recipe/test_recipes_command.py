"""`align recipes list | show | copy`, in process, and the generated reference of options."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.cli.main import main
from align.core.options import declared
from align.recipe import library, reference, schema, sections

Captured = pytest.CaptureFixture[str]


def test_list(capsys: Captured) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in found} >= {"mistral-7b/dpo-qlora", "pythia-2.8b/dpo", "gemma-2-9b-it/simpo"}
    assert all(Path(one["path"]).is_file() and one["title"] for one in found)
    assert main(["recipes", "list"]) == 0
    said = capsys.readouterr().out
    assert all(one["name"] in said and one["title"] in said for one in found) and "zero3.yaml" in said


def test_show(capsys: Captured, tmp_path: Path) -> None:
    name = "mistral-7b/dpo-qlora"
    assert main(["recipes", "show", name]) == 0
    said = capsys.readouterr().out
    assert said == library.find(name).text and "provenance:" in said and "extends:" in said
    assert main(["recipes", "show", name, "--resolved"]) == 0
    plain = yaml.safe_load(capsys.readouterr().out)
    assert "extends" not in plain and plain["train"]["global_batch_size"] == 128
    assert plain["train"]["seed"] == 42 and plain["provenance"]["claim"]
    assert main(["recipes", "show", name, "--resolved", "--json"]) == 0
    assert yaml.safe_load(json.loads(capsys.readouterr().out)["text"]) == plain
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: {name}\ntrain: {{output_dir: o}}\n")
    assert main(["recipes", "show", str(mine), "--resolved"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["output_dir"] == "o"


def test_copy_never_overwrites_unless_forced(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "new" / "my.yaml"
    assert main(["recipes", "copy", "llama-3-8b/simpo", str(file)]) == 0
    assert file.read_text() == library.find("llama-3-8b/simpo").text
    assert schema.load(file).method.name == "simpo"  # its base is a shipped name, so the copy stands anywhere
    file.write_text("mine")
    assert main(["recipes", "copy", "llama-3-8b/dpo", str(file)]) == 2
    said = capsys.readouterr().err
    assert "my.yaml: the file is there already" in said and "--force" in said and file.read_text() == "mine"
    assert main(["recipes", "copy", "llama-3-8b/dpo", str(file), "--force"]) == 0
    assert file.read_text() != "mine"
    assert main(["recipes", "copy", "llama-3-8b/dpo", str(tmp_path)]) == 2
    assert main(["recipes", "copy", "llama-3-8b/dpp", str(tmp_path / "x.yaml")]) == 2
    assert "did you mean `llama-3-8b/dpo`" in capsys.readouterr().err


def test_listing_imports_nothing_heavy(root: Path) -> None:
    code = (
        "import sys\nfrom align.cli.main import main\n"
        "main(['recipes', 'list'])\nmain(['recipes', 'show', 'pythia-2.8b/dpo'])\n"
        "print('HEAVY', *sorted({'torch', 'transformers', 'datasets', 'peft', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "HEAVY"


def test_the_reference_names_every_option_with_its_default() -> None:
    text = reference.markdown()
    classes = [cls for cls in vars(sections).values() if dataclasses.is_dataclass(cls) and isinstance(cls, type)]
    for cls in classes:
        for name, field, limits, _ in declared(cls):
            line = next(
                line
                for line in text.splitlines()
                if line.startswith(f"| `{name}` ") and limits.doc.replace("|", "\\|") in line
            )
            default = field.default
            if default is dataclasses.MISSING:
                assert "(required)" in line
            elif isinstance(default, float):
                assert f"`{default:g}`" in line
            elif isinstance(default, str) and default:
                assert f"`{default}`" in line
            elif default is None:
                assert "| null |" in line
            if limits.describe():
                assert limits.describe() in line
    assert "`nf4` or `fp4`" in text and "mistral-7b/orpo" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {5, 3}
