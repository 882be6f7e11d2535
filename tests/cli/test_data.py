"""`align data` in process: what it prints, its exit codes, and what it says of a user's mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.data.jsonl import JsonlFile
from align.testing.tiny import random_pairs, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 100 good pairs, 10 held-out ones of which 2 are in train, and a file with 3 bad rows of 50."""
    folder = tmp_path_factory.mktemp("data-cli")
    save_tiny(folder / "model")
    train, held_out, faulty = random_pairs(100, seed=1), random_pairs(8, seed=2), random_pairs(50, seed=3)
    faulty[4]["chosen"] = faulty[4]["rejected"]
    faulty[9]["rejected"] = ""
    for name, rows in (("train", train), ("held_out", [*held_out, *train[:2]]), ("faulty", faulty)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "faulty.jsonl", "a") as file:
        file.write("{not json\n")
    recipe = {
        "model": {"name": str(folder / "model")},
        "method": {"name": "dpo"},
        "data": {"train": [str(folder / "train.jsonl")], "eval": [str(folder / "held_out.jsonl")], "max_length": 512},
        "train": {"output_dir": str(folder / "run")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_a_file_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(folder / "train.jsonl"), "--json"]) == 0
    report = as_json(capsys)
    assert (report["view"], report["tokens"]) == ("pairs", False)
    assert report["streams"]["train"]["rows"]["kept"] == 100
    assert report["streams"]["train"]["lengths"]["unit"] == "words"
    assert {one["name"] for one in report["limits"]} == {"bad", "duplicates", "truncated"}


def test_a_recipe_with_its_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(folder / "recipe.yaml")
    # Overrides of both spellings, before and behind options.
    words = ["data", recipe, "data.max_length=60", "--json", "--data.truncation", "cut_prompt", "--max-truncated", "1"]
    assert main(words) == 1
    report = as_json(capsys)
    train = report["streams"]["train"]
    assert train["lengths"]["max_length"] == 60
    assert train["lengths"]["truncation"]["cut_prompt"] + train["lengths"]["truncation"]["dropped"] > 0
    assert len(train["samples"]) == 5
    assert report["overlap"]["count"] == 2
    crossed = [one["name"] for one in report["limits"] if one["crossed"]]
    assert crossed == ["overlap"]
    assert main([*words, "--max-overlap", "0.2"]) == 0


def test_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(folder / "faulty.jsonl"), "--model", str(folder / "model")]) == 1
    printed = capsys.readouterr()
    assert "faulty.jsonl:5" in printed.out
    assert "chosen and rejected are identical" in printed.out
    assert "not valid JSON" in printed.out
    assert "the winner is the longer answer in" in printed.out
    assert "longer than max_length 2,048: 0 of 48 rows" in printed.out
    row = random_pairs(50, seed=3)[0]
    assert f"prompt: <s>{row['prompt']}\n" in printed.out
    assert f"winner: \u27e6{row['chosen']}</s>\u27e7\n" in printed.out
    assert "\x1b[" not in printed.out
    assert "train: 5.88% of the rows are bad; the limit `bad` is 1.00%\n" in printed.err


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--max-bad", "0.06"], 0),
        (["--max-bad", "0.05"], 1),
        (["--max-bad", "none"], 0),
        (["--max-bad", "0.06", "--max-longer", "0.5"], 1),
        (["--max-bad", "0.06", "--max-duplicates", "0"], 0),
        (["--max-bad", "0.06", "--max-refusals", "0"], 0),
    ],
)
def test_limits_decide_the_exit_code(
    folder: Path, options: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", *options, str(folder / "faulty.jsonl")]) == code
    assert main(["data", str(folder / "faulty.jsonl"), *options]) == code
    capsys.readouterr()


def test_eval_benchmark_and_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = str(folder / "train.jsonl"), str(folder / "held_out.jsonl")
    words = ["data", train, "--eval", held_out, "--benchmark", held_out, "--rows", "50", "--json"]
    assert main(words) == 1
    report = as_json(capsys)
    assert report["streams"]["train"]["rows"]["read"] == 50
    assert report["overlap"]["count"] == 1  # row 0 is among the 50, row 1 is not
    assert report["benchmarks"][0]["count"] == 1
    assert main([*words, "--max-overlap", "none", "--max-benchmarks", "0"]) == 1
    assert main([*words, "--max-overlap", "none"]) == 0


def test_options_of_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"q{n}", "response_j": " good and long", "response_k": " bad"} for n in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", str(path), "winner=response_k", "max_rows=5", "--json"]) == 0
    train = as_json(capsys)["streams"]["train"]
    assert train["rows"]["total"] == 5
    assert train["length_bias"]["winner_longer"]["count"] == 0


def test_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert main(["data", str(folder / "train.jsonl"), "--html", str(page)]) == 0
    assert f"the page is {page}" in capsys.readouterr().err
    assert "<html" in page.read_text()[:500]


def test_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' * 7)
    assert main(["data", "index", str(path)]) == 0
    index = tmp_path / "rows.jsonl.index.json"
    assert capsys.readouterr().out == f"wrote {index}\n"
    assert json.loads(index.read_text())["rows"] == 7
    assert len(JsonlFile(path, "rows")) == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["FOLDER/nowhere.jsonl"], ["nowhere.jsonl: there is no such file or folder", "train.jsonl"]),
        (["FOLDER/train.jsonl", "winer=chosen"], ["argument winer=chosen", "did you mean `winner`"]),
        (["FOLDER/train.jsonl", "max_rows=many"], ["argument max_rows=many", "max_rows"]),
        (["FOLDER/train.jsonl", "winner=best"], ["`winner` names the column `best`", "mend:"]),
        (["FOLDER/train.jsonl", "--max-length", "9"], ["--max-length", "--model"]),
        (["FOLDER/train.jsonl", "--view", "lists", "--model", "FOLDER/none"], ["FOLDER/none"]),
        (["FOLDER/train.jsonl", "--benchmark", "FOLDER/none.jsonl"], ["none.jsonl", "no such file"]),
        (["FOLDER/recipe.yaml", "data.max_lenght=9"], ["did you mean `max_length`"]),
        (["FOLDER/recipe.yaml", "--eval", "x"], ["--eval", "data.eval"]),
        (["FOLDER/missing.yaml"], ["missing.yaml", "cannot be read"]),
        (["index"], ["takes one file"]),
        (["index", "FOLDER/none.jsonl"], ["no such file"]),
        (["index", "FOLDER/recipe.yaml"], ["only JSONL"]),
    ],
)
def test_mistakes(words: list[str], said: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *(word.replace("FOLDER", str(folder)) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    for part in said:
        assert part.replace("FOLDER", str(folder)) in printed.err


@pytest.mark.parametrize("share", ["2", "-1", "few"])
def test_a_limit_is_a_share(share: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--max-bad", share, str(folder / "train.jsonl")], [str(folder / "train.jsonl"), "--max-bad", share]):
        with pytest.raises(SystemExit) as stop:
            main(["data", *words])
        assert stop.value.code == 2
        assert f"`{share}` is no share between 0 and 1" in capsys.readouterr().err


def test_a_file_without_a_model_needs_no_torch(folder: Path, root: Path) -> None:
    code = (
        "import sys\nfrom align.cli.main import main\n"
        f"assert main(['data', {str(folder / 'train.jsonl')!r}]) == 0\n"
        "print('HEAVY', *sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines()[-1] == "HEAVY"
