"""`align sample`, `align judge`, `align pairs` in process: what they print, what they refuse and where they point."""

from __future__ import annotations

import json

import pytest

from align.cli.main import main
from align.core.errors import AlignError
from align.recipe import collect
from align.testing.tiny import random_pairs, save_tiny

RECIPE = """model: {{name: {home}/model}}
data: {{prompts: [{home}/prompts.jsonl]}}
sample: {{n: 2, max_new_tokens: 6, chunk: 2}}
feedback: [{{name: "cli_judges:length", weight: 2.0}}]
pairs: {{rule: best_worst}}
output_dir: {home}/run
"""
_JUDGES = """
def length(prompts, completions, **columns):
    return [None if prompt.endswith("rain?") else float(len(text)) for prompt, text in zip(prompts, completions)]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("collect") / "model")


@pytest.fixture
def home(model, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "cli_judges.py").write_text(_JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": f"Say {number}{' after the rain?' if number == 3 else ''}"} for number in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(home=tmp_path))
    return tmp_path


def run(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def said_of(text, tmp_path, command="sample", *overrides):
    """What is said against a recipe, one line an error, with its line in the file."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(AlignError) as caught:
        collect.read(file, command, overrides)
    return str(caught.value).replace(str(file), "r.yaml")


def test_the_three_commands_say_what_came_of_it_and_what_was_lost(home, capsys):
    recipe = str(home / "recipe.yaml")
    code, out, err = run(capsys, "sample", recipe)
    assert code == 0 and "5 prompts" in err
    assert f"{home}/run/samples: 10 answers to 5 prompts, " in out and "tokens each, " in out
    code, out, _ = run(capsys, "sample", recipe)
    assert (code, out.splitlines()[0]) == (0, f"{home}/run/samples is complete; nothing was left to do")
    code, out, _ = run(capsys, "judge", recipe)
    lines = out.splitlines()
    assert lines[:2] == [f"{home}/run/judged: 5 prompts", "  `cli_judges:length`: 8 of 10 judged"]
    assert lines[2] == "missing: 2 of `cli_judges:length`: no number given"
    code, out, _ = run(capsys, "pairs", recipe, "--json")
    told = json.loads(out)
    assert code == 0 and told["counts"]["left_out"] == {"missing": 2}
    assert told["counts"]["pairs"]["pairs"] == 5 - sum(told["counts"]["lost"].values())
    assert told["counts"]["lost"]["missing"] == 1
    # An override is part of the settings: what was begun with others is refused, and thrown away only when asked.
    code, _, err = run(capsys, "pairs", recipe, "pairs.unfinished=drop")
    assert code == 2 and '`recipe.unfinished` was "keep", is "drop"' in err and "--restart" in err
    code, _, err = run(capsys, "pairs", recipe, "pairs.rule=all", "--restart")
    assert code == 0, err


def test_work_that_was_begun_is_taken_up_and_said(home, capsys):
    recipe = str(home / "recipe.yaml")
    assert main(["sample", recipe]) == 0
    (home / "run" / "samples" / "manifest.json").unlink()
    (home / "run" / "samples" / "part-000001.parquet").unlink()
    capsys.readouterr()
    code, out, _ = run(capsys, "sample", recipe)
    assert code == 0 and out.splitlines()[0] == "2 of 3 chunks were done before"


def test_faults_of_all_sections_are_told_at_once_with_their_lines(tmp_path):
    said = said_of(
        "model: {name: some/model, dtyp: float32}\n"
        "data: {prompts: [x.jsonl], max_length: 5}\n"
        "sampler: {kind: hf, batch_size: 0}\n"
        "sampel: {n: 3}\n"
        "sample: {n: 3, temperature: -1, maxtokens: 4}\n"
        "feedback: [{name: a:b, weigth: 2}, {kind: reward_model}]\n"
        "pairs: {rule: bestworst}\n",
        tmp_path,
    )
    for wanted in (
        "r.yaml:1: `model` has no option `dtyp`",
        "r.yaml:2: `data` has no option `max_length`",
        "r.yaml:3: `sampler`: `batch_size` is 0, outside its range",
        "r.yaml:4: unknown section `sampel`\n  mend: did you mean `sample`",
        "r.yaml:5: `sample`: `temperature` is -1.0, outside its range",
        "r.yaml:5: `sample` has no option `maxtokens`",
        "r.yaml:6: `feedback.0` has no option `weigth`\n  mend: did you mean `weight`",
        "r.yaml:6: feedback `reward_model`: `kind: reward_model` needs `model`",
        "r.yaml:7: `pairs`: `rule` is 'bestworst'",
        "`output_dir` is missing",
    ):
        assert wanted in said, (wanted, said)


def test_options_that_nothing_reads_are_refused_with_the_reason(tmp_path):
    said = said_of(
        "model: {name: some/model, dtype: bfloat16, peft: {r: 8}}\n"
        "data: {prompts: [{name: x.jsonl, weight: 2.0}], chat_template: none.jinja}\n"
        "sampler: {kind: vllm, batch_size: 8, urls: [http://x]}\n"
        "feedback: [{name: a:b}]\n"
        "pairs: {rule: best_worst, margin: 1.0, seed: 3}\n"
        "output_dir: out\n",
        tmp_path,
    )
    for wanted in (
        "r.yaml:1: `model.dtype` is unused\n  why: `sampler.dtype` is what is sampled in",
        "r.yaml:1: `model.peft` is unused\n  why: nothing is trained here",
        "r.yaml:2: `data.prompts.0.weight` is unused",
        "r.yaml:2: there is no chat template `none.jinja`",
        "r.yaml:3: `sampler.batch_size` is unused\n  why: it is read with `kind: hf`, not `vllm`",
        "r.yaml:3: `sampler.urls` is unused\n  why: it is read with `kind: server`, not `vllm`",
        "r.yaml:5: `pairs.margin` is unused\n  why: it belongs to `rule: margin`",
        "r.yaml:5: `pairs.seed` is unused\n  why: nothing is drawn",
    ):
        assert wanted in said, (wanted, said)
    assert "peft.r" not in said, "one fault a section"


@pytest.mark.parametrize(
    ("command", "text", "wanted"),
    [
        ("sample", "output_dir: x\n", "`model` is missing"),
        ("sample", "output_dir: x\nmodel: {name: m}\ndata: {}\n", "`data.prompts` is missing"),
        ("sample", "output_dir: [x]\nmodel: {name: m}\ndata: {prompts: a}\n", "`output_dir` is ['x']"),
        ("judge", "output_dir: x\n", "`feedback` is missing"),
        ("judge", "output_dir: x\nfeedback: []\n", "`feedback` is empty"),
        ("judge", "output_dir: x\nfeedback: [{name: a:b}, {name: a:b, weight: 2}]\n", "are named `a:b`"),
        ("pairs", "output_dir: x\nfeedback: [{name: a:b}]\n", "`pairs` is missing"),
        ("pairs", "output_dir: x\npairs: {rule: best_worst}\n", "needs feedback, and the recipe has none"),
        ("pairs", "output_dir: x\npairs: {rule: by_origin, rejected_from: data}\n", "are both `data`"),
        (
            "sample",
            "output_dir: x\nmodel: {name: m}\ndata: {prompts: a}\nsampler: {kind: server, urls: localhost}\n",
            "`sampler.urls` is 'localhost'",
        ),
        (
            "sample",
            "output_dir: x\nmodel: {name: m}\ndata: {prompts: a}\nsample: {n: 2, temperature: 0}\n",
            "all answers to a prompt would be the same",
        ),
    ],
)
def test_a_command_asks_for_what_it_reads(command, text, wanted, tmp_path):
    assert wanted in said_of(text, tmp_path, command)


def test_without_feedback_pairs_by_origin_are_made_of_the_samples(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("output_dir: x\npairs: {rule: by_origin}\n")
    assert collect.read(file, "pairs").pairs.rule == "by_origin"


def test_a_recipe_that_trains_too_is_read_for_its_part_and_says_what_it_left(home, capsys):
    recipe = home / "recipe.yaml"
    text = recipe.read_text().replace("model: {name:", "model: {dtype: bfloat16, peft: {r: 4}, name:")
    text = text.replace("prompts.jsonl]}", "prompts.jsonl], max_length: 64, train: [x.jsonl]}")
    recipe.write_text(text + "method: {name: dpo}\ntrain: {output_dir: y}\n")
    code, _, err = run(capsys, "sample", str(recipe))
    assert code == 0, err
    assert "not read by `align sample`: `method`, `train`" in err


def test_overrides_reach_every_section_and_name_themselves_in_errors(home, tmp_path):
    recipe = home / "recipe.yaml"
    made = collect.read(recipe, "pairs", ["sample.n=7", "--pairs.rule", "margin", "feedback.0.weight=3"])
    assert (made.sample.n, made.pairs.rule, made.feedback[0].weight) == (7, "margin", 3.0)
    assert "argument sample.n=0: `sample`: `n` is 0" in said_of(recipe.read_text(), tmp_path, "pairs", "sample.n=0")


def test_too_many_bad_rows_stop_the_command_before_anything_is_sampled(home, capsys):
    (home / "prompts.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 5}\n')
    code, _, err = run(capsys, "sample", str(home / "recipe.yaml"))
    assert code == 2 and "1 of 2 rows are bad" in err and not (home / "run").exists()
    code, _, err = run(capsys, "sample", str(home / "recipe.yaml"), "data.max_bad_fraction=0.5")
    assert code == 0 and "left out: 1 x" in err
    manifest = json.loads((home / "run" / "samples" / "manifest.json").read_text())["info"]
    assert sum(manifest["left_out"].values()) == 1, "the artefact says it too"


def test_prompts_that_leave_no_room_are_left_out_and_counted(home, capsys):
    rows = [{"prompt": "short"}, {"prompt": " ".join(pair["chosen"] for pair in random_pairs(40))}]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, "sample", str(home / "recipe.yaml"))
    assert code == 0 and "2 answers to 1 prompts" in out and "too long for the model" in err
