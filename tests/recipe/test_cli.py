"""The command line: what it imports, how it prints errors, that it trains, continues and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import align
from align.cli import train
from align.cli.main import main, show
from align.core.errors import ConfigError, DataError
from align.core.registry import METHODS
from tests.recipe.small import small_run


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "align", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(align.__file__).parents[1]), **environment},
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("words", [["--help"], ["methods"], ["methods", "--json"], ["--version"], ["train", "--help"]])
def test_light_commands_import_nothing_heavy(words: list[str], root: Path) -> None:
    code = (
        "import sys\nfrom align.cli.main import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('HEAVY', *sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    heavy = set(done.stdout.splitlines()[-1].split()[1:])
    assert heavy == set()


def test_methods_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    listed = {entry["id"]: entry for entry in json.loads(capsys.readouterr().out) if entry["kind"] == "method"}
    assert set(listed) == set(METHODS.entries())
    assert listed["dpo"]["options"] == {"beta": 0.1}
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + text for name in listed)
    assert "strength of the KL leash" not in text


def test_a_method_by_name_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "f_dpo", "kto"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "loss = -log sigmoid(beta * phi(h_w) - beta * phi(h_l)), phi(h) = f'(e^h) up to a constant" in lines
    assert "beta 0.1 > 0 strength of the leash; smaller for forward_kl and alpha" in lines
    assert "divergence js js, reverse_kl, forward_kl, alpha, chi2_kl the f that anchors" in lines
    assert any(line.startswith("alpha 0.5 >= 0 and <= 1 of") for line in lines)
    assert any(line.startswith("kto singles") for line in lines) and not any(line.startswith("dpo ") for line in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"align {align.__version__}\n"


def test_our_errors_have_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("model: {nam: x}\n")
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"error: {tmp_path / 'r.yaml'}:1: " in printed.err
    assert "Traceback" not in printed.err
    with pytest.raises(ConfigError):
        main(["train", str(tmp_path / "r.yaml"), "--debug"])


def test_interruption_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.schema, "read", interrupt)
    assert main(["train", "x.yaml"]) == 130


@pytest.mark.parametrize(
    ("rank", "printed", "waits"),
    [(None, "error: bad\n", False), ("0", "error: bad\n", False), ("3", "[rank 3] error: bad\n", True)],
)
def test_rank_0_speaks_first(
    rank: str | None, printed: str, waits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    show(DataError("bad"))
    assert capsys.readouterr().err == printed
    assert bool(waited) == waits


def test_several_devices_start_accelerate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Started(Exception):
        pass

    def execv(path: str, command: list[str]) -> None:
        assert path == command[0]
        started.append(command)
        raise Started

    monkeypatch.setattr(train.schema, "read", lambda *_: (SimpleNamespace(rounds=None), {}))
    monkeypatch.setattr(train, "visible_devices", lambda: 4)
    monkeypatch.setattr(os, "execv", execv)
    for mark in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(mark, raising=False)
    with pytest.raises(Started):
        main(["train", "r.yaml", "train.seed=1", "--train.max_steps", "3"])
    (command,) = started
    assert command[-7:] == ["-m", "align", "train", "r.yaml", "train.seed=1", "--train.max_steps", "3"]
    assert command[command.index("--num_processes") + 1] == "4"
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(AttributeError):  # goes on to train the stand-in for a recipe
        main(["train", "r.yaml"])
    assert len(started) == 1


def test_the_launcher_knows_the_command() -> None:
    from accelerate.commands.launch import launch_command_parser

    command = train.launch_command(2, "r.yaml", ["--train.seed", "1"])
    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.num_processes, parsed.multi_gpu, parsed.module) == (2, True, True)
    assert parsed.training_script == "align"
    assert parsed.training_script_args == ["train", "r.yaml", "--train.seed", "1"]


def test_from_a_recipe_to_a_model_and_back(tmp_path: Path) -> None:
    """Trains, continues, refuses another recipe, and runs from outside the repository."""
    recipe = small_run(tmp_path / "d", steps=4)
    first = run("train", str(recipe), "train.save_steps=2", "--train.logging_steps", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("done: ") and first.stdout.count("\n") == 1
    assert "step 1/4: loss 0.6931, " in first.stderr and "pairs/s" in first.stderr
    assert (tmp_path / "d" / "run" / "report.html").is_file()
    folder = tmp_path / "d" / "run"
    assert (folder / "policy" / "model.safetensors").is_file()
    assert {"recipe.yaml", "provenance.json", "checkpoint-2", "checkpoint-4"} <= {
        path.name for path in folder.iterdir()
    }
    assert len({file.stat().st_mode for file in (folder / "policy").iterdir()}) == 1  # a server may be another user
    weights = (folder / "policy" / "model.safetensors").read_bytes()

    again = run("train", str(folder / "recipe.yaml"), "train.logging_steps=2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (folder / "policy" / "model.safetensors").read_bytes() == weights

    other = run("train", str(folder / "recipe.yaml"), "method.beta=0.3", cwd=tmp_path)
    assert other.returncode == 2
    assert "`method.beta`: 0.1 there, 0.3 now" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--cpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"],
        ["torch.distributed.run", "--nproc_per_node=2"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_under_a_launcher(launcher: list[str], tmp_path: Path) -> None:
    """The same line trains; an error that all ranks share is printed once, by whichever process speaks for it."""
    recipe = small_run(tmp_path / "d", steps=2)

    def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *launcher, "-m", "align", "train", str(recipe), *overrides],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(align.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            timeout=300,
            check=False,
        )

    done = launch("--train.logging_steps", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1
    assert (tmp_path / "d" / "run" / "checkpoint-2" / "manifest.json").is_file()
    wrong = launch("--train.seeed", "1")
    assert wrong.returncode != 0
    assert wrong.stderr.count("has no option `seeed`") == 1
