"""What the pages show is true: Python runs, recipes load, rows are read, messages exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
import sys
import types

import numpy as np
import pytest
import torch
import yaml

from align.cli.main import main
from align.core.errors import AlignError
from align.data.groups import RowId
from align.data.prepare import open_sources
from align.recipe import collect, schema
from align.testing.tiny import random_pairs, save_tiny
from tests.docs.pages import DOCS, ROOT, Block, blocks
from tests.docs.test_commands import commands_in

SMALL = {
    "model": {"name": "model"},
    "method": {"name": "dpo"},
    "data": {"train": ["rows.jsonl"]},
    "train": {"output_dir": "out"},
}


def run_page(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The page's Python blocks, run in order as one module."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks("python", name):
        exec(compile(block.text, block.where, "exec"), vars(module))  # noqa: S102  our own page
    return vars(module)


@pytest.fixture
def one_thread():
    """Several threads on a tiny model wait for each other, on a busy machine for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_one_loop_and_align_compute_the_same_losses(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    page = run_page("one_loop.md", monkeypatch)
    losses, theirs = page["losses"], page["theirs"]
    assert len(losses) == len(theirs) == 4
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < 0.5
    np.testing.assert_allclose(losses, theirs, atol=5e-6)


def test_your_own_method_has_20_lines_and_passes_the_battery(monkeypatch):
    first = blocks("python", "own_method.md")[0]
    assert len(first.text.splitlines()) <= 20
    page = run_page("own_method.md", monkeypatch)
    assert page["MarginHinge"].id == "margin_hinge" and page["HingeSFT"].id == "hinge_sft"


def test_the_method_on_the_page_is_named_in_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").touch()
    (tmp_path / "my_pkg" / "my_file.py").write_text(blocks("python", "own_method.md")[0].text)
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (written,) = blocks("yaml", "own_method.md")
    recipe = load(written)
    assert recipe.method.options == {"beta": 0.05, "margin": 2.0}
    for wrong, said in (("beta: -1", "outside its range"), ("margn: 2.0", "did you mean `margin`")):
        block = Block("yaml", f"method: {{name: my_pkg.my_file:MarginHinge, {wrong}}}", "", "wrong")
        with pytest.raises(AlignError, match=said):
            load(block)


def load(block: Block) -> schema.Recipe:
    """A recipe of a block, laid over a small one where it is a part; in the working folder."""
    plain = yaml.safe_load(block.text)
    whole = plain if "extends" in plain or set(SMALL) <= set(plain) else SMALL | plain
    with open("recipe.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(whole, file)
    return schema.load("recipe.yaml")


def test_every_recipe_on_the_pages_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "pairs", "held_out", "train", "eval", "demonstrations", "prompts"):
        (tmp_path / f"{name}.jsonl").touch()
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "pairs.jsonl").touch()
    others = ('title="TRL"', 'title="collect.yaml"', 'title="feedback"', 'title="loop.yaml"')
    shown = [block for block in blocks("yaml") if block.title not in others and "my_pkg" not in block.text]
    assert len(shown) >= 6
    problems = []
    for block in shown:
        try:
            load(block)
        except AlignError as error:
            problems.append(f"{block.where}: {error}")
    assert not problems, "\n".join(problems)


def test_the_recipe_for_collecting_pairs_and_its_commands_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """With a tiny model in place of the trained one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    save_tiny(tmp_path / "runs" / "sft" / "policy")
    page = [*blocks("yaml", "commands/sample.md"), *blocks("python", "commands/sample.md")]
    for block in page:
        name = block.title.removeprefix('title="').removesuffix('"')
        text = block.text.replace("max_new_tokens: 128", "max_new_tokens: 8")
        (tmp_path / name).write_text(text)
    assert {file.name for file in tmp_path.iterdir()} == {"runs", "collect.yaml", "my_rewards.py"}
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_pairs(5)))
    lines = [
        *blocks("sh", "commands/sample.md"),
        *blocks("sh", "commands/judge.md"),
        *blocks("sh", "commands/pairs.md"),
    ]
    seen = 0
    for block in lines:
        for command in commands_in(block.text):
            assert main(shlex.split(command)[1:]) == 0, (block.where, command, capsys.readouterr().err)
            seen += 1
    assert seen == 9
    (kept,) = blocks("yaml", "commands/pairs.md")
    (opened,) = open_sources(yaml.safe_load(kept.text)["data"]["train"], "pairs")
    told = json.loads((tmp_path / "runs" / "first" / "pairs" / "manifest.json").read_text())["info"]["counts"]
    assert len(opened.source) == told["pairs"]["pairs"] > 0
    (feedback,) = blocks("yaml", "commands/judge.md")
    (tmp_path / "two.yaml").write_text((tmp_path / "collect.yaml").read_text().partition("feedback")[0] + feedback.text)
    (tmp_path / "two.yaml").write_text((tmp_path / "two.yaml").read_text() + "output_dir: runs/third\n")
    assert [one.kind for one in collect.read("two.yaml", "judge").feedback] == ["function", "judge"]


def test_the_run_on_own_samples_and_its_python_run_as_they_stand(tmp_path, monkeypatch, one_thread):
    """With a tiny model in place of the trained one, and fewer, shorter steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    save_tiny(tmp_path / "runs" / "sft" / "policy")
    rows = [json.dumps(row) + "\n" for row in random_pairs(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows[:9]))
    (tmp_path / "held_out.jsonl").write_text("".join(rows[9:]))
    (recipe,) = blocks("yaml", "online.md")
    rewards, python = blocks("python", "online.md")
    assert len([line for line in python.text.splitlines() if line]) <= 7

    def small(text: str) -> str:
        for long, short in (("max_steps", 2), ("global_batch_size", 3), ("max_new_tokens", 6)):
            text, count = re.subn(rf"{long}([:=] ?)\d+", rf"{long}\g<1>{short}", text)
            assert count == 1
        return text

    (tmp_path / "online.yaml").write_text(small(recipe.text))
    (tmp_path / "my_rewards.py").write_text(rewards.text)
    (shell,) = blocks("sh", "online.md")
    for command in commands_in(shell.text):
        assert main([*shlex.split(command)[1:], "train.logging_steps=1"]) == 0, command
    log = [json.loads(line) for line in (tmp_path / "runs" / "grpo" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2
    said = {name for line in log for name in line}
    page = (DOCS / "online.md").read_text(encoding="utf-8").partition("## What is logged")[2].partition("\n## ")[0]
    told = {name.replace("NAME", "my_rewards:polite") for name in re.findall(r"`([a-z_]+/[\w/]+|eval_\w+)`", page)}
    told = {name for name in told if "METRIC" not in name}  # the function on the page logs none
    assert len(told) > 20 and told - said <= {"eval_reward/my_rewards:polite"} | {"rollout/repeated", "eval_repeated"}
    space: dict[str, object] = {}
    exec(compile(small(python.text), python.where, "exec"), space)  # noqa: S102  our own page
    assert space["trainer"].state.global_step == 2


def test_python_on_the_pages_compiles_and_its_names_exist():
    seen = 0
    for block in blocks("python"):
        tree = ast.parse(block.text, block.where)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("align"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{block.where}: {node.module}.{alias.name}"
                    seen += 1
    assert seen >= 8


def test_the_python_for_trl_users_builds_a_trainer(tmp_path, monkeypatch):
    """With a tiny model and file in place of the names, and compute in float32 for the CPU."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    rows = [json.loads(line) for line in blocks("json", "start.md")[0].text.splitlines()]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    for name in ("from_trl.md", "start.md"):
        (block,) = blocks("python", name)
        assert "trainer.train()" in block.text
        text = block.text.replace("Qwen/Qwen2.5-0.5B-Instruct", "model").replace("trainer.train()", "")
        space: dict[str, object] = {}
        exec(compile(text, block.where, "exec"), space)  # noqa: S102  our own page
        assert space["trainer"].method.id == "dpo"


def test_the_rows_for_trl_users_are_read():
    """Each row on the page, by the views that the table above them promises."""
    (block,) = blocks("json", "from_trl.md")
    rows = [json.loads(line) for line in block.text.splitlines()]
    views = [("pairs", "singles")] * 3 + [("singles",)] * 2 + [("demonstrations",)] * 3
    assert len(rows) == len(views)
    for row, promised in zip(rows, views, strict=True):
        for view in promised:
            (opened,) = open_sources([[row, row]], view, {"label"} if view == "singles" else set())
            group = opened.reader(row, RowId("page", 0))
            texts = [completion.text for completion in group.completions]
            assert texts[0].strip() in ("blue.", "Blue.", "Green.", "The sky is blue.")
            if view == "pairs":
                assert texts[group.preferences[0].winner].strip().lower() == "blue."


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL warns of what is experimental
def test_the_tables_for_trl_users_name_every_key_of_the_installed_trl():
    from transformers import TrainingArguments
    from trl import DPOConfig, KTOConfig, SFTConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    text = (DOCS / "from_trl.md").read_text(encoding="utf-8")
    named = {name for code in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"\w+", code)}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    configs = (DPOConfig, KTOConfig, SFTConfig, CPOConfig, ORPOConfig)
    for config in configs:
        own = {field.name for field in dataclasses.fields(config)} - inherited
        assert not own - named, f"{config.__name__}: {sorted(own - named)}"
    known = inherited | {field.name for config in configs for field in dataclasses.fields(config)}
    keys = text.partition("## Keys")[2].partition("| TRL's `ModelConfig`")[0]
    first_column = [line.split(" | ")[0] for line in keys.splitlines() if line.startswith("| `")]
    assert len(first_column) > 20
    assert not set(re.findall(r"`(\w+)`", " ".join(first_column))) - known


def test_the_trl_file_on_the_page_becomes_the_recipe_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, ours = blocks("yaml", "from_trl.md")
    (tmp_path / "trl.yaml").write_text(theirs.text)
    (tmp_path / "ours.yaml").write_text(ours.text)
    assert main(["recipes", "import", "trl.yaml", "--trainer", "dpo", "--output", "imported.yaml"]) == 0
    imported, shown = schema.load("imported.yaml"), schema.load("ours.yaml")
    assert dataclasses.replace(imported, provenance=shown.provenance) == shown


def test_the_losses_for_trl_users_are_what_the_import_makes_of_them(tmp_path):
    """Rows of DPOTrainer's losses: the method that is linked, or a refusal."""
    from align.recipe.from_trl import convert

    page = (DOCS / "from_trl.md").read_text(encoding="utf-8")
    table = page.partition("## Trainers and losses")[2].partition("| `KTOTrainer`")[0]
    converted = dict(re.findall(r"`loss_type: (\w+)` \| \[`(\w+)`\]", table))
    del converted["bco_pair"]
    (others,) = re.findall(r"\| other `loss_type`: ([^|]*) \| not yet", table)
    refused = [*re.findall(r"`(\w+)`", others), "bco_pair"]
    assert len(converted) >= 11
    assert set(refused) & {"sppo_hard", "bco_pair"}
    file = tmp_path / "trl.yaml"
    for loss in (*converted, *refused):
        file.write_text(f"model_name_or_path: a/b\ndataset_name: c/d\noutput_dir: out\nloss_type: {loss}\n")
        if loss in refused:
            with pytest.raises(AlignError, match=f"loss_type: {loss}"):
                convert(file, "dpo")
        else:
            assert convert(file, "dpo").recipe["method"]["name"] == converted[loss]


def test_the_messages_on_the_page_are_in_the_source():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "align").rglob("*.py"))
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (`+) ?(.*?) ?\1$", page, re.M)
    assert len(headings) > 25
    for _, heading in headings:
        for piece in filter(None, (part.strip(" `(") for part in heading.split("…"))):
            assert piece in source, f"`{heading}`: `{piece}` is in no message"


def test_numbers_to_start_from_lie_in_the_options_ranges():
    """Every method named in the tables of `which_method.md` is registered, and what is `not yet` is not."""
    from align.core.registry import METHODS

    page = (DOCS / "which_method.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"methods/(\w+)\.md", page))
    assert linked == set(METHODS.entries()), "a method is missing on the page, or one too many"
    for sentence in re.findall(r"\(([^()]*)\): not yet here", page):
        for name in re.findall(r"`(\w+)`", sentence):
            assert name not in METHODS.entries(), f"`{name}` is here now"
