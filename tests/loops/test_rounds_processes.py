"""`align loop`: the same artefacts by processes as in one process, and after kills as without."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import ConfigError
from align.recipe.loop_run import locked
from align.recipe.self_play import SelfPlayTrainer
from tests.loops.loop_parts import GOLD, run, start, write

ROOT = Path(__file__).resolve().parents[2]
SECTION = {
    "preset": "iterative_dpo",
    "reference": "previous",
    "prompts": 12,
    "evaluation": {"world": "style", "max_prompts": 8, "max_new_tokens": 24},
}
OTHERWISE = ("log.jsonl", "provenance.json", "report.html", "train.yaml", ".lock", "trainer_state.json", "recipe.yaml")
"""Files with times or machines in them, and what only one of the two ways writes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(tmp_path_factory.mktemp("models"))[0]


def recipe(folder: Path, model: Path, rounds: int, **section: Any) -> Path:
    folder.mkdir()
    given = {**SECTION, "rounds": rounds, **section}
    return write(folder, model, "out", given, feedback=[{"kind": "function", "name": GOLD}], sample={"n": 4})


def artefacts(folder: Path) -> dict[str, bytes]:
    """What a loop made, by its place. Checkpoints are a training's own affair, and so are its records."""
    found = {}
    for file in sorted(folder.rglob("*")):
        place = file.relative_to(folder)
        if not file.is_file() or file.name in OTHERWISE or any(part.startswith("checkpoint-") for part in place.parts):
            continue
        found[place.as_posix()] = file.read_bytes()
    return found


def in_process(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        run(file)
    return artefacts(folder / "out")


def launch(folder: Path, file: Path, *words: str) -> subprocess.Popen[bytes]:
    """`align loop` in a session of its own, so that all its processes can be killed together."""
    command = [sys.executable, "-m", "align", "loop", file.name, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # as many threads as here: sums depend on them
    with open(folder / "said.txt", "ab") as said:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def until(holds: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "it ended before the moment of the kill"
        assert time.monotonic() < end, "the moment of the kill never came"
        time.sleep(0.02)


def finish(folder: Path, file: Path, *words: str) -> None:
    code = launch(folder, file, *words).wait(timeout=900)
    assert code == 0, (folder / "said.txt").read_text()[-3000:]


def same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert any(name.endswith("train/policy/model.safetensors") for name in wanted)


@pytest.mark.timeout(1200)
def test_by_processes_and_in_one_the_artefacts_are_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    wanted = in_process(one, recipe(one, model, 1, evaluation=None), monkeypatch)
    finish(many, recipe(many, model, 1, evaluation=None))
    same(artefacts(many / "out"), wanted)
    # And in Python, with rows in place of a file: the same training, of prompts that were read elsewhere.
    monkeypatch.chdir(tmp_path)
    sections = {"sample": {"max_new_tokens": 24, "chunk": 4, "n": 4}, "data": {"max_length": 128}}
    train = {"global_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "save_steps": 1, "logging_steps": 1}
    trainer = SelfPlayTrainer(
        str(model),
        "iterative_dpo",
        str(one / "prompts.jsonl"),
        "three/out",
        feedback=GOLD,
        loop={"reference": "previous", "prompts": 12, "rounds": 1},
        train=train,
        **sections,
    )
    assert trainer.train() == Path("three/out/round-1/train/policy")
    assert trainer.recipe.loop.preset == "iterative_dpo"


@pytest.mark.timeout(1200)
def test_killed_while_it_samples_and_while_it_trains(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, killed = tmp_path / "one", tmp_path / "killed"
    wanted = in_process(one, recipe(one, model, 2), monkeypatch)
    file = recipe(killed, model, 2)
    output = killed / "out"
    moments = (output / "round-1/samples/part-000000.parquet", output / "round-2/train/checkpoint-1")
    for moment in moments:
        process = launch(killed, file, "--in-process")
        until(moment.exists, process)
        kill(process)
    assert not (output / "round-2" / "round.json").exists()
    before = artefacts(output)
    finish(killed, file, "--in-process")
    same(artefacts(output), wanted)
    chunks = [name for name in before if name.startswith("round-") and name.endswith(".parquet")]
    assert chunks and all(before[name] == wanted[name] for name in chunks), "a finished chunk is never done again"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("words", [(), ("--in-process",)], ids=["by processes", "in process"])
def test_killed_at_ten_random_moments(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    one, killed = tmp_path / "one", tmp_path / "killed"
    wanted = in_process(one, recipe(one, model, 2), monkeypatch)
    file, drawn, output = recipe(killed, model, 2), random.Random(7), killed / "out"
    made = sorted(wanted, key=lambda name: (one / "out" / name).lstat().st_mtime_ns)
    seen: dict[str, bytes] = {}
    for moment in sorted(drawn.sample(range(len(made) - 4), 10)):
        process = launch(killed, file, *words)
        coming = [name for name in made[moment:] if not (output / name).exists()]
        until((output / coming[0]).exists, process)
        time.sleep(drawn.uniform(0, 0.3))
        kill(process)
        now = {name: data for name, data in artefacts(output).items() if name.endswith(".parquet")}
        assert all(now.get(name) == data for name, data in seen.items()), "a finished chunk changed"
        seen = now
    finish(killed, file, *words)
    same(artefacts(output), wanted)


def test_a_second_loop_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=f"process {os.getpid()}")
    with locked(tmp_path / "out", print), refused, locked(tmp_path / "out", print):
        raise AssertionError("two loops at once")
    with locked(tmp_path / "out", print):
        pass


def test_a_stage_that_outlived_its_loop_is_waited_for(tmp_path: Path) -> None:
    """As after a kill of the coordinator alone: the lock is held by a process whose loop is gone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=60)
    (tmp_path / ".lock").write_text(f"{gone.pid}\n")
    held = "import fcntl, time; f = open('.lock', 'a'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(1)"
    stage = subprocess.Popen([sys.executable, "-c", held], cwd=tmp_path, stdout=subprocess.PIPE)
    assert stage.stdout is not None and stage.stdout.readline() == b"1\n"
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert stage.wait(timeout=60) == 0
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert len(said) == 1 and "waiting" in said[0]
