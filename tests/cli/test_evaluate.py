"""`align evaluate` as a user runs it: one JSON document, a page with the same numbers, and errors that teach."""

from __future__ import annotations

import html
import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align.cli.main import main
from align.testing.tiny import random_pairs, save_tiny

REWARD = """
def length(prompts, completions, **columns):
    print("a reward function that prints")
    return [float(len(text)) for text in completions]

def unsure(completions, **columns):
    return [None for _ in completions]

def broken(completions, **columns):
    raise KeyError("topic")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate-command")
    save_tiny(folder / "start", "qwen3", seed=0)
    save_tiny(folder / "policy", "qwen3", seed=1)
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "start"), LoraConfig(target_modules="all-linear")
    )
    wrapped.save_pretrained(folder / "adapter")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_pairs(14, seed=3)))
    (folder / "command_rewards.py").write_text(REWARD)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


SHORT = ("--max-new-tokens", 8, "--chunk-size", 4)
USUAL = ("policy", "--against", "start", "--data", "pairs.jsonl", "--reward", "command_rewards:length", *SHORT)


def test_json_is_one_document_and_a_second_run_is_the_same(capsys, folder):
    code, out, err = run(capsys, *USUAL, "--json", "--output", "out")
    report = json.loads(out)
    assert code == 0 and report["output"] == "out"
    assert report["prompts"] == 14 and report["n"] == 1 and report["reward"] == "command_rewards:length"
    rate = report["wins"]["rate"]
    assert 0 <= rate["low"] < rate["value"] < rate["high"] <= 1 and rate["n"] == 14
    assert report["kl"]["k3"]["low"] > 0 and report["pairs"]["pairs"] == 14
    assert len(report["examples"]) == 12 and report["policy"]["model"] == "policy"
    assert "a reward function that prints" in err
    saved = json.loads((folder / "out" / "result.json").read_text())
    assert saved == {key: value for key, value in report.items() if key != "output"}
    code, again, err = run(capsys, *USUAL, "--json", "--output", "out")
    assert json.loads(again) == report and "a reward function that prints" not in err


def test_table_and_page_have_the_numbers(capsys, folder):
    code, out, _ = run(capsys, *USUAL, "--output", "out", "--html", "page.html")
    saved = json.loads((folder / "out" / "result.json").read_text())
    rate = saved["wins"]["rate"]
    assert code == 0
    assert f"The policy wins {rate['value']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]" in out
    difference = saved["reward_difference"]
    assert f"{difference['value']:.3g} [{difference['low']:.3g}, {difference['high']:.3g}]" in out
    assert f"{saved['wins']['wins']} wins, {saved['wins']['losses']} losses" in out and "14 held-out pairs" in out
    page = html.unescape((folder / "page.html").read_text())
    assert f"The policy wins {rate['value']:.1%}" in page and "command_rewards:length" in page
    assert saved["examples"][0]["prompt"] in page and "policy against start" in page
    assert len(saved["tokens"]) == 4
    for answer in (answer for one in saved["tokens"] for answer in one["answers"]):
        assert f'<data class="score" value="{answer["total"]}">' in page


def test_default_folder_adapter_and_no_reward(capsys, folder):
    code, out, _ = run(capsys, "adapter", "--data", "pairs.jsonl", *SHORT, "--json")
    report = json.loads(out)
    assert code == 0 and report["baseline"]["model"] == str(folder / "start") and report["wins"] is None
    assert abs(report["kl"]["k1"]["value"]) < 1e-6 and report["pairs"]["implicit_accuracy"]["n"] == 14
    assert report["output"].startswith("runs/evaluate-")
    assert any("no reward function" in note for note in report["notes"])
    code, again, _ = run(capsys, "adapter", "--data", "pairs.jsonl", *SHORT, "--json")
    assert json.loads(again) == report
    code, other, _ = run(capsys, "adapter", "--data", "pairs.jsonl", *SHORT, "--json", "--seed", 1)
    assert json.loads(other)["output"] != report["output"]
    code, out, _ = run(capsys, "adapter", "--data", "pairs.jsonl", *SHORT)
    assert "No reward was given" in out and "win rate" not in out.replace("no win rate", "")


def test_a_world_brings_reward_and_prompts(capsys):
    code, out, _ = run(capsys, "policy", "--against", "start", "--world", "style", "--max-prompts", 6, *SHORT, "--json")
    report = json.loads(out)
    assert code == 0 and report["reward"] == "align.worlds.style:gold_reward" and report["prompts"] == 6
    assert report["policy"]["reward"]["n"] == 6 and report["pairs"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("policy", "--data", "pairs.jsonl"), "name the starting model with --against MODEL"),
        (("policy", "--against", "start"), "name held-out rows with --data FILE"),
        (("policy", "--against", "start", "--data", "pairs.jsonl", "--reward", "length"), "with the colon"),
        (
            ("policy", "--against", "start", "--data", "pairs.jsonl", "--reward", "command_rewards:lenght"),
            "did you mean `length`?",
        ),
        (("policy", "--against", "start", "--world", "stile"), "did you mean `style`?"),
        (("policy", "--against", "start", "--data", "nowhere.jsonl"), "there is no such file or folder"),
        (("policy", "--against", "./nowhere", "--data", "pairs.jsonl"), "there is no such model folder"),
        (("policy", "--against", "start", "--data", "pairs.jsonl", "--max-prompts", "0"), "`--max-prompts` is 0"),
        (("policy", "--against", "start", "--data", "pairs.jsonl", "--n", "0"), "`n` is 0"),
        (("policy", "--against", "start", "--data", "pairs.jsonl", "--temperature", "-1"), "`temperature` is -1.0"),
        (
            ("policy", "--against", "start", "--data", "pairs.jsonl", "--temperature", "0", "--n", "2"),
            "at temperature 0",
        ),
        (("adapter", "--base", "./nowhere", "--data", "pairs.jsonl"), "there is no such model folder"),
        (
            ("policy", "--against", "start", "--data", "pairs.jsonl", "--max-new-tokens", "600"),
            "holds a prompt that can be used",
        ),
    ],
)
def test_errors_of_the_user(capsys, arguments, said):
    code, out, error = run(capsys, *arguments)
    assert code == 2 and out == "" and said in error and "Traceback" not in error


def test_a_reward_that_raises_and_other_settings(capsys, folder):
    broken = [one if one != "command_rewards:length" else "command_rewards:broken" for one in USUAL]
    code, _, error = run(capsys, *broken, "--output", "broken")
    assert code == 2 and "raises KeyError" in error and "command_rewards.py:10" in error
    assert run(capsys, *USUAL, "--output", "mine", "--max-prompts", 3)[0] == 0
    code, _, error = run(capsys, *USUAL, "--output", "mine", "--max-prompts", 3, "--seed", 4)
    assert code == 2 and "`sampling.seed` was 0, is 4" in error and "--restart" in error
    assert run(capsys, *USUAL, "--output", "mine", "--max-prompts", 3, "--seed", 4, "--restart")[0] == 0


def test_one_prompt_and_no_rewards_at_all(capsys, folder):
    code, out, _ = run(capsys, *USUAL, "--output", "one", "--max-prompts", 1, "--n", 2, "--html", "one.html")
    assert code == 0 and "on one prompt: no interval" in out and "nan" not in out
    silent = [one if one != "command_rewards:length" else "command_rewards:unsure" for one in USUAL]
    code, out, _ = run(capsys, *silent, "--output", "silent", "--html", "silent.html")
    assert code == 0 and "scored no pair of completions" in out and "nan" not in out
    assert "0 wins, 0 losses, 0 ties, 14 without a reward" in out
    report = json.loads(run(capsys, *silent, "--output", "silent", "--json")[1])
    assert report["policy"]["missing"] == 14 and report["wins"]["rate"]["value"] is None


def test_bad_rows_are_named(capsys, folder):
    rows = [json.dumps(row) for row in random_pairs(120, seed=5)]
    (folder / "some_bad.jsonl").write_text("\n".join([*rows[:60], "{", *rows[60:]]) + "\n")
    arguments = ("policy", "--against", "start", "--data", "some_bad.jsonl", *SHORT, "--output", "bad")
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "1 rows left out" in out and "some_bad.jsonl:61" in out
    (folder / "some_bad.jsonl").write_text("\n".join([*rows[:9], "{"]) + "\n")
    code, _, error = run(capsys, *arguments[:-1], "worse")
    assert code == 2 and "1 of 10 rows are bad" in error and "some_bad.jsonl:10" in error
