"""`rounds` in a recipe: what each trains on, from where, and that a stopped run goes on with the same."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.core.errors import ConfigError, DataError
from align.core.seeds import derive
from align.data.groups import Group, RowId
from align.data.prepare import open_sources
from align.evaluate.sides import load_side
from align.loops.sera import Sera, bootstrap, pair_margins
from align.recipe import rounds, schema
from align.recipe.rounds import recipes_of
from align.sampling.base import SamplingParams
from align.testing.tiny import random_pairs, save_tiny

ROWS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds of two steps, over two files of pairs."""
    folder = tmp_path_factory.mktemp("rounds")
    save_tiny(folder / "model", "llama", seed=0)
    for name, seed in (("a", 0), ("b", 1)):
        rows = random_pairs(ROWS // 2, seed=seed)
        rows += [{"prompt": "p", "chosen": "", "rejected": "r"}] * (name == "a")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["train", write(folder, "run")]) == 0
    return folder


def write(folder: Path, output: str, **sections: Any) -> str:
    plain = {
        "model": {"name": str(folder / "model")},
        "method": {"name": "dpo", "beta": 0.1},
        "data": {
            "train": [str(folder / "a.jsonl"), str(folder / "b.jsonl")],
            "max_length": 256,
            "max_bad_fraction": 0.5,
        },
        "train": {
            "output_dir": str(folder / output),
            "learning_rate": 3e-3,
            "global_batch_size": 4,
            "max_steps": 2,
            "logging_steps": 1,
        },
        "rounds": {"count": 3, "keep": 0.5, "bootstrap": 0.5, "ensemble": 0.25, "samples": 8, "max_new_tokens": 120},
    }
    for section, values in sections.items():
        plain[section] = {**plain.get(section, {}), **values}
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def by_hand(folder: Path, policy: str) -> dict[str, float]:
    """Margins of all pairs under a policy against the initial model, by the ids of the files' rows."""
    ours, theirs = (load_side(str(folder / name), "float32") for name in (policy, "model"))
    found = {}
    for name in ("a", "b"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        margins = pair_margins(rows, ours, theirs)
        found |= {f"{folder / name}.jsonl:{number + 1}": margins[f"rows row {number}"] for number in range(ROWS // 2)}
    return found


def test_margins_are_those_of_the_last_policy_against_the_initial_model(folder: Path) -> None:
    for number in (2, 3):
        found = read(folder / "run" / f"round-{number}-data" / "margins.json")
        wanted = by_hand(folder, f"run/round-{number - 1}/policy")
        assert len(found) == ROWS
        assert found == pytest.approx(wanted, abs=2e-3)
        assert max(abs(margin) for margin in found.values()) > 0.01


def test_the_largest_are_kept_and_the_third_round_remembers_the_first(folder: Path) -> None:
    last, before = (read(folder / "run" / f"round-{n}-data" / "margins.json") for n in (3, 2))
    mixed = {row: 0.75 * last[row] + 0.25 * before[row] for row in last}
    for number, margins in ((2, before), (3, mixed)):
        data = folder / "run" / f"round-{number}-data"
        kept = {row for file in data.glob("only-*.json") for row in read(file)}
        assert kept == best(margins)
        report = read(data / "report.json")
        assert (report["offline"], report["kept"]) == (ROWS, ROWS // 2)
        assert sum(one["kept"] for one in report["streams"]) == ROWS // 2
        assert [one["rows"] for one in report["streams"]] == [ROWS // 2] * 2


def test_the_margins_before_the_last_are_read_from_their_round(folder: Path, tmp_path: Path) -> None:
    """With those of round 2 turned round and made large, the third keeps what the first policy had lowest."""
    output = tmp_path / "run"
    shutil.copytree(folder / "run", output, symlinks=True)
    before = {row: -100 * margin for row, margin in read(output / "round-2-data" / "margins.json").items()}
    (output / "round-2-data" / "margins.json").write_text(json.dumps(before))
    recipe = schema.load(write(folder, "run"))
    rounds._make(recipe, output / "round-2" / "policy", str(folder / "model"), 3, output / "other", lambda done: None)
    last = read(output / "other" / "margins.json")
    mixed = {row: 0.75 * last[row] + 0.25 * before[row] for row in last}
    assert {row for file in (output / "other").glob("only-*.json") for row in read(file)} == best(mixed) != best(last)


def best(margins: dict[str, float]) -> set[str]:
    return set(sorted(margins, key=lambda row: -margins[row])[: ROWS // 2])


def test_a_round_is_a_run_from_the_last_policy_with_the_initial_reference(folder: Path) -> None:
    for number in (1, 2, 3):
        made = yaml.safe_load((folder / "run" / f"round-{number}" / "recipe.yaml").read_text())
        own = folder / "run" / f"round-{number}-data" / "own.jsonl"
        names = [stream["name"] for stream in made["data"]["train"]]
        assert "rounds" not in made
        if number == 1:
            assert (made["model"]["name"], names) == (str(folder / "model"), [str(folder / f"{n}.jsonl") for n in "ab"])
            continue
        assert made["model"]["name"] == str(folder / "run" / f"round-{number - 1}" / "policy")
        assert made["reference"]["model"] == str(folder / "model")
        assert str(own) == names[-1], "no prompt of twelve has two different finished samples of eight"
        rows = [json.loads(line) for line in own.read_text().splitlines()]
        assert len(rows) == read(own.with_name("report.json"))["own"] == ROWS // 4  # half of those kept
        asked = {json.loads(line)["prompt"] for n in "ab" for line in (folder / f"{n}.jsonl").read_text().splitlines()}
        assert {row["prompt"] for row in rows} <= asked
        log = [json.loads(line) for line in (folder / "run" / f"round-{number}" / "log.jsonl").read_text().splitlines()]
        first = next(line["loss"] for line in log if "loss" in line)
        assert abs(first - math.log(2)) > 1e-3, "the reference is the initial model, and the policy has left it"
    policy = folder / "run" / "policy"
    assert policy.resolve() == (folder / "run" / "round-3" / "policy").resolve()


def test_own_pairs_are_the_extremes_of_the_last_policy(folder: Path) -> None:
    ours, theirs = (load_side(str(folder / name), "float32") for name in ("run/round-1/policy", "model"))
    rows = [json.loads(line) for line in (folder / "run" / "round-2-data" / "own.jsonl").read_text().splitlines()]
    lines = [line for n in "ab" for line in (folder / f"{n}.jsonl").read_text().splitlines()]
    asked = dict.fromkeys(row["prompt"] for row in map(json.loads, lines) if row["chosen"])
    prompts = [Group(RowId("rows", i), prompt, ()) for i, prompt in enumerate(asked)]
    params = SamplingParams(max_new_tokens=120, seed=derive(42, "rounds", 2) >> 11)
    drawn = bootstrap(prompts, ours, theirs, Sera(samples=8), params)
    assert len(drawn) > len(rows) > 1
    assert rows == [one.row for one in sorted(drawn, key=lambda one: -one.margin)[: len(rows)]]


def test_the_same_command_goes_on_where_it_was_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = schema.load(write(folder, "again"))
    runs = recipes_of(recipe, lambda line: None)
    for _ in (1, 2):
        assert main(["train", str(_train_alone(folder, next(runs)))]) == 0
    runs.close()  # stopped before anybody said that round 2 is done; its data are there
    made: list[int] = []
    original = rounds._make

    def noted(recipe: Any, policy: Any, initial: str, number: int, *rest: Any) -> None:
        made.append(number)
        original(recipe, policy, initial, number, *rest)

    monkeypatch.setattr(rounds, "_make", noted)
    assert main(["train", write(folder, "again")]) == 0
    assert made == [3]
    for number in (2, 3):
        for name in ("margins.json", "own.jsonl", "report.json"):
            there, here = (folder / run / f"round-{number}-data" / name for run in ("run", "again"))
            assert there.read_text().replace("/run/", "/again/") == here.read_text()
    ours, theirs = ((folder / run / "policy" / "model.safetensors").read_bytes() for run in ("run", "again"))
    assert ours == theirs
    with pytest.raises(ConfigError, match="another recipe"):
        list(recipes_of(schema.load(write(folder, "again", rounds={"keep": 0.9})), lambda line: None))


def _train_alone(folder: Path, recipe: Any) -> Path:
    """The recipe of a round in a file, as its folder will hold it."""
    from align.core.registry import METHODS
    from align.recipe import rules

    method = rules.build_method(METHODS.get(recipe.method.name), recipe.method.options)
    path = folder / f"{Path(recipe.train.output_dir).name}.yaml"
    path.write_text(rules.to_yaml(recipe, rules.Uses.of(method)))
    return path


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"data": {"pairs": "all"}}, "pairs: all"),
        ({"method": {"name": "kto"}}, "reads singles"),
        ({"method": {"name": "hypo", "beta": 0.1}}, "bootstrap: 0"),
        ({"model": {"peft": {"r": 4}}}, "model.peft"),
        ({"reference": {"kind": "ema"}}, "reference.kind: ema"),
        ({"train": {"resume": "."}}, "train.resume"),
        ({"rounds": {"count": 1}}, "count"),
        ({"rounds": {"bootstrap": 0}}, "rounds.samples` is unused"),
        ({"rounds": {"count": 2}}, "rounds.ensemble` is unused"),
    ],
)
def test_what_rounds_do_not_go_with(folder: Path, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match="rounds") as caught:
        schema.load(write(folder, "refused", **sections))
    assert says in str(caught.value)


def test_the_options_of_sera_are_those_of_the_loop() -> None:
    from align.core.options import declared
    from align.recipe.sections import Rounds

    ours, theirs = ({name: (f.default, limits) for name, f, limits, _ in declared(cls)} for cls in (Rounds, Sera))
    assert theirs.items() <= ours.items()
    assert set(ours) - set(theirs) == {"kind", "count", "max_new_tokens"}


def test_only_some_rows(tmp_path: Path) -> None:
    rows = random_pairs(4, seed=0)
    data, ids = tmp_path / "rows.jsonl", tmp_path / "ids.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids.write_text(json.dumps([f"{data}:4", f"{data}:2"]))
    (opened,) = open_sources([{"name": str(data), "only": str(ids)}], "pairs")
    assert [row["chosen"] for row in opened.source.read(range(2))] == [rows[1]["chosen"], rows[3]["chosen"]]
    assert [str(opened.source.row_id(i)) for i in range(2)] == [f"{data}:2", f"{data}:4"]
    ids.write_text(json.dumps([f"{data}:1", f"{data}:3"]))
    (others,) = open_sources([{"name": str(data), "only": str(ids)}], "pairs")
    assert opened.source.fingerprint != others.source.fingerprint
    for bad, says in (([f"{data}:9"], "rows.jsonl:9"), ([], "no row is chosen"), ({"a": 1}, "no list")):
        ids.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=says):
            open_sources([{"name": str(data), "only": str(ids)}], "pairs")
