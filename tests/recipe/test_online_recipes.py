"""Recipes of methods that sample: what they must and may say, and runs of them from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.main import main
from align.core.errors import ConfigError, ErrorList
from align.recipe import rules, schema
from align.recipe.provenance import differences
from align.recipe.run import arguments
from align.testing.tiny import save_tiny

JUDGE = "tests.recipe.online_judges:share_of_a"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny", seed=1))


def recipe(folder: Path, model: str, **changes: Any) -> Path:
    prompts = folder / "prompts.jsonl"
    rows = [json.dumps({"prompt": f"say {number}", "wanted": "a"}) for number in range(24)]
    prompts.write_text("\n".join([*rows, json.dumps({"prompt": 7}), json.dumps({"wanted": "b"})]) + "\n")
    sections: dict[str, Any] = {
        "model": {"name": model},
        "method": {"name": "grpo", "num_generations": 3, "beta": 0.0},
        "data": {"prompts": [str(prompts)], "max_length": 64, "max_bad_fraction": 0.2},
        "rollout": {"max_new_tokens": 8, "keep": "last"},
        "feedback": [{"kind": "function", "name": JUDGE}],
        "train": {
            "output_dir": str(folder / "run"),
            "learning_rate": 1e-2,
            "global_batch_size": 4,
            "max_steps": 3,
            "logging_steps": 1,
        },
    }
    for name, value in changes.items():
        sections[name] = {**sections.get(name, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in sections.items() if value is not None}))
    return path


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        schema.load(path, overrides)
    errors = error.value.errors if isinstance(error.value, ErrorList) else (error.value,)
    return "\n".join(str(one) for one in errors)


def test_a_run_from_a_recipe_with_bad_rows(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": f"count to {n}", "wanted": "a"}) + "\n" for n in range(6)))
    path = recipe(tmp_path, model, data={"eval": [str(held_out)]}, eval={"every": 3})
    assert main(["check", str(path)]) == 0
    checked = capsys.readouterr()
    assert "answers to 4 prompts" in checked.out and "sampling" in checked.out
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr()
    assert "reward" in said.err and "held-out reward" in said.err and "prompts/s" in said.err
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len([one for one in entries if f"rollout/reward/{JUDGE}" in one]) == 3
    assert any(f"eval_reward/{JUDGE}" in one for one in entries)
    rejected = (tmp_path / "run" / "rejected.jsonl").read_text()
    assert rejected.count("\n") == 2 and '"line": 25' in rejected and '"line": 26' in rejected
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Rollouts" in page and "Reward of the policy" in page
    resolved = schema.load(tmp_path / "run" / "recipe.yaml")
    assert resolved.rollout is not None and resolved.rollout.max_new_tokens == 8
    assert resolved.feedback[0].name == JUDGE


def test_sections_reach_the_trainers_arguments(tmp_path: Path, model: str) -> None:
    path = recipe(
        tmp_path,
        model,
        rollout={"epochs": 2, "minibatches": 2, "redraws": 1, "temperature": 0.8},
        sampler={"kind": "server", "urls": ["http://127.0.0.1:1"], "retries": 1},
        shaping=[{"name": "overlong", "max_length": 8, "cache": 4}],
        feedback=[
            {"kind": "function", "name": JUDGE, "weight": 0.5},
            {"kind": "function", "name": "tests.recipe.online_judges:length", "held_out": True},
        ],
        health={"kl": "stop", "kl_budget": 5.0},
    )
    made = schema.load(path)
    args = arguments(made)
    assert (args.rollout_epochs, args.rollout_minibatches, args.max_redraws, args.prompts) == (2, 2, 1, 8)
    assert args.temperature == 0.8 and args.sampler.kind == "server" and args.sampler.retries == 1
    assert args.reward_weights == {JUDGE: 0.5} and args.shaping_stages()[0][0] == "overlong"
    assert made.health is not None and made.health.kl == "stop"
    uses = rules.Uses.of(rules.build_method(schema.METHODS.get("grpo"), made.method.options))
    again = tmp_path / "again.yaml"
    again.write_text(rules.to_yaml(made, uses))
    assert rules.to_yaml(schema.load(again), uses) == again.read_text()


def test_a_resumed_run_may_find_its_servers_elsewhere(tmp_path: Path, model: str) -> None:
    def plain(**changes: Any) -> dict[str, Any]:
        made = schema.load(recipe(tmp_path, model, **changes))
        uses = rules.Uses.of(rules.build_method(schema.METHODS.get("grpo"), made.method.options))
        return yaml.safe_load(rules.to_yaml(made, uses))

    before = plain(sampler={"kind": "server", "urls": ["http://127.0.0.1:1"]})
    moved = {"kind": "server", "urls": ["http://127.0.0.1:2"], "wait": 60.0}
    assert differences(before, plain(sampler=moved, rollout={"keep": "all"})) == {}
    assert list(differences(before, plain(sampler=moved, rollout={"temperature": 0.7}))) == ["rollout.temperature"]


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"data": {"prompts": None}}, "`data.prompts` is missing"),
    ({"data": {"train": ["x/y"]}}, "`data.train` is unused"),
    ({"feedback": None}, "needs someone who judges"),
    ({"feedback": [{"kind": "function", "name": JUDGE, "swap": True}]}, "`swap` is not used by `kind: function`"),
    ({"feedback": [{"kind": "function", "nme": JUDGE}]}, "has no option `nme`"),
    ({"feedback": []}, "`feedback` is empty"),
    ({"shaping": [{"name": "overlng"}]}, "overlong"),
    ({"shaping": [{"max_length": 3}]}, "has no `name`"),
    ({"sampler": {"kind": "hf", "urls": ["http://x"]}}, "`sampler.urls` is unused"),
    ({"sampler": {"dtype": "bfloat16"}}, "a run samples in its own `model.dtype`"),
    ({"rollout": {"temperature": 0}}, "> 0"),
    ({"rollout": {"minibatch": 2}}, "has no option `minibatch`"),
    ({"health": {"kl": "loud"}}, "loud"),
    ({"health": {"kl": "off", "kl_budget": 3.0}}, "`kl_budget` is unused"),
    ({"data": {"eval": ["x/y"]}, "eval": {"best": "accuracy"}}, "a run that samples does not give"),
    ({"method": {"name": "dpo", "num_generations": None, "beta": 0.1}}, "`dpo` trains on data that are there"),
]


@pytest.mark.parametrize(("changes", "says"), FAULTS)
def test_faults_have_their_line_and_their_mending(
    tmp_path: Path, model: str, changes: dict[str, Any], says: str
) -> None:
    path = recipe(tmp_path, model)
    whole = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        merged = {**whole.get(name, {}), **value} if isinstance(value, dict) else value
        if isinstance(merged, dict):
            merged = {key: one for key, one in merged.items() if one is not None}
        whole[name] = merged
    path.write_text(yaml.safe_dump({name: value for name, value in whole.items() if value is not None}))
    found = faults(path)
    assert says in found and "recipe.yaml" in found


def test_a_truncated_distribution_is_refused_at_check(tmp_path: Path, model: str) -> None:
    path = recipe(tmp_path, model, rollout={"top_p": 0.9})
    assert main(["check", str(path)]) == 2
    assert main(["train", str(path)]) == 2
