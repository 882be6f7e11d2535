"""`OnlineTrainer`: what is sampled, from whom, at which weights; the step's gradient; stops, ranks, and refusals."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align.core.errors import ConfigError, DataError
from align.methods import METHODS
from align.sampling.base import SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.spec import SamplerSpec
from align.testing.steps import golden_step
from align.testing.tiny import tiny_model, tiny_tokenizer
from align.trainers import AlignConfig, OnlineConfig, OnlineTrainer, PreferenceTrainer
from tests.trainers.online_parts import Paid, log_of, paid, rows, trainer

ONLINE = {
    "online_dpo": {"beta": 0.1},
    "online_ipo": {"tau": 0.1},
    "xpo": {},
    "nash_md": {"tau": 0.01, "mix": 0.25},
    "rebel": {},
    "grpo": {"num_generations": 4},
    "dr_grpo": {"num_generations": 4},
    "dapo": {"num_generations": 4},
    "gspo": {"num_generations": 4},
    "rloo": {"num_generations": 4},
    "reinforce_pp": {},
    "reinforce_pp_baseline": {"num_generations": 4},
}


def test_every_online_method_is_tried_here() -> None:
    assert set(ONLINE) == {name for name in METHODS.entries() if METHODS.get(name)().rollouts() is not None}


@pytest.mark.parametrize("name", sorted(ONLINE))
def test_the_reward_rises(name: str, tmp_path: Path) -> None:
    """Thirty steps on a reward that a random model gets by chance, one token in seven."""
    rate = {"xpo": 5e-3}.get(name, 1e-2)
    trainer(tmp_path, name, ONLINE[name], max_steps=30, global_batch_size=16, learning_rate=rate).train()
    rewards = [line["rollout/reward/paid"] for line in log_of(tmp_path) if "rollout/reward/paid" in line]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1, rewards
    assert all(np.isfinite(line["loss"]) for line in log_of(tmp_path) if "loss" in line)


@pytest.mark.parametrize("name", sorted(ONLINE))
def test_a_check_and_an_evaluation_of_every_method(name: str, tmp_path: Path) -> None:
    """Neither has what training makes of rollouts: pairs, advantages, and before an evaluation's end rewards."""
    run = trainer(tmp_path, name, ONLINE[name], eval_rows=rows(5))
    engine = run.engine_for(run.model)
    looked = run.look(engine, next(iter(run.get_train_dataloader())).groups[:2])
    assert looked["prompts"] == 2 and looked["largest_difference"] < 1e-4
    found = run.evaluate()
    assert 0 <= found["eval_reward"] <= 1
    if "ref_logp" in METHODS.get(name)(**ONLINE[name]).requires():
        assert abs(found["eval_kl"]) < 1e-4  # nothing was trained


@pytest.mark.parametrize("name", ["online_dpo", "grpo", "nash_md", "rloo"])
def test_the_gradient_is_that_of_the_plain_step(name: str, tmp_path: Path) -> None:
    """On the rollouts that the run itself drew: one sequence at a time, one backward."""
    run = trainer(tmp_path, name, ONLINE[name], tokens_per_micro_batch=70)
    engine = run.engine_for(run.model)
    prompts = next(iter(run.get_train_dataloader())).groups
    groups = run.collect(engine, prompts, 0)
    assert len(groups) > 2
    run.buffer = groups
    share = engine.share(groups)
    assert len(share.micros) > 1
    run._step(engine, groups, 0)
    ours = {name: p.grad.clone() for name, p in engine.roles.named_parameters() if p.grad is not None}
    reference = tiny_model(seed=1).eval().requires_grad_(False)
    loss, theirs = golden_step(run.method, engine.roles, reference, groups)
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 1e-4 and np.isfinite(loss)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_samples_are_of_the_weights_as_they_are(tmp_path: Path) -> None:
    """Step 2's rollouts are what the policy after step 1 says, with the seed of that batch; the reference stays."""
    judge = Paid()
    run = trainer(tmp_path, "xpo", feedback=judge, max_steps=2, rollout_keep="all")
    run.train()
    kept = [json.loads(line) for line in (tmp_path / "rollouts" / "000001.jsonl").read_text().splitlines()]
    assert len(kept) == 8 and len(judge.seen) == 16
    assert [one["origin"] for one in kept[0]["answers"]] == ["policy", "reference"]
    start = HFSampler(tiny_model(seed=1), tiny_tokenizer())
    by_row = {group.row.row: group for group in judge.seen[8:]}
    for line in kept:
        group = by_row[line["row"]]
        ids = group.answers[1].ids
        whole = torch.tensor([[*group.prompt_ids.tolist(), *ids.tolist()]])
        logp = start.model(input_ids=whole).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logp.gather(-1, torch.as_tensor(ids)[:, None])[:, 0].detach().numpy()
        assert np.abs(own - group.answers[1].logp).max() < 1e-4  # the reference's sample is the starting model's
        assert line["answers"][0]["rewards"]["paid"] == pytest.approx(paid(line["answers"][0]["ids"]))
    moved = run.model.policy
    for group in judge.seen[8:10]:
        whole = torch.tensor([[*group.prompt_ids.tolist(), *group.answers[0].ids.tolist()]])
        start_logp = start.model(input_ids=whole).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        target = torch.as_tensor(group.answers[0].ids)[:, None]
        gap = (start_logp.gather(-1, target)[:, 0].detach().numpy() - group.answers[0].logp).__abs__().max()
        assert gap > 1e-3  # the policy's sample is not: its weights have moved
    assert moved is not start.model


def test_the_mixture_is_drawn_from(tmp_path: Path) -> None:
    judge = Paid()
    run = trainer(tmp_path, "nash_md", {"mix": 0.75, "tau": 0.01}, feedback=judge, max_steps=3)
    run.add_callback(stop := Stop(2))
    run.train()  # as after two steps
    engine, stop.step = run.engine_for(run.model), 0
    groups = run.collect(engine, next(iter(run.get_train_dataloader())).groups, 2)
    assert groups
    group = judge.seen[-1]
    assert [one.origin for one in group.answers] == ["policy", "mixture"]
    ids = group.answers[1].ids
    whole = torch.tensor([[*group.prompt_ids.tolist(), *ids.tolist()]])
    mixed = sum(
        weight * model(input_ids=whole).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        for weight, model in ((0.25, plain(run)), (0.75, tiny_model(seed=1).eval()))
    )
    own = mixed.log_softmax(-1).gather(-1, torch.as_tensor(ids)[:, None])[:, 0].detach().numpy()
    assert np.abs(own - group.answers[1].logp).max() < 1e-4


def plain(run: OnlineTrainer) -> Any:
    """A model of its own with the run's weights."""
    model = tiny_model(seed=1).eval()
    model.load_state_dict(run.model.policy.state_dict())
    return model


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "policy").glob("*.safetensors")))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stop_within_a_batch_of_rollouts_changes_nothing(stop: int, tmp_path: Path) -> None:
    """Four steps feed on a batch; the checkpoint carries it, with the log-probs of the policy that sampled."""
    several = {"rollout_epochs": 2, "rollout_minibatches": 2, "max_steps": 6, "global_batch_size": 4}
    options = {"num_generations": 3, "beta": 0.05}
    trainer(tmp_path / "whole", "grpo", options, **several).train()
    half = trainer(tmp_path / "half", "grpo", options, **{**several, "save_strategy": "steps", "save_steps": stop})
    half.add_callback(Stop(stop))
    half.train()
    assert half.state.global_step == stop
    judge = Paid()
    again = trainer(
        tmp_path / "half", "grpo", options, judge, **{**several, "save_strategy": "steps", "save_steps": 100}
    )
    again.train()
    assert len(judge.seen) == 8  # the second batch alone was sampled and judged after the stop
    whole, resumed = final(tmp_path / "whole"), final(tmp_path / "half")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class Stop(__import__("transformers").TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_several_steps_compare_with_the_policy_that_sampled(tmp_path: Path) -> None:
    run = trainer(tmp_path, "grpo", {"num_generations": 3}, rollout_minibatches=2, max_steps=2, global_batch_size=4)
    run.train()
    old = [one.columns["old_logp"] for group in run.buffer for one in group.completions]
    sampler = [one.columns["sampler_logp"] for group in run.buffer for one in group.completions]
    assert max(np.abs(a - b).max() for a, b in zip(old, sampler, strict=True)) < 1e-5
    groups = run.buffer
    engine = run.engine_for(run.model)
    share = engine.share(groups)
    with torch.no_grad():
        now = engine.gather(share, [engine.outputs(micro) for micro in share.micros])
    assert float((now["logp"] - now["old_logp"]).abs().max()) > 1e-3


def test_groups_without_spread_are_drawn_again(tmp_path: Path) -> None:
    """dapo drops a group whose rewards are all equal; other prompts take its place, up to `max_redraws` times."""
    rare = Rare()
    run = trainer(tmp_path, "dapo", {"num_generations": 2}, rare, max_redraws=3, max_steps=1)
    engine = run.engine_for(run.model)
    prompts = next(iter(run.get_train_dataloader())).groups
    made = run.collect(engine, prompts, 0)
    assert len(rare.asked) > 1 and rare.asked[0] == 8
    assert rare.asked[1] == 8 - rare.spread[0] and len(made) == min(8, sum(rare.spread))
    for group in made:
        assert len({one.reward for one in group.completions}) > 1
    assert (
        run.collect(engine, prompts, 0) != []
        and rare.asked[: len(rare.asked) // 2] == rare.asked[len(rare.asked) // 2 :]
    )


class Rare(Paid):
    """Pays one answer in three, by its first token; counts what it was asked."""

    def __init__(self) -> None:
        super().__init__("rare")
        self.asked: list[int] = []
        self.spread: list[int] = []

    def judge(self, groups: Any, seed: int, progress: Any = None) -> Any:
        from align.feedback.base import Verdict

        found = [Verdict([float(int(one.ids[0]) % 3 == 0) for one in group.answers], asked=2) for group in groups]
        self.asked.append(len(groups))
        self.spread.append(sum(len(set(verdict.rewards or [])) > 1 for verdict in found))
        return found


def test_a_judge_that_fails_costs_its_rows_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge = Paid(fails=range(0, 48, 2))
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, "online_dpo", feedback=judge, max_steps=4).train()
    lines = [line for line in log_of(tmp_path) if "rollout/missing" in line]
    assert 0.2 < np.mean([line["rollout/missing"] for line in lines]) < 0.8
    assert "out of order" in caplog.text and "are missing" in caplog.text
    assert all(line["rollout/reward/paid"] >= 0 for line in lines)
    trainer(tmp_path / "none", "online_dpo", feedback=Paid(fails=range(48)), max_steps=2).train()
    weights = final(tmp_path / "none")
    start = tiny_model(seed=1).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in weights.items() if name in start)


def test_held_out_prompts_are_judged_and_not_trained_on(tmp_path: Path) -> None:
    train, held = Paid(), Paid("held_out")
    args = OnlineConfig(
        output_dir=str(tmp_path),
        global_batch_size=8,
        max_steps=4,
        max_new_tokens=6,
        max_length=64,
        eval_every=2,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
        best_metric=None,
    )
    unseen = [{"prompt": f"count to {number}"} for number in range(10)]
    run = OnlineTrainer(
        tiny_model(seed=1),
        "online_dpo",
        args,
        rows(),
        unseen,
        processing_class=tiny_tokenizer(),
        feedback=train,
        eval_feedback=[held],
    )
    run.train()
    found = [line for line in log_of(tmp_path) if "eval_reward/held_out" in line]
    assert len(found) == 2 and len(held.seen) == 20
    assert found[0]["eval_reward/held_out"] == pytest.approx(
        np.mean([paid(group.answers[0].ids) / 2 + paid(group.answers[1].ids) / 2 for group in held.seen[:10]])
    )
    assert found[-1]["eval_kl"] > 0 and found[-1]["eval_length"] > 0
    assert found[0]["eval_reward/held_out"] == pytest.approx(found[0]["eval_reward/paid"])


def test_temperature_is_that_of_the_log_probs_too(tmp_path: Path) -> None:
    """Sampler and trainer agree at any temperature; a loss at temperature 1 would have another ratio."""
    run = trainer(tmp_path, "grpo", {"num_generations": 4}, temperature=0.7, max_steps=1)
    run.train()
    line = next(line for line in log_of(tmp_path) if "sampler/difference" in line)
    assert line["sampler/difference"] < 1e-5 and line["sampler/ess"] > 0.999
    group = run.buffer[0]
    whole = torch.tensor([[*group.prompt.tolist(), *group.completions[0].ids.tolist()]])
    logits = tiny_model(seed=1)(input_ids=whole).logits[0, len(group.prompt) - 1 : -1]
    tempered = (logits / 0.7).log_softmax(-1).gather(-1, torch.as_tensor(group.completions[0].ids)[:, None])[:, 0]
    np.testing.assert_allclose(group.completions[0].columns["sampler_logp"], tempered.detach().numpy(), atol=1e-5)


def test_a_sampler_that_is_off_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Off(HFSampler):
        """A sampler whose log-probs are half a nat too high."""

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            drawn = super().sample(*args, **kwargs)
            return [[replace(one, logp=one.logp + 0.5) for one in group] for group in drawn]

    for kind, loud in ((HFSampler, False), (Off, True)):
        caplog.clear()
        run = trainer(tmp_path / kind.__name__, "grpo", {"num_generations": 2}, max_steps=1)
        samplers = run.samplers(run.engine_for(run.model))
        samplers.by_origin["policy"] = kind(run.model.policy, tiny_tokenizer())
        with caplog.at_level(logging.INFO):
            run.train()
        assert ("sampler and trainer disagree" in caplog.text) is loud
        assert "mean |difference| of a token's log-prob" in caplog.text
        line = next(line for line in log_of(tmp_path / kind.__name__) if "sampler/difference" in line)
        assert line["sampler/difference"] == pytest.approx(0.5 if loud else 0.0, abs=1e-4)


@pytest.mark.parametrize("method", ["online_dpo", "rloo"])
def test_two_processes_sample_and_train_as_one(method: str, tmp_path: Path) -> None:
    options = json.dumps(ONLINE[method])
    script = Path(__file__).with_name("online_parts.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words = [str(tmp_path / "two"), method, options]
    done = subprocess.run(
        [*command, str(script), *words], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = trainer(
        tmp_path / "one", method, ONLINE[method], rollout_keep="all", max_steps=2, learning_rate=0.1, optim="sgd"
    )
    run.train()
    for batch in ("000000.jsonl", "000001.jsonl"):
        one, two = (
            [json.loads(line) for line in (tmp_path / side / "rollouts" / batch).read_text().splitlines()]
            for side in ("one", "two")
        )
        assert [(line["row"], [a["ids"] for a in line["answers"]]) for line in one] == [
            (line["row"], [a["ids"] for a in line["answers"]]) for line in two
        ]
    alone, together = final(tmp_path / "one"), final(tmp_path / "two")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=2e-6)


REFUSED = [
    ({"top_p": 0.9}, "top_p 0.9 with a method"),
    ({"rollout_prompts": 7}, "one number too many"),
    ({"max_new_tokens": 64}, "share `max_length`"),
    ({"temperature": 0.0}, "`temperature` is 0"),
    ({"sampler": "server"}, "without `urls`"),
    ({"sampler": SamplerSpec(urls=["http://x"])}, "`sampler.urls` is unused"),
    ({"sampler": SamplerSpec(dtype="bfloat16")}, "samples in its own `dtype`"),
    ({"shaping": [{"name": "overlng"}]}, "overlong"),
    ({"sampler": "vlm"}, "use one of hf, vllm, server"),
    ({"rollout_epochs": 0}, "whole number >= 1"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        trainer(tmp_path, "grpo", {"num_generations": 2}, **arguments)
    assert says in str(error.value)


def test_each_trainer_names_the_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OnlineTrainer"):
        PreferenceTrainer(tiny_model(), "online_dpo", AlignConfig(str(tmp_path)), rows(), None, tiny_tokenizer())
    with pytest.raises(ConfigError, match="PreferenceTrainer"):
        OnlineTrainer(tiny_model(), "dpo", OnlineConfig(str(tmp_path)), rows(), feedback=Paid())
    with pytest.raises(ConfigError, match="no feedback"):
        run = trainer(tmp_path, "online_dpo", feedback=())
        run.train()
    with pytest.raises(ConfigError, match="shaping is of rewards"):
        trainer(tmp_path, "online_dpo", shaping=[{"name": "overlong"}])


def test_sampling_leaves_the_models_settings_alone(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    run = trainer(tmp_path, "online_dpo", model=model, max_steps=1)
    run.train()
    assert not run.model.policy.config.use_cache
    assert SamplingParams(max_new_tokens=6) == run.args.sampling()


def test_a_run_that_nobody_judges_stops(tmp_path: Path) -> None:
    """Three batches without a judgement; a single one among them, and it goes on."""
    with pytest.raises(DataError, match="judged by nobody") as error:
        trainer(tmp_path / "never", "grpo", {"num_generations": 2}, feedback=Paid(fails=range(48))).train()
    assert "out of order" in str(error.value) and len(log_of(tmp_path / "never")) == 2
    every_row_of_two_batches_of_three = Sometimes()
    trainer(tmp_path / "again", "grpo", {"num_generations": 2}, feedback=every_row_of_two_batches_of_three).train()
    assert every_row_of_two_batches_of_three.batches == 6


class Sometimes(Paid):
    """Judges every third batch."""

    batches = 0

    def judge(self, groups: Any, seed: int, progress: Any = None) -> Any:
        self.batches += 1
        self.fails = set() if self.batches % 3 == 0 else set(range(48))
        return super().judge(groups, seed)
