"""Faults that a hostile reading of online runs found: each was a wrong number, or something lost in silence."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainingArguments

from align.core.errors import ConfigError, TrainingError
from align.core.progress import Progress, silent
from align.data.groups import Question, RowId, TokenGroup
from align.data.rollouts import Answer, RolloutGroup
from align.feedback.base import Verdict
from align.methods import METHODS
from align.methods.base import Draw, Rollouts
from align.sampling import weights
from align.sampling.base import SamplingParams
from align.sampling.hf import HFSampler
from align.sampling.spec import SamplerSpec
from align.testing.tiny import random_pairs, save_tiny, tiny_model, tiny_tokenizer
from align.trainers import AlignConfig, OnlineConfig, OnlineTrainer, PreferenceTrainer, rollouts
from align.trainers.collect import Collector
from align.trainers.rollout_metrics import measured
from align.trainers.samplers import Samplers
from tests.trainers.online_parts import Paid, log_of, rows, trainer
from tests.trainers.test_online import ONLINE, Stop, final


class Compares:
    """A preference model: the first answer wins with a fixed chance against every later one."""

    gives = "preference"
    key: Mapping[str, Any] = {}

    def __init__(self, name: str, chance: float) -> None:
        self.name, self.chance = name, chance

    def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
        found = []
        for group in groups:
            wins = np.full((len(group), len(group)), self.chance)
            wins[np.tril_indices(len(group), -1)] = 1 - self.chance
            np.fill_diagonal(wins, 0.5)
            found.append(Verdict(None, wins, asked=len(group) * (len(group) - 1) // 2))
        return found


def group(answers: Sequence[Answer], wins: Any = None) -> RolloutGroup:
    return RolloutGroup(RowId("made", 0), "hello", np.array([3, 5]), tuple(answers), wins and np.array(wins))


def answer(ids: Sequence[int], origin: str = "policy", **rewards: float) -> Answer:
    return Answer(np.array(ids), "", True, np.full(len(ids), -1.0), origin, rewards=rewards)


# -- what is trained on ------------------------------------------------------------------------------------------------


def test_a_judge_of_pairs_is_a_reward_for_a_regression() -> None:
    """rebel asks for rewards in pairs: every group of a run with a pairwise judge was left out as `no feedback`."""
    judged = group([answer([5]), answer([6])], wins=[[0.5, 0.2], [0.8, 0.5]])
    found = rollouts.select(METHODS.get("rebel")().rollouts(), [judged], 0, {})
    (pair,) = found.groups[0].preferences
    assert (pair.winner, pair.margin) == (1, pytest.approx(0.6))


def test_a_held_out_reward_does_not_hide_the_wins() -> None:
    judged = group([answer([5], held=7.0), answer([6], held=9.0)], wins=[[0.5, 0.2], [0.8, 0.5]])
    assert rollouts.reward_of(judged, {}) == pytest.approx([0.2, 0.8])
    assert rollouts.reward_of(judged, {"held": 2.0}) == pytest.approx([14.0, 18.0])


def test_shaping_sees_all_draws_of_a_batch_at_once(tmp_path: Path) -> None:
    """Whitened over each draw apart, a second draw of few groups would have had the weight of the first."""
    run = trainer(
        tmp_path,
        "reinforce_pp_baseline",
        {"num_generations": 3, "beta": 0.0},
        Rare(),
        max_redraws=3,
        shaping=[{"name": "dynamic_sampling"}],
        max_steps=1,
    )
    engine = run.engine_for(run.model)
    batches: list[int] = []
    once = run._once
    run._once = lambda *args: (batches.append(len(args[1])), once(*args))[1]  # type: ignore[method-assign]
    groups = run.collect(engine, next(iter(run.get_train_dataloader())).groups, 0)
    assert len(batches) > 1 and len(groups) <= 8
    places = [(one.columns["advantage"], one.mask) for own in groups for one in own.completions]
    first = [float(column[mask][0]) for column, mask in places]
    centred = [
        float(one.reward) - np.mean([float(other.reward) for other in own.completions])
        for own in groups
        for one in own.completions
    ]
    scale = np.array(first) / np.array(centred)
    assert np.ptp(scale) < 0.35 * scale.mean(), "one scale for the batch, moved by one mean over its tokens"
    slope, offset = np.polyfit(centred, first, 1)
    np.testing.assert_allclose(first, slope * np.array(centred) + offset, atol=1e-9)


class Rare(Paid):
    """Pays the answers whose first token can be divided by three."""

    def _verdict(self, group: RolloutGroup) -> Verdict:
        return Verdict([float(int(one.ids[0]) % 3 == 0) for one in group.answers], asked=len(group))


def test_prompts_drawn_again_are_drawn_by_the_streams_weights(tmp_path: Path) -> None:
    for name in ("much", "little"):
        lines = [json.dumps({"prompt": f"{name} of {number}"}) for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    streams = [
        {"name": str(tmp_path / "much.jsonl"), "weight": 9.0},
        {"name": str(tmp_path / "little.jsonl"), "weight": 1.0},
    ]
    args = OnlineConfig(str(tmp_path / "run"), max_new_tokens=4, use_cpu=True, global_batch_size=8)
    run = OnlineTrainer(tiny_model(seed=1), "grpo", args, streams, None, tiny_tokenizer(), feedback=Paid())
    drawn = [one for seed in range(20) for one in run._more_prompts(10, seed)]
    share = np.mean(["much" in str(one.row) for one in drawn])
    assert len(drawn) == 200 and 0.8 < share < 0.98


# -- what is told ------------------------------------------------------------------------------------------------------


def test_the_references_answers_are_not_the_policys_numbers() -> None:
    """Half of xpo's answers are the reference's: a policy that collapsed showed half of it."""
    own, other = answer([5, 5, 5, 5, 5, 5], r=1.0), replace(answer([4, 6], "reference", r=0.0), finished=False)
    found = measured([group([own, other])], {}, {"r": 1.0})
    assert (found["rollout/length"], found["rollout/reward"], found["rollout/truncated"]) == (6, 1, 0)
    assert found["rollout/repeated"] == pytest.approx(2 / 3) and found["rollout/no_spread"] == 0
    mixed = measured([group([replace(own, origin="mixture"), replace(other, origin="mixture")])], {}, {"r": 1.0})
    assert mixed["rollout/length"] == 4, "where the policy wrote nothing itself, all count"


def test_held_out_judges_of_pairs_are_apart_from_those_of_training(tmp_path: Path) -> None:
    """They were averaged into the wins that the run is measured by, and named nowhere."""
    run = evaluated(tmp_path, "xpo", Compares("trained", 1.0), [Compares("gold", 0.25), Paid("points")])
    found = run.evaluate()
    assert found["eval_reward"] == 1.0, "the policy's answer against the reference's, by the judge that trains"
    assert found["eval_reward/gold"] == 0.25
    assert 0 <= found["eval_reward/points"] < 1
    assert run.health._judges() == ["gold", "points"], "watched, although no reward is trained on"


def evaluated(folder: Path, method: str, feedback: Any, held_out: Sequence[Any] = (), **arguments: Any) -> Any:
    given: dict[str, Any] = {"max_new_tokens": 4, "use_cpu": True, "global_batch_size": 4, "disable_tqdm": True}
    return OnlineTrainer(
        tiny_model(seed=1),
        METHODS.get(method)(**{**ONLINE[method], **arguments.pop("options", {})}),
        OnlineConfig(str(folder), **{**given, **arguments}),
        rows(),
        [{"prompt": f"count to {number}"} for number in range(40)],
        tiny_tokenizer(),
        feedback=feedback,
        eval_feedback=held_out,
    )


def test_a_policy_that_trains_on_a_mixtures_answers_is_evaluated_by_its_own(tmp_path: Path) -> None:
    """There were none: the evaluation, and `align check`, ended in an error of max()."""
    judge = Paid()
    run = evaluated(tmp_path, "online_ipo", judge, options={"mix": 0.5}, eval_prompts=6)
    found = run.evaluate()
    assert {one.origin for own in judge.seen for one in own.answers} == {"policy"}
    assert found["eval_length"] > 0 and abs(found["eval_kl"]) < 1e-4
    engine = run.engine_for(run.model)
    assert run.look(engine, next(iter(run.get_train_dataloader())).groups[:2])["answers"] == 4


def test_an_evaluation_reads_the_prompts_that_it_asks(tmp_path: Path) -> None:
    run = evaluated(tmp_path, "grpo", Paid(), eval_prompts=6)
    before = run.data.eval.dataset.rows_parsed
    run.evaluate()
    assert run.data.eval.dataset.rows_parsed - before == 8, "two batches of four, not all forty rows"


def test_what_a_reward_function_logs_is_logged(tmp_path: Path) -> None:
    class Says(Paid):
        def _verdict(self, group: RolloutGroup) -> Verdict:
            said = {"first": [int(one.ids[0]) for one in group.answers]}
            return replace(super()._verdict(group), metrics={"hits": (3.0, 2)}, extras=said)

    trainer(tmp_path, "grpo", {"num_generations": 2}, Says(), max_steps=1, rollout_keep="all").train()
    for line in (tmp_path / "rollouts" / "000000.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["logged"] == {"paid/first": [one["ids"][0] for one in row["answers"]]}
    assert [line["rollout/paid/hits"] for line in log_of(tmp_path) if "rollout/paid/hits" in line] == [1.5]


def test_truncated_sampling_is_no_mismatch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under top-p the sampler's log-probs are of another distribution, which is no fault of the sampler."""
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, "online_dpo", top_p=0.6, max_steps=1).train()
    assert "disagree" not in caplog.text and "are not compared" in caplog.text
    assert not any("sampler/kl" in line for line in log_of(tmp_path))


KINDS = [
    ("online_dpo", [Paid()], "the larger reward wins"),
    ("grpo", [Compares("c", 0.7)], "mean probability of beating"),
    ("grpo", [Compares("c", 0.7), Paid()], "`c` will be asked and logged"),
]


@pytest.mark.parametrize(("method", "feedback", "says"), KINDS)
def test_what_becomes_of_feedback_of_the_other_kind_is_said(
    method: str, feedback: list[Any], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, method, ONLINE[method], feedback)
    assert says in caplog.text


def test_what_looks_as_if_it_acted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = OnlineConfig(str(tmp_path), use_cpu=True, max_new_tokens=40, shaping=[{"name": "overlong", **OVERLONG}])
    weighed = [{**row, "weight": 2.0} for row in rows(4)]
    for dataset, own, unread in ((weighed, args, True), (rows(4), replace_length(args, 41), False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            OnlineTrainer(tiny_model(seed=1), "grpo", own, dataset, None, tiny_tokenizer(), feedback=Paid())
        assert ("the column `weight` reaches reward functions only" in caplog.text) is unread
        assert ("costs from token 41 on, and an answer has at most 40" in caplog.text) is unread


OVERLONG = {"max_length": 60, "cache": 20}


def replace_length(args: OnlineConfig, tokens: int) -> OnlineConfig:
    made = copy.copy(args)
    made.max_new_tokens = tokens
    return made


def test_a_price_of_kl_without_a_reference_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    judge = Paid()
    with pytest.raises(ConfigError, match=r"kl_in_reward.*has none"):
        trainer(tmp_path, "grpo", {"beta": 0.0}, judge, shaping=[{"name": "kl_in_reward"}])
    assert not judge.seen
    trainer(tmp_path, "grpo", {"beta": 0.01}, judge, shaping=[{"name": "kl_in_reward"}])


def test_the_distance_to_the_reference_is_measured_on_the_policys_answers(tmp_path: Path) -> None:
    """On the reference's answers the mean log-ratio is minus the other KL: half of xpo's, and they cancelled."""
    run = trainer(tmp_path, "xpo", rollout_minibatches=2, global_batch_size=4)
    engine = run.engine_for(run.model)
    with torch.no_grad():
        for parameter in run.model.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    groups = run.collect(engine, next(iter(run.get_train_dataloader())).groups, 0)
    ratios = {
        role: np.mean(
            [
                (one.columns["old_logp"] - one.columns["ref_logp"]).sum()
                for own in groups
                for one in own.completions
                if one.role == role
            ]
        )
        for role in ("policy", "reference")
    }
    total, count = run.meter.sums["rollout/kl"]
    assert float(total) / count == pytest.approx(ratios["policy"]) and ratios["policy"] > 0.1 > ratios["reference"]


def test_where_memory_runs_out_while_scoring_it_goes_on_with_less(tmp_path: Path) -> None:
    run = trainer(tmp_path, "grpo", {"num_generations": 3}, rollout_minibatches=2, global_batch_size=4)
    engine = run.engine_for(run.model)
    prompts = next(iter(run.get_train_dataloader())).groups
    whole, budget = run.collect(engine, prompts, 0), engine.budget
    outputs, calls = engine.outputs, list[int]()

    def full(micro: Any, *given: Any) -> Any:
        calls.append(micro.packed.unique_tokens)
        if sum(group.tokens for group in micro.groups) > 100:
            raise torch.OutOfMemoryError("full")
        return outputs(micro, *given)

    engine.outputs = full  # type: ignore[method-assign]
    again = run.collect(engine, prompts, 0)
    assert engine.budget < budget and len(calls) > 2
    for before, after in zip(whole, again, strict=True):
        for one, other in zip(before.completions, after.completions, strict=True):
            np.testing.assert_allclose(one.columns["old_logp"], other.columns["old_logp"], atol=1e-5)


# -- stops and resumes -------------------------------------------------------------------------------------------------


def test_a_resume_draws_the_dropout_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    """Sampler and trainer are compared at each launch, by a pass that drew from the random state of dropout."""
    model = str(save_tiny(tmp_path / "model"))

    def adapted(folder: str, **arguments: Any) -> OnlineTrainer:
        given = {"max_steps": 3, "learning_rate": 1e-2, "global_batch_size": 4, "max_new_tokens": 5}
        args = OnlineConfig(
            str(tmp_path / folder), use_cpu=True, disable_tqdm=True, **{**given, "save_strategy": "no", **arguments}
        )
        lora = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
        return OnlineTrainer(
            model, METHODS.get("grpo")(num_generations=3), args, rows(), peft_config=lora, feedback=Paid()
        )

    adapted("whole").train()
    half = adapted("half", save_strategy="steps", save_steps=1)
    half.add_callback(Stop(1))
    half.train()
    adapted("half", save_strategy="steps", save_steps=100).train()
    whole, resumed = (load_file(tmp_path / one / "policy" / "adapter_model.safetensors") for one in ("whole", "half"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_policy_that_sampled_has_no_dropout(tmp_path: Path) -> None:
    args = OnlineConfig(str(tmp_path), use_cpu=True, max_new_tokens=5, global_batch_size=4, rollout_minibatches=2)
    lora = LoraConfig(
        r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    run = OnlineTrainer(tiny_model(seed=1), "grpo", args, rows(), None, tiny_tokenizer(), lora, feedback=Paid())
    engine = run.engine_for(run.model)
    run.model.train()
    groups = run.collect(engine, next(iter(run.get_train_dataloader())).groups, 0)
    gaps = [one.columns["old_logp"] - one.columns["sampler_logp"] for own in groups for one in own.completions]
    assert max(np.abs(gap).max() for gap in gaps) < 1e-4
    assert run.model.training


def test_greedy_completions_are_compared_without_dropout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The trainer's side of the comparison was made in training mode, and differed from any sampler."""
    spec = SamplerSpec(kind="server", urls=["http://localhost:1"])
    args = OnlineConfig(str(tmp_path), use_cpu=True, max_new_tokens=5, global_batch_size=4, sampler=spec)
    lora = LoraConfig(
        r=4, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    run = OnlineTrainer(tiny_model(seed=1), "grpo", args, rows(), None, tiny_tokenizer(), lora, feedback=Paid())
    engine = run.engine_for(run.model)
    run._samplers = Samplers({"policy": HFSampler(engine.roles.policy, tiny_tokenizer())}, engine.roles.policy)
    run.model.train()
    with caplog.at_level(logging.INFO):
        run.collect(engine, next(iter(run.get_train_dataloader())).groups, 0)
    assert "greedy completions: 4 of 4 equal" in caplog.text and "disagree" not in caplog.text


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"temperature": 0.5}, "temperature"), ({"rollout_minibatches": 2}, "rollout_minibatches"), ({}, "feedback")],
)
def test_a_resumed_run_may_not_change_how_it_samples(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    options = {"num_generations": 2}
    trainer(tmp_path, "grpo", options, max_steps=1, save_strategy="steps", save_steps=1, global_batch_size=4).train()
    judge = Paid() if changed else Paid("another")
    again = trainer(tmp_path, "grpo", options, judge, **{"max_steps": 2, "global_batch_size": 4, **changed})
    with pytest.raises(ConfigError, match=f"another run(.|\n)*{named}"):
        again.train()


def test_rollouts_that_a_killed_run_kept_are_written_over(tmp_path: Path) -> None:
    """Steps behind the last checkpoint are made again; their rollouts stood in the file twice."""
    given = {"rollout_keep": "all", "save_strategy": "steps", "save_steps": 2}
    killed = trainer(tmp_path, "online_dpo", max_steps=4, **given)
    killed.add_callback(Stop(3))
    killed.train()
    assert not (tmp_path / "checkpoint-3").exists()
    trainer(tmp_path, "online_dpo", max_steps=4, **given).train()
    kept = [len(file.read_text().splitlines()) for file in sorted((tmp_path / "rollouts").glob("*.jsonl"))]
    assert kept == [8, 8, 8, 8]


def test_a_last_batch_smaller_than_its_parts_is_trained_once(tmp_path: Path) -> None:
    """13 prompts, 12 a batch in four parts: the second batch is one prompt, and three of its parts are empty."""
    given = {"rollout_minibatches": 4, "global_batch_size": 3, "max_steps": 8, "max_new_tokens": 4}
    args = OnlineConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no", **given)
    judge = Paid()
    run = OnlineTrainer(
        tiny_model(seed=1),
        METHODS.get("grpo")(num_generations=4),
        args,
        rows(13),
        None,
        tiny_tokenizer(),
        feedback=judge,
    )
    sizes: list[int] = []
    whole = run.groups_of
    run.groups_of = lambda *given: (found := whole(*given), sizes.append(len(found)))[0]  # type: ignore[method-assign]
    run.train()
    assert run.state.global_step == 8 and len(judge.seen) == 13
    assert sizes[:4] == [3, 3, 3, 3] and sorted(sizes[4:]) == [0, 0, 0, 1]
    assert len({own.row.row for own in judge.seen}) == 13


@pytest.mark.parametrize("name", ["xpo", "nash_md"])
def test_an_adapter_and_its_base_sample_apart_under_checkpointing(name: str, tmp_path: Path) -> None:
    judge = Paid()
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    given = {"max_steps": 2, "learning_rate": 1e-2, "global_batch_size": 4, "max_new_tokens": 5}
    args = OnlineConfig(
        str(tmp_path), use_cpu=True, disable_tqdm=True, gradient_checkpointing=True, logging_steps=1, **given
    )
    run = OnlineTrainer(
        tiny_model(seed=1), METHODS.get(name)(), args, rows(), None, tiny_tokenizer(), lora, feedback=judge
    )
    run.train()
    line = next(line for line in log_of(tmp_path) if "sampler/largest_difference" in line)
    assert line["sampler/largest_difference"] < 1e-4
    base = tiny_model(seed=1).eval()

    for own in judge.seen[4:6]:
        one = own.answers[1]
        whole = torch.tensor([[*own.prompt_ids.tolist(), *one.ids.tolist()]])
        logp = base(input_ids=whole).logits[0, len(own.prompt_ids) - 1 : -1].log_softmax(-1)
        gap = np.abs(logp.gather(-1, torch.as_tensor(one.ids)[:, None])[:, 0].detach().numpy() - one.logp).max()
        assert bool(gap < 1e-4) is (name == "xpo"), "the reference is the base alone, the mixture neither"


@pytest.mark.parametrize("name", ["grpo", "nash_md", "rebel", "xpo"])
def test_steps_without_any_feedback_train_nothing(name: str, tmp_path: Path) -> None:
    trainer(tmp_path, name, ONLINE[name], Paid(fails=range(48)), max_steps=2).train()
    start = tiny_model(seed=1).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in final(tmp_path).items() if key in start)


# -- ranks -------------------------------------------------------------------------------------------------------------


def collector(rank: int, feedback: Any) -> Collector:
    asked = Rollouts((Draw("policy", 2),), "reward", "pair")
    sampler = HFSampler(tiny_model(seed=1), tiny_tokenizer())
    return Collector(asked, {"policy": sampler}, [feedback], SamplingParams(max_new_tokens=3), rank, 2)


def prompts(count: int = 3) -> list[TokenGroup]:
    return [
        TokenGroup(RowId("made", row), np.array([3, 5 + row]), (), question=Question("hello", {}))
        for row in range(count)
    ]


def on_two_ranks(monkeypatch: pytest.MonkeyPatch, ranks: Sequence[Collector]) -> list[Any]:
    """What each of two ranks gets, a result or an error: first what they send, then what they make of all."""
    sent: list[Any] = [None, None]

    def send(rank: int) -> Callable[[list[Any], Any], None]:
        def gather(out: list[Any], mine: Any) -> None:
            sent[rank] = mine
            out[:] = sent if None not in sent else [mine, mine]

        return gather

    found: list[Any] = []
    for turn in range(2):
        found = []
        for rank, one in enumerate(ranks):
            monkeypatch.setattr(torch.distributed, "all_gather_object", send(rank))
            try:
                found.append(one(prompts(), 7, 0))
            except Exception as error:  # noqa: BLE001 - each rank's own
                found.append(error)
        assert turn or all(one is not None for one in sent), "every rank sends, whatever befell it"
    return found


def test_what_fails_on_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Paid):
        def judge(self, groups: Sequence[RolloutGroup], seed: int, progress: Progress = silent) -> list[Verdict]:
            raise ConfigError("the judge is set up wrongly", mend="mend it")

    well, ill = on_two_ranks(monkeypatch, [collector(0, Paid()), collector(1, Broken())])
    assert isinstance(ill, ConfigError)
    assert isinstance(well, TrainingError) and "rank 1 failed: the judge is set up wrongly" in str(well)


def test_the_account_is_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_two_ranks(monkeypatch, [collector(rank, Paid(fails=[1])) for rank in (0, 1)])
    for groups, account in found:
        assert [own.row.row for own in groups] == [0, 1, 2]
        assert account.counts["paid"].asked == 6
        assert dict(account.counts["paid"].missing) == {"out of order": 2}


def test_every_rank_takes_part_where_the_weights_of_a_push_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 the rank that pushes waits in each gathering for the others; they waited for it at the barrier."""
    gathered: list[int] = []

    def gather(values: Any) -> Any:
        gathered.append(len([value for value in values if hasattr(value, "ds_id")]))
        return nullcontext()

    monkeypatch.setattr(weights, "_gathered", gather)
    policy, at_barrier = tiny_model(seed=1), list[int]()
    samplers = Samplers({"policy": NoSync()}, policy, False, lambda: at_barrier.append(sum(gathered)))
    with samplers.ready(0):
        assert at_barrier == [0], "whole weights are not gathered"
    for parameter in policy.parameters():
        parameter.ds_id = 1  # type: ignore[attr-defined]
    with samplers.ready(1), samplers.ready(1):
        assert at_barrier[1:] == [len(list(policy.parameters()))] * 2, "once for new weights, before the barrier"


class NoSync:
    """A sampler that another rank pushes to."""

    capabilities: frozenset[str] = frozenset()

    def sync(self, policy: Any) -> None:
        raise AssertionError("this rank pushes nothing")


@pytest.mark.parametrize("cut", ["zero3", "fsdp"])
def test_a_reference_is_not_sampled_from_a_shard(cut: str, tmp_path: Path) -> None:
    """xpo with a server for the policy passed the check, and its reference is sampled from in place."""
    spec = SamplerSpec(kind="server", urls=["http://localhost:1"])
    run = trainer(tmp_path, "xpo", sampler=spec)
    engine = run.engine_for(run.model)
    if cut == "zero3":
        next(run.model.parameters()).ds_id = 1  # type: ignore[attr-defined]
    else:
        run.args.fsdp = ["full_shard"]
    with pytest.raises(ConfigError, match="cut over ranks"):
        run.samplers(engine)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_arguments_are_json_for_trackers() -> None:
    args = OnlineConfig(
        "out",
        sampler=SamplerSpec(kind="server", urls=["http://here:8000"]),
        shaping=[{"name": "overlong"}],
        reward_weights={"a": 2.0},
    )
    told = json.loads(args.to_json_string())
    assert told["sampler"]["urls"] == ["http://here:8000"] and told["shaping"] == [{"name": "overlong"}]


def test_the_best_checkpoint_is_that_of_the_reward(tmp_path: Path) -> None:
    given = {"eval_every": 1, "save_strategy": "best", "max_steps": 2, "eval_prompts": 4}
    run = evaluated(tmp_path / "a", "grpo", Paid(), best_metric="reward", **given)
    assert run.args.greater_is_better is True
    run.train()
    assert run.state.best_metric == max(line["eval_reward"] for line in log_of(tmp_path / "a") if "eval_reward" in line)
    for metric in ("accuracy", "loss"):
        with pytest.raises(ConfigError, match="does not give"):
            evaluated(tmp_path / "b", "grpo", Paid(), best_metric=metric, **given)


def test_what_trl_users_bring_is_refused_with_a_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="OnlineConfig"):
        OnlineTrainer(tiny_model(), "grpo", AlignConfig(str(tmp_path)), rows(), None, tiny_tokenizer(), feedback=Paid())
    with pytest.raises(ConfigError, match="AlignConfig"):
        PreferenceTrainer(
            tiny_model(), "dpo", TrainingArguments(str(tmp_path)), random_pairs(4), None, tiny_tokenizer()
        )
    with pytest.raises(ConfigError, match="never be read"):
        trainer(tmp_path, "grpo", {"num_generations": 2}, reference="cached")
    args = OnlineConfig(str(tmp_path))
    with pytest.raises(ConfigError, match="open_feedback"):
        OnlineTrainer(tiny_model(), "grpo", args, rows(), None, tiny_tokenizer(), feedback=lambda completions: [0.0])
    with pytest.raises(ConfigError, match="two feedbacks are named `paid`"):
        OnlineTrainer(
            tiny_model(), "grpo", args, rows(), None, tiny_tokenizer(), feedback=Paid(), eval_feedback=[Paid()]
        )
