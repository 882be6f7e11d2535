"""What somebody found who came from another library: each was wrong once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from align.cli.main import main
from align.report import run_page
from align.testing.tiny import save_tiny, tiny_tokenizer
from align.trainers import AlignConfig, PreferenceTrainer
from tests.recipe.small import small_run

CHATML = (
    "{% for message in messages %}<|user|>{{ message['role'] }} {{ message['content'] }}<|tool|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant {% endif %}"
)


def rows(n: int) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"what is {i}"}],
            "chosen": [{"role": "assistant", "content": f"it is {i}"}],
            "rejected": [{"role": "assistant", "content": "no idea"}],
        }
        for i in range(n)
    ]


def test_the_saved_model_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """The template ends turns by `<|tool|>`, which is not the tokenizer's EOS."""
    model = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    args = AlignConfig(str(tmp_path / "out"), global_batch_size=8, max_steps=1, max_length=128, save_strategy="no")
    PreferenceTrainer(str(model), "dpo", args, rows(16)).train()
    saved = json.loads((tmp_path / "out" / "policy" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|tool|>")]


def test_of_equally_good_checkpoints_the_later_is_kept_and_the_page_says_which(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small_run(tmp_path / "d", steps=4)
    words = ["eval.best=accuracy", "eval.every=1", "train.learning_rate=1e-12", "train.save_steps=1"]
    assert main(["train", str(recipe), *words]) == 0
    folder = tmp_path / "d" / "run"
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert last["policy_of"] == "checkpoint-4"  # nothing moves, so all four are equal
    assert "checkpoint-4, the best by accuracy" in run_page(folder, tmp_path / "page.html").read_text()
    assert main(["train", str(recipe), *words]) == 0
    ends = [line for line in (folder / "log.jsonl").read_text().splitlines() if "policy_of" in line]
    assert len(ends) == 1


def test_a_resumed_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_run(tmp_path / "d", steps=2)
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["train", str(recipe), "train.logging_steps=1"]) == 0
    said = capsys.readouterr().err
    assert "continuing from" in said and "checkpoint-2" in said and "nothing was left to train" in said
    assert "arguments do not match" not in said


def test_a_fault_in_ones_own_method_has_its_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "crashing.py").write_text(
        "from align.methods import Method, method, option\n\n\n"
        "@method('crash', view='pairs', needs={'ref_logp'})\nclass Crash(Method):\n"
        "    '''Crashes.'''\n\n    beta: float = option(0.1, above=0, doc='beta')\n\n"
        "    def loss(self, pairs):\n        return pairs.nothing\n"
    )
    path = small_run(tmp_path / "d", steps=1)
    recipe = yaml.safe_load(path.read_text())
    recipe["method"] = {"name": "crashing:Crash"}
    path.write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "crashing.py:11" in said and "AttributeError" in said and "Traceback" not in said
    assert "published" not in said  # nothing is published of a method that is the user's own


def test_the_best_of_what_only_pairs_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_run(tmp_path / "d", steps=1)
    assert main(["train", str(recipe), "method={name: kto}", "eval.best=accuracy"]) == 2
    said = capsys.readouterr().err
    assert "eval.best" in said and "`kto` reads singles" in said


def test_an_override_of_the_method_leaves_nothing_of_the_other(tmp_path: Path) -> None:
    from align.recipe import schema

    recipe = small_run(tmp_path / "d", steps=1)
    assert schema.load(recipe, ["method.name=ipo"]).method.options["tau"] == 0.1
    assert schema.load(recipe, ["method.name=simpo", "method.beta=3"]).method.options["beta"] == 3
    assert schema.load(recipe, ["method.name=simpo"]).method.options["beta"] == 2.0
    assert schema.load(recipe, ["method.beta=0.3"]).method.name == "dpo"


def test_rows_that_are_too_long_are_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model")
    long = rows(20)
    long[3]["chosen"][0]["content"] = "word " * 3000
    long[5]["chosen"] = long[5]["rejected"]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in long))
    capsys.readouterr()
    main(["data", str(file), "--model", str(model), "--max-length", "256", "--json"])
    counts = json.loads(capsys.readouterr().out)["streams"]["train"]["rows"]
    assert (counts["kept"], counts["bad"], counts["dropped"]) == (18, 1, 1)


def test_a_bare_word_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = small_run(tmp_path / "d", steps=1)
    assert main(["train", str(recipe), "model.name=nomodel", f"train.output_dir={tmp_path / 'x'}"]) == 2
    assert "there is no folder `nomodel` here" in capsys.readouterr().err
